"""Plug-ins of other packages by entry point, and of one's own file."""

import importlib
import json
import shutil
import textwrap
from pathlib import Path

import pytest

from flexlora import methods
from flexlora.config.plugins import Plugins
from flexlora.data.corpus import Corpus
from flexlora.deployment import run_spec
from flexlora.errors import ConfigError
from flexlora.federation import compose, corpora, rounds, setup
from flexlora.laws import verdicts
from flexlora.method import Averager, Method, averagers, regularizers, server_optimizers
from flexlora.peft_format import WEIGHTS
from support import models

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
SAME = {"types": {"all": {"attention": 3, "feed_forward": 3}}, "distribution": {"all": 1.0}}

PACKAGE = """
from dataclasses import dataclass

from flexlora.data.corpus import Corpus
from flexlora.method import Regularizer, ServerOptimizer, Step
from flexlora.method.averagers.plain import Plain
from flexlora.method import Averager, Mean, WeightedCohort


@dataclass(frozen=True)
class Half(ServerOptimizer):
    title = "half a step"
    paper = "none"

    def step(self, change, moment):
        return Step(0.0, 1.0, 0.5)


@dataclass(frozen=True)
class Nothing(Regularizer):
    title = "no change"
    paper = "none"

    def wrap(self, method, training):
        return method


@dataclass(frozen=True)
class Equal(Averager):
    title = "equal weights"
    offers = frozenset({Mean.PRODUCTS})

    def cohort(self, uploads, weights, context, changes=None):
        return WeightedCohort(tuple(uploads), (1.0,) * len(uploads))


def read(path, columns, seed):
    texts = {"instruction": [str(path)], "input": [""], "output": [str(seed)]}
    return Corpus.build({"client": ["a"], **texts})
"""
ENTRY_POINTS = """
[flexlora.methods]
clipped = dummy_methods:Clipped
broken = dummy_others:Half
[flexlora.server_optimizers]
half = dummy_others:Half
[flexlora.regularizers]
nothing = dummy_others:Nothing
[flexlora.averagers]
equal = dummy_others:Equal
[flexlora.corpora]
inline = dummy_others:read
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution beside the library, as pip would have laid it out."""
    site = tmp_path / "site"
    info = site / "dummy-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(EXAMPLE, site / "dummy_methods.py")
    (site / "dummy_others.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    return folder


def test_an_installed_method_obeys_the_laws(installed):
    assert "clipped" in methods.names() and "clipped" not in methods.shipped()
    outcomes = {v.law.name: v.outcome for v in verdicts(methods.make("clipped", {"max_norm": 2.0}))}
    assert "broken" not in outcomes.values()
    assert outcomes["resume"] == outcomes["validation"] == "holds"


def test_an_installed_method_runs_and_resumes_to_the_bit(installed, folder, tmp_path):
    settings = models.settings(folder, method={"name": "clipped", "max_norm": 0.5}, ranks=SAME)
    prepared = setup.prepare(settings, models.corpus())
    whole = list(rounds.run(prepared, tmp_path / "whole"))
    stopped = rounds.run(prepared, tmp_path / "stopped")
    for event in stopped:
        if event["event"] == "round" and event["round"] == 2:
            stopped.close()
            break
    list(rounds.run(prepared, tmp_path / "stopped", resume=True))
    assert whole[-1]["event"] == "finish"
    files = [rounds.adapter_folder(tmp_path / name, 3) / WEIGHTS for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_kind_of_plug_in_can_be_installed(installed, folder, tmp_path):
    settings = models.settings(
        folder,
        server_optimizer={"name": "half"},
        regularizer={"name": "nothing"},
        averager={"name": "equal"},
        federation={"rounds": 1},
    )
    prepared = setup.prepare(settings, models.corpus())
    assert prepared.averager.title == "equal weights"
    assert list(rounds.run(prepared, tmp_path))[-1]["event"] == "finish"
    for plugins, name in (
        (server_optimizers, "half"),
        (regularizers, "nothing"),
        (averagers, "equal"),
    ):
        assert name in plugins.names()


def test_an_averager_that_lacks_a_mean_is_refused(installed, folder):
    settings = models.settings(
        folder, method={"name": "fedit"}, averager={"name": "equal"}, ranks=SAME
    )
    with pytest.raises(ConfigError, match="'equal weights' does not compute the mean of factors"):
        setup.prepare(settings, models.corpus())


def test_a_corpus_reader_can_be_installed(installed):
    read = corpora.installed("inline")
    corpus = read("there", None, 7)
    assert isinstance(corpus, Corpus) and corpus.keys("client").tolist() == ["a"]
    with pytest.raises(ConfigError, match=r"'inlin'. Did you mean 'inline'\?"):
        corpora.check("inlin")


def test_an_entry_point_of_another_kind_is_refused(installed):
    with pytest.raises(ConfigError, match=r"'broken'.*is no method; it must name a class derived"):
        methods.make("broken")


def test_a_method_in_a_file_is_a_methods_name(folder, tmp_path):
    settings = compose.with_plugin(models.settings(folder, ranks=SAME), EXAMPLE)
    assert settings.method == {"name": str(EXAMPLE)}
    prepared = setup.prepare(settings, models.corpus())
    assert prepared.method.title == "Clipped FedIT"
    # A stored config names the file, so that a run can be resumed.
    again = compose.parse(json.loads(settings.model_dump_json()), "config.json")
    assert type(setup.prepare(again, models.corpus()).method) is type(prepared.method)
    options = {"method": {"name": str(EXAMPLE), "max_norm": 0.25}}
    assert (
        compose.with_plugin(settings.model_copy(update=options), EXAMPLE).method
        == options["method"]
    )


def test_a_method_may_be_an_object(folder, tmp_path):
    made = methods.make(str(EXAMPLE), {"max_norm": 0.25})
    prepared = setup.prepare(models.settings(folder, ranks=SAME), models.corpus(), method=made)
    assert prepared.method is made
    assert prepared.experiment.method["max_norm"] == 0.25
    assert prepared.experiment.method["name"].endswith(":Clipped")


def test_a_server_cannot_name_a_file_that_a_node_would_run(folder):
    settings = models.settings(folder, method={"name": str(EXAMPLE)}, ranks=SAME)
    text = run_spec.of(settings, "0" * 16, {"attention": 3, "feed_forward": 3}).model_dump_json()
    with pytest.raises(ConfigError, match=r"There is no method '.*own_method\.py'"):
        run_spec.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must define one class derived from Method; it has: none"),
        (
            """
            from flexlora.method import Method
            class One(Method): pass
            """,
            r"One of .*plugin\.py must define: aggregate, info",
        ),
        (
            """
            from flexlora.method import Info, Method
            class One(Method):
                info = Info("one")
                def aggregate(self, state, cohort, context): return state
            """,
            "no dataclass; decorate it with @dataclass",
        ),
    ],
)
def test_a_file_without_a_usable_method_is_refused(text, message, tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ConfigError, match=message):
        methods.make(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no Python file .*nowhere\.py"):
        methods.make(str(tmp_path / "nowhere.py"))
    with pytest.raises(ConfigError, match="defines no plug-in"):
        (tmp_path / "empty.py").write_text("")
        compose.with_plugin(models.settings(tmp_path), tmp_path / "empty.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all", "line 1, cannot be imported: ModuleNotFoundError: No module"),
        ("x = 1\ny = x / 0", "line 2, cannot be imported: ZeroDivisionError"),
        ("x = 1\ndef f(:", "line 2, cannot be imported: SyntaxError: invalid syntax"),
    ],
)
def test_an_error_in_the_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "faulty.py"
    path.write_text(f"{text}\n")
    for _ in range(2):  # a module that failed is not remembered
        with pytest.raises(ConfigError, match=f"faulty.py, {message}"):
            methods.make(str(path))


