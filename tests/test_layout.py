"""The structure of src/flexlora: its parts, the direction of imports, the sizes of files.

The order of the parts is that of the list in ``flexlora.__doc__``.
"""

import re
from pathlib import Path

import pytest

import flexlora
from support.imports import (
    Package,
    cycles,
    functions,
    side_doors,
    strays,
    too_long,
    upward,
)

PACKAGE = Package.read(Path(flexlora.__file__).parent)

MOST_ROOMS = 20
FILE_LINES, FUNCTION_LINES = 400, 60

ENTRANCES = (
    "data.corpora.hub",
    "data.corpora.mapped",
    "data.corpora.natural_instructions",
    "data.corpora.objects",
    "data.corpora.procedural",
    "data.corpora.table",
    "data.partition",
    "deployment.certificates",
    "deployment.demo",
    "deployment.keys",
    "deployment.node.capacity",
    "deployment.node.join",
    "deployment.node.limits",
    "deployment.node.node",
    "deployment.node.preflight",
    "deployment.server.server_run",
    "deployment.server.supervisor",
    "federation.attacks",
    "federation.checkpoint",
    "federation.compare",
    "federation.compose",
    "federation.evaluations",
    "federation.influence.measure",
    "federation.jobs",
    "federation.prepared",
    "federation.ray",
    "federation.recovery",
    "federation.ray.cluster",
    "federation.rehearsal",
    "federation.rounds",
    "federation.served",
    "federation.setup",
    "method.averagers",
    "method.partial_step",
    "method.regularizers",
    "method.server_optimizers",
    "model.layers.attention",
    "model.smollm2",
    "reporting.comparison",
    "reporting.damage",
    "reporting.names",
    "reporting.page",
    "reporting.tracker",
    "reporting.trackers",
    "reporting.watch",
    "storage.tensors",
    "storage.untrusted",
    "training.adapters",
    "training.job",
    "wire.validate",
)
"""Modules that other parts may import beside a package's ``__init__``.

Most are imported where they are needed and not before, as they take long to import or need an
optional dependency.
"""

HOMES = {
    "flwr": ("deployment.flower",),
    "ray": ("federation.ray",),
    "transformers": ("model", "evaluation", "data", "peft_format.base_model"),
}
"""Which parts may import a large dependency, by its name."""

METHODS_MAY_IMPORT = {"errors", "lowrank", "method", "methods", "seeds"}
"""Of the files of methods; their ``__init__`` finds them and may import what finds plug-ins."""

LONG_FILES: dict[str, int] = {}
"""Files still over the limit. An entry is taken out when its file is within it; none is added."""

LONG_FUNCTIONS: dict[str, int] = {}
"""The same for functions."""


def order_in(text: str) -> list[str]:
    """The names at the beginning of the lines of a list that is indented by four blanks."""
    return re.findall(r"^    (\w+) {2,}\S", text, re.MULTILINE)


def method_imports(package: Package) -> list[str]:
    return [
        str(each)
        for each in package.own
        if each.importer.startswith(f"{package.name}.methods.")
        and package.room(each.imported) not in METHODS_MAY_IMPORT
    ]


def test_the_documented_parts_are_those_of_the_package():
    assert flexlora.__doc__
    order = order_in(flexlora.__doc__)
    assert sorted(order) == sorted(PACKAGE.rooms)
    assert len(order) <= MOST_ROOMS


def test_imports_go_in_the_documented_order():
    assert flexlora.__doc__
    assert upward(PACKAGE, order_in(flexlora.__doc__)) == []


def test_no_modules_import_each_other():
    assert cycles(PACKAGE) == []


def test_a_package_is_imported_through_its_entrances():
    assert side_doors(PACKAGE, ENTRANCES) == []


def test_no_entrance_is_unused():
    used = {each.rpartition(" imports flexlora.")[2] for each in side_doors(PACKAGE, ())}
    assert set(ENTRANCES) - used == set()


def test_methods_import_the_interface_and_its_values_only():
    assert method_imports(PACKAGE) == []


def test_large_dependencies_are_imported_at_home_only():
    assert strays(PACKAGE, HOMES) == []


def test_no_file_is_too_long():
    assert too_long(PACKAGE.lines, FILE_LINES, LONG_FILES) == []


