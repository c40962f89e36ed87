"""The program answers at once: heavy packages are imported by the commands that need them."""

import pytest

from support.commands import python

HEAVY = ("torch", "transformers", "numpy", "pydantic", "pyarrow", "plotly", "flwr", "ray", "rich")


@pytest.mark.parametrize("module", ["flexlora", "flexlora.cli.main"])
def test_no_heavy_package_is_imported_at_the_start(module, tmp_path):
    code = f"import {module}, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert python("-c", code, cwd=tmp_path).out.strip() == "[]"


LIGHT = ("--help", "-h", "--version", "methods", "configs", "init", "check --help", "run --help")


@pytest.mark.parametrize("words", LIGHT)
def test_light_commands_import_nothing_heavy(words, tmp_path):
    heavy = tuple(name for name in HEAVY if name != "rich")
    code = (
        "import atexit, sys\n"
        f"sys.argv = ['flexlora', *{words.split()!r}]\n"
        f"atexit.register(lambda: print([n for n in {heavy!r} if n in sys.modules]))\n"
        "from flexlora.cli.main import main\n"
        "main()\n"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.code == 0 and result.out.splitlines()[-1] == "[]"
