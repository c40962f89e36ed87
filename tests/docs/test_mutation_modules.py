"""The modules and tests that benchmarks/mutation_score.py names exist, and have mutants."""

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
        assert path.is_file() and script.mutants(module, path.read_text(encoding="utf-8")), module
        assert all((script.ROOT / test).exists() for test in tests), tests
