"""How many faults planted in the modules that check untrusted bytes do their own tests find?

    python benchmarks/mutation_score.py [--each 40] [--seed 0] [MODULE ...]

A mutant is the module with one change: a comparison turned or moved by one, a number plus one,
``and`` for ``or``, a ``not`` or a ``raise`` left out, plus for minus, True for False. Of each
module ``--each`` mutants are drawn with the seed and run against the module's tests until the
first that fails. A mutant that no test notices has survived; each is printed. A mutant that hangs
counts as found. Some mutants are equivalent to the module: the score's ceiling is below 100 %.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    "deployment.flower.gate_rules": ("tests/deployment/flower/test_gate.py",),
    "deployment.flower.bodies": ("tests/deployment/flower/test_gate_attacks.py",),
}
"""The security-critical modules and the tests that are their own, the quickest first."""

SECONDS = 180
"""A mutant whose tests take longer hangs."""

REWRITES = "ignore::pytest.PytestAssertRewriteWarning"
"""Of plug-ins that are imported already."""

TARGET = 0.9

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
            found.append(Mutant(module, ast.fix_missing_locations(tree), line))
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


def is_found(mutant: Mutant | None, tests: Sequence[str]) -> bool:
    """Whether a test of these fails, in a process forked from this one; None is no mutant."""
    child = os.fork()
    if child == 0:
        _run(mutant, tests)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run(mutant: Mutant | None, tests: Sequence[str]) -> None:
    import pytest

    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    try:
        if mutant is not None:
            sys.meta_path.insert(0, Planted(mutant, path_of(mutant.module)))
        code = pytest.main(["-x", "-q", "-p", "no:xdist", "-W", REWRITES, *tests])
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
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def score(module: str, each: int, seed: int) -> tuple[int, list[str]]:
    """How many mutants were tried, and which of them survived."""
    drawn = mutants(module, path_of(module).read_text(encoding="utf-8"))
    if len(drawn) > each:
        drawn = random.Random(f"{seed} {module}").sample(drawn, each)
    return len(drawn), [m.what for m in drawn if not is_found(m, MODULES[module])]


def main() -> None:
    """Print each module's score and its survivors; exit code 1 below the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="such as wire.validate; default: all")
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(SOURCE), str(ROOT / "tests")]
    preload()
    tried = survived = 0
    for module in arguments.modules or MODULES:
        if not path_of(module).exists():
            sys.exit(f"There is no module {module}; correct MODULES in {__file__}.")
        if is_found(None, MODULES[module]):
            sys.exit(f"The tests of {module} fail without a mutant: {', '.join(MODULES[module])}")
        count, living = score(module, arguments.each, arguments.seed)
        tried, survived = tried + count, survived + len(living)
        print(f"{module}: {count - len(living)} of {count} found", flush=True)
        for what in living:
            print(f"  survived, {what}", flush=True)
    share = (tried - survived) / tried
    print(f"all: {tried - survived} of {tried} found, {100 * share:.1f} %; target {TARGET:.0%}")
    sys.exit(share < TARGET)


if __name__ == "__main__":
    main()
