"""How many faults planted in the modules that check untrusted bytes do their own tests find?

    python benchmarks/mutation_score.py [--each N] [--seed 0] [MODULE ...]

A mutant is the module with one change: a comparison turned or moved by one, a number plus one,
``and`` for ``or``, a ``not`` or a ``raise`` left out, plus for minus, True for False. All mutants
of a module, or ``--each`` of them drawn with the seed, are run against those of the module's tests
that come to the changed lines, the quickest first, until one fails. A mutant that no test notices
has survived; each is printed. A mutant that hangs counts as found. ``EQUIVALENT`` names mutants
that do what the module does, so that no test can find them: they are printed, and not counted.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

WIRE = ("tests/wire", "tests/storage")
CHECKPOINTS = tuple(
    f"tests/federation/test_{name}.py" for name in ("checkpoint", "recovery", "corruption")
)
MODULES = {
    "wire.validate": WIRE,
    "wire.header": WIRE,
    "wire.expected": WIRE,
    "wire.fields": WIRE,
    "wire.sparse": WIRE,
    "wire.adapters": WIRE,
    "wire.messages": WIRE,
    "storage.tensors": ("tests/storage", "tests/wire"),
    "storage.untrusted": ("tests/storage",),
    "storage.sealed": ("tests/storage", *CHECKPOINTS),
    "federation.checkpoint": CHECKPOINTS,
    "federation.influence.bounds": ("tests/federation/influence",),
    "federation.influence.clip": ("tests/federation/influence",),
    "federation.influence.measure": ("tests/federation/influence",),
    "federation.influence.result": ("tests/federation/influence",),
    "federation.influence.screen": ("tests/federation/influence",),
    "deployment.flower.gate_rules": ("tests/deployment/flower/test_gate_rules.py",),
    "deployment.flower.bodies": ("tests/deployment/flower/test_bodies.py",),
}
"""The security-critical modules and the tests that are their own, the quickest first."""

SECONDS = 60
"""A mutant whose tests take longer hangs."""

REWRITES = "ignore::pytest.PytestAssertRewriteWarning"
"""Of plug-ins that are imported already."""

TARGET = 0.9
"""Of each module's mutants."""

EQUIVALENT: dict[str, tuple[str, ...]] = {
    # A module is noted when its A comes, or when its B does: it must have both.
    "wire.header": ("Eq becomes NotEq: factor == 'A'",),
}
"""By module, as they are printed, without the line: each leaves what the module does as it is."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


@dataclass(frozen=True)
class Mutant:
    """A module with one change; ``what`` says which, and where."""

    module: str
    tree: ast.Module
    what: str
    lines: range


def mutants(module: str, text: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    whole = ast.parse(text)
    found = []
    for number, node in enumerate(_places(whole)):
        for variant, (_, what) in enumerate(_changes(node)):
            tree = copy.deepcopy(whole)
            place = list(_places(tree))[number]
            _replace(tree, place, list(_changes(place))[variant][0])
            line = f"line {node.lineno}: {what}: {ast.unparse(node)[:70]}"
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found.append(Mutant(module, ast.fix_missing_locations(tree), line, lines))
    return found


def _places(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Every node that may change, but no annotation, decorator, default text or error message."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "exc", "type_params"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.JoinedStr) or not isinstance(node, ast.AST):
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield node
            yield from _places(node)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What the node may become, and what to call that."""
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                ops = [*node.ops[:at], other(), *node.ops[at + 1 :]]
                yield (
                    ast.Compare(node.left, ops, node.comparators),
                    f"{type(operator).__name__} becomes {other.__name__}",
                )
    elif isinstance(node, ast.BoolOp):
        joined = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(joined, node.values), "and for or"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand, "no not"
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield ast.BinOp(node.left, other, node.right), "plus for minus"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value), "the other truth"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1), "plus one"
    elif isinstance(node, ast.Raise):
        yield ast.Pass(), "no raise"


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
                return
            if isinstance(value, list) and any(each is old for each in value):
                value[next(at for at, each in enumerate(value) if each is old)] = new
                return
    raise LookupError("the node is not in the tree")


