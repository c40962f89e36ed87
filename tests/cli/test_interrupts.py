"""An interrupt in the first seconds, while the program imports what it needs, or in the last."""

import tomllib

import pytest

from flexlora.cli.interrupts import STOPPED
from support.commands import SOURCE, python

INTERRUPTED_BY_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
sys.argv = ["flexlora", "methods"]
runpy.run_module("flexlora", run_name="__main__")
"""
"""``flexlora methods``, with an interrupt when a module is about to be imported."""


@pytest.mark.parametrize("module", ["flexlora.cli.main", "typer", "flexlora.cli.watch"])
def test_an_interrupt_during_the_imports_is_silent(module, tmp_path):
    assert python("-c", INTERRUPTED_BY_IMPORT.format(module=module), cwd=tmp_path) == (
        STOPPED,
        "",
        "",
    )


def test_an_interrupt_during_the_imports_of_a_command_is_a_word(tmp_path):
    module = "rich.table"
    result = python("-c", INTERRUPTED_BY_IMPORT.format(module=module), cwd=tmp_path)
    assert result == (STOPPED, "", "\nstopped\n")


def test_an_interrupt_at_the_end_is_silent(tmp_path):
    code = (
        "import atexit, os, signal, sys\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['flexlora', '--version']\n"
        "from flexlora.__main__ import main\n"
        "main()\n"
    )
    result = python("-u", "-c", code, cwd=tmp_path)
    assert (result.code, result.err) == (STOPPED, "") and result.out.startswith("flexlora ")


def test_a_process_that_ignores_interrupts_goes_on_doing_so(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    result = python("-c", code + INTERRUPTED_BY_IMPORT.format(module="typer"), cwd=tmp_path)
    assert result.code == 0 and "flexlora" in result.out and result.err == ""


def test_the_installed_program_begins_where_interrupts_are_silent():
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"]["flexlora"] == "flexlora.__main__:main"
