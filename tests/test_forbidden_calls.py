"""Nothing in src/flexlora runs code that comes from outside: no pickle, eval, exec or the like.

A check of the syntax trees, not of the text: names in comments and sentences do not count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexlora

SOURCE = Path(flexlora.__file__).parent

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle", "joblib"}
"""Modules that make objects, and so run code, from bytes."""

BUILTINS = {"eval", "exec", "compile", "__import__"}

CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "code.interact",
    "runpy.run_path",
    "runpy.run_module",
}

ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}
"""Arguments that must not be true; ``numpy.load`` must say so."""


def aliases(tree: ast.AST) -> dict[str, str]:
    """The full names of what a file imports, by the names that it uses."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                whole = each.name if each.asname else each.name.split(".")[0]
                names[each.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """What is called, such as ``numpy.load`` for ``np.load``; "" for anything but a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def forbidden(text: str) -> Iterator[str]:
    """What a file must not do, with the lines."""
    tree = ast.parse(text)
    names = aliases(tree)
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        yield from (f"{node.lineno}: {m}" for m in modules if m.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        arguments = {argument.arg for argument in node.keywords}
        if name == "numpy.load" and "allow_pickle" not in arguments:
            yield f"{node.lineno}: {name}"
        if name in CALLS or name in BUILTINS or name.removeprefix("builtins.") in BUILTINS:
            yield f"{node.lineno}: {name}"
        for argument in node.keywords:
            is_false = isinstance(argument.value, ast.Constant) and argument.value.value is False
            if argument.arg in ARGUMENTS and not is_false:
                yield f"{node.lineno}: {argument.arg}"


def test_no_code_from_outside_is_run():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = {
        f"{file.relative_to(SOURCE)}:{each}"
        for file in files
        for each in forbidden(file.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import pickle", "1: pickle"),
        ("from pickle import loads as json_loads", "1: pickle"),
        ("def f():\n    import dill", "2: dill"),
        ("import numpy as np\nnp.load('x')", "2: numpy.load"),
        ("from torch import load as read\nread('x')", "2: torch.load"),
        ("import torch\ntorch.load('x', weights_only=True)", "2: torch.load"),
        ("eval('1')", "1: eval"),
        ("import builtins\nbuiltins.exec('1')", "2: builtins.exec"),
        ("import yaml\nyaml.load('x')", "2: yaml.load"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "2: shell"),
        ("f(trust_remote_code=flag)", "1: trust_remote_code"),
        ("import numpy\nnumpy.lib.format.read_array(f, allow_pickle=True)", "2: allow_pickle"),
    ],
)
def test_the_check_finds(text, line):
    assert list(forbidden(text)) == [line]


def test_the_check_leaves_other_things_alone():
    lines = [
        *("import re, numpy as np", "np.load(f, allow_pickle=False)", "re.compile('a')"),
        *("'pickle.loads'", "model.eval()", "f(shell=False)  # eval(x)"),
    ]
    assert list(forbidden("\n".join(lines))) == []