class Planted(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports the mutant where its module is imported."""

    def __init__(self, mutant: Mutant, path: Path) -> None:
        super().__init__(f"flexlora.{mutant.module}", str(path))
        self.code = compile(mutant.tree, str(path), "exec")

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """The mutant's module alone."""
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def get_code(self, name: str):  # type: ignore[no-untyped-def]
        """The mutant's, not that of the file."""
        return self.code


@dataclass(eq=False)
class Reached:
    """A pytest plugin that notes which lines of a module each test comes to.

    Lines that run while a fixture of many tests is made belong to all tests of that file, and
    lines that run at import to all tests.
    """

    path: str
    lines: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=dict)
    now: str = ""

    def trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        """For ``sys.settrace``."""
        return self._line if frame.f_code.co_filename == self.path else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        self.lines[self.now].add(frame.f_lineno)
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Lines from here on belong to this test."""
        self.now, started = item.nodeid, time.perf_counter()
        try:
            return (yield)
        finally:
            self.now, self.seconds[item.nodeid] = "", time.perf_counter() - started

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        """Lines from here on belong to the tests that share the fixture."""
        before = self.now
        if fixturedef.scope != "function":
            self.now = file_of(before)
        try:
            return (yield)
        finally:
            self.now = before

    def of(self, lines: range) -> list[str]:
        """The tests that come to any of these lines, the quickest first, file by file."""
        found = {place for place, reached in self.lines.items() if reached.intersection(lines)}
        tests = sorted(
            (test for test in self.seconds if found & {"", test, file_of(test)}),
            key=self.seconds.__getitem__,
        )
        files = [*dict.fromkeys(map(file_of, tests))]
        return sorted(tests, key=lambda test: files.index(file_of(test)))


@dataclass(frozen=True, eq=False)
class Chosen:
    """A pytest plugin that runs these tests alone, in their order."""

    tests: Sequence[str]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Of those of the files, in which they are."""
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[test] for test in self.tests if test in by_name]


def file_of(test: str) -> str:
    """The file of a test, as pytest names both."""
    return test.split("::")[0]


def reached(module: str) -> Reached:
    """What the module's tests reach, from a run of them in a process of its own."""
    plugin = Reached(str(path_of(module)))
    with tempfile.NamedTemporaryFile("r") as notes:

        def write() -> None:
            sys.settrace(None)
            lines = {place: sorted(numbers) for place, numbers in plugin.lines.items()}
            Path(notes.name).write_text(json.dumps([lines, plugin.seconds]))

        child = os.fork()
        if child == 0:
            # Compiled anew: a file of bytecode may name another folder as its source.
            tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
            threading.settrace(plugin.trace)
            sys.settrace(plugin.trace)
            _run(Mutant(module, tree, "", range(0)), MODULES[module], plugin, write)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"The tests of {module} fail without a mutant: {', '.join(MODULES[module])}")
        lines, plugin.seconds = json.load(notes)
    plugin.lines.update({place: {*numbers} for place, numbers in lines.items()})
    return plugin


def is_found(mutant: Mutant, tests: Sequence[str]) -> bool:
    """Whether a test of these fails, in a process forked from this one."""
    if not tests:
        return False
    child = os.fork()
    if child == 0:
        _run(mutant, [*dict.fromkeys(map(file_of, tests))], Chosen(tests))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run(
    mutant: Mutant, tests: Sequence[str], plugin: object, after: Callable[[], object] = int
) -> None:
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    try:
        sys.meta_path.insert(0, Planted(mutant, path_of(mutant.module)))
        code = pytest.main(["-x", "-q", "-p", "no:xdist", "-W", REWRITES, *tests], plugins=[plugin])
        after()
    except BaseException:
        os._exit(1)
    os._exit(int(code))


def path_of(module: str) -> Path:
    """The file of a module of the library."""
    return SOURCE / "flexlora" / f"{module.replace('.', '/')}.py"


def preload() -> None:
    """Import what all tests import of other packages, once for all mutants."""
    import hypothesis  # noqa: F401
    import pyarrow  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def score(module: str, each: int | None, seed: int) -> tuple[int, list[str], list[str]]:
    """How many mutants were tried, which of them survived, and which are equivalent."""
    drawn = mutants(module, path_of(module).read_text(encoding="utf-8"))
    if each is not None and len(drawn) > each:
        drawn = random.Random(f"{seed} {module}").sample(drawn, each)
    tests = reached(module)
    living = [m.what for m in drawn if not is_found(m, tests.of(m.lines))]
    same = [what for what in living if is_equivalent(module, what)]
    return len(drawn) - len(same), [what for what in living if what not in same], same


def is_equivalent(module: str, what: str) -> bool:
    """Whether the mutant is known to do what its module does; lines may have moved since."""
    return what.split(": ", 1)[1] in EQUIVALENT.get(module, ())


def main() -> None:
    """Print each module's score and its survivors; exit code 1 below the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="such as wire.validate; default: all")
    parser.add_argument("--each", type=int, help="so many of each module; default: all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(SOURCE), str(ROOT / "tests")]
    preload()
    tried = survived = 0
    below = []
    for module in arguments.modules or MODULES:
        if not path_of(module).exists():
            sys.exit(f"There is no module {module}; correct MODULES in {__file__}.")
        count, living, same = score(module, arguments.each, arguments.seed)
        tried, survived = tried + count, survived + len(living)
        below += [module] if len(living) > (1 - TARGET) * count else []
        print(f"{module}: {count - len(living)} of {count} found", flush=True)
        for word, several in (("survived", living), ("equivalent", same)):
            for what in several:
                print(f"  {word}, {what}", flush=True)
    share = (tried - survived) / tried
    print(f"all: {tried - survived} of {tried} found, {100 * share:.1f} %; target {TARGET:.0%}")
    sys.exit(f"Below the target: {', '.join(below)}" if below else 0)


if __name__ == "__main__":
    main()
