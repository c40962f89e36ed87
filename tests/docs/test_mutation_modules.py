"""The modules and tests that benchmarks/mutation_score.py names exist, and have mutants."""

import ast
import importlib.util
import sys
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks" / "mutation_score.py"


def test_every_module_has_mutants_and_tests(monkeypatch):
    spec = importlib.util.spec_from_file_location("mutation_score", PATH)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # where dataclasses look for it
    spec.loader.exec_module(script)
    for module, tests in script.MODULES.items():
        path = script.path_of(module)
        places = script._places(ast.parse(path.read_text(encoding="utf-8")))
        assert any(change for place in places for change in script._changes(place)), module
        assert all((script.ROOT / test).exists() for test in tests), tests