def test_no_function_is_too_long():
    assert too_long(functions(PACKAGE), FUNCTION_LINES, LONG_FUNCTIONS) == []


# --- the checker itself ----------------------------------------------------------------------

ORDER = ("low", "methods", "high")


@pytest.fixture
def package(tmp_path):
    """A package of these files; those not given are as they should be."""

    def build(**changed: str) -> Package:
        files = {
            "low/__init__": "from house.low.thing import Thing\n",
            "low/thing": "import torch\n\nclass Thing: ...\n",
            "methods/__init__": "",
            "methods/mean": "from house.low import Thing\n",
            "high/__init__": "",
            "high/door": "from house.low import Thing\nfrom house.methods import mean\n",
            "__init__": "",
        }
        files |= {name.replace("__", "/", 1): text for name, text in changed.items()}
        for name, text in files.items():
            path = tmp_path / "house" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Package.read(tmp_path / "house")

    return build


def test_a_sound_package_breaks_no_rule(package):
    house = package()
    assert house.rooms == {"low", "methods", "high"}
    assert upward(house, ORDER) == cycles(house) == strays(house, {"torch": ("low",)}) == []
    assert side_doors(house, ["methods.mean"]) == []
    assert functions(house) == {}


@pytest.mark.parametrize(
    "text",
    [
        "from house.high import door\n",
        "import house.high.door\n",
        "from ..high import door\n",
        "def late():\n    from house.high.door import Thing\n",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from house import high\n",
    ],
)
def test_an_upward_import_is_seen(package, text):
    (found,) = upward(package(low__thing=text), ORDER)
    assert re.fullmatch(r"house\.low\.thing:\d imports house\.high(\.door)?", found)


def test_a_part_outside_of_the_order_is_seen(package):
    assert upward(package(new__part="from house.low import Thing\n"), ORDER) == [
        "house.new.part:1 imports house.low"
    ]


def test_imports_for_type_checkers_do_not_count(package):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high import door\n"
    house = package(low__thing=text)
    assert upward(house, ORDER) == cycles(house) == []


@pytest.mark.parametrize(
    ("changed", "group"),
    [
        (
            {"low__other": "import house.low.thing\n", "low__thing": "import house.low.other\n"},
            ["house.low.other", "house.low.thing"],
        ),
        (
            {"low__thing": "def late():\n    from house.low import Thing\n"},
            ["house.low", "house.low.thing"],
        ),
        ({"high__door": "import house.high.door\n"}, ["house.high.door"]),
        # An import of a module runs its package, which imports the importer.
        (
            {"low__thing": "import house.high.window\n", "high____init__": "import house.low\n"},
            ["house.high", "house.low", "house.low.thing"],
        ),
    ],
)
def test_a_cycle_is_seen(package, changed, group):
    house = package(**changed, high__window="")
    assert group in [sorted(set(each) & set(group)) for each in cycles(house)]


def test_an_import_past_the_entrance_is_seen(package):
    house = package(high__door="from house.low.thing import Thing\n")
    assert side_doors(house, []) == ["house.high.door:1 imports house.low.thing"]
    assert side_doors(house, ["low.thing"]) == []


def test_a_method_that_imports_more_is_seen(package):
    house = package(methods__mean="from house.high import door\n")
    assert method_imports(house) == ["house.methods.mean:1 imports house.high.door"]


def test_a_dependency_away_from_home_is_seen(package):
    house = package(high__door="def late():\n    import torch.nn as nn\n")
    assert strays(house, {"torch": ("low",)}) == ["house.high.door:2 imports torch.nn"]


def test_long_files_and_functions_are_seen(package):
    house = package(low__thing="class A:\n    def f(self):\n        a = 1\n        return a\n")
    assert functions(house) == {"house.low.thing.A.f": 3}
    assert too_long(functions(house), 3, {}) == []
    assert too_long(functions(house), 2, {}) == ["house.low.thing.A.f has 3 lines, not at most 2"]
    assert too_long(functions(house), 2, {"house.low.thing.A.f": 3}) == []
    assert len(too_long({"a": 5}, 2, {"a": 4})) == 1
    assert too_long({"a": 2}, 2, {"a": 4}) == ["a is within 2 lines: take its entry out"]
    assert too_long({}, 2, {"a": 4}) == ["a is within 2 lines: take its entry out"]