def test_every_kind_has_its_own_group():
    kinds = [methods.PLUGINS, averagers.PLUGINS, regularizers.PLUGINS, server_optimizers.PLUGINS]
    assert all(isinstance(plugins, Plugins) for plugins in kinds)
    assert len({plugins.group for plugins in kinds}) == len(kinds)
    assert methods.PLUGINS.base is Method and averagers.PLUGINS.base is Averager


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("FlexLoRA", "flexlora"),
        ("FLORA", "flora"),
        ("FFA-LoRA", "ffalora"),
        ("lora_a2", "loraa2"),
        ("Full rank", "fullrank"),
        ("hetlora", "hetlora"),
        ("my/method.py", "my/method.py"),
    ],
)
def test_a_method_is_found_in_any_spelling_of_its_name(written, name):
    assert methods.resolve(written) == name


@pytest.mark.parametrize(("written", "near"), [("FlexLora2", "flexlora"), ("Het-Lor", "hetlora")])
def test_a_wrong_name_is_answered_with_the_nearest(written, near):
    with pytest.raises(ConfigError, match=f"no method '{written}'. Did you mean '{near}'"):
        methods.resolve(written)


def test_a_server_s_method_is_never_a_file():
    with pytest.raises(ConfigError, match="no method"):
        methods.resolve("evil.py", files=False)


def test_a_config_keeps_the_listed_name_of_every_plug_in(folder):
    settings = models.settings(
        folder, method={"name": "FlexLoRA"}, server_optimizer={"name": "FedAvgM"}
    )
    assert settings.method == {"name": "flexlora"}
    assert settings.server_optimizer == {"name": "fedavgm"}
