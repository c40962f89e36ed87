"""The program itself: help, version, and what becomes of a fault."""

import errno
import os

import pytest
import typer

import flexlora
from flexlora.cli import main, methods
from flexlora.errors import AdapterError, ConfigError, DataError, FlexloraError, ProtocolError
from support import commands

COMMANDS = [name for group in main.COMMANDS.values() for name in group]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function that runs ``flexlora words`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *words: commands.call(monkeypatch, capsys, *words)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_names_every_command(call, word):
    result = call(word)
    assert result.code == 0 and "clients with different" in result.out
    for name in COMMANDS:
        assert f"│ {name} " in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_fits_80_columns(call, name):
    long, short = call(name, "--help"), call(name, "-h")
    assert long == short and long.code == 0
    assert all(len(line) <= 80 for line in long.out.splitlines())
    # Rich cuts what does not fit and marks the place.
    assert "…" not in long.out


def test_every_option_is_explained():
    for name, command in typer.main.get_command(main.app).commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name}: {parameter.name}"


@pytest.mark.parametrize("option", ["--out", "--folder", "--output"])
def test_former_names_of_an_option_are_accepted(call, option):
    for command in ("run", "compare", "serve"):
        result = call(
            command, "missing.toml", option, "there", *["--insecure"] * (command[0] == "s")
        )
        assert "missing.toml cannot be read" in result.err
    assert option == "--out" or option not in call("run", "--help").out


def test_the_version(call):
    assert call("--version").out.strip() == f"flexlora {flexlora.__version__}"


def test_completion_is_offered(call, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = call("--show-completion", "bash")
    assert result.code == 0 and "COMP_WORDS" in result.out


@pytest.mark.parametrize(
    "kind", [FlexloraError, ConfigError, DataError, AdapterError, ProtocolError]
)
def test_a_fault_that_the_user_can_mend_is_one_sentence(call, monkeypatch, kind):
    def fails(name):
        raise kind("The value 3 is wrong; give 4.")

    monkeypatch.setattr(methods, "_describe", fails)
    assert call("methods", "flexlora") == (2, "", "error: The value 3 is wrong; give 4.\n")


@pytest.mark.parametrize("kind", [KeyError, ValueError, ImportError, FileNotFoundError])
def test_any_other_exception_is_a_fault_of_ours_and_says_so(call, monkeypatch, kind):
    def fails(name):
        raise kind("planted")

    monkeypatch.setattr(methods, "_describe", fails)
    code, out, err = call("methods", "flexlora")
    assert code == 1 and out == ""
    assert "Traceback (most recent call last)" in err and "planted" in err
    assert err.endswith(f"{main.BUG}\n")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EFBIG]
)
def test_what_the_system_refuses_is_one_sentence(call, monkeypatch, number):
    def fails(name):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(methods, "_describe", fails)
    code, _, err = call("methods", "flexlora")
    assert code == 2
    sentence = f"error: The system refused to read or write some/file: {os.strerror(number)}."
    assert err.startswith(sentence) and err.count("\n") == 1


def test_a_full_disk_without_a_file_name_is_one_sentence(call, monkeypatch):
    def fails(name):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(methods, "_describe", fails)
    code, _, err = call("methods", "flexlora")
    assert code == 2 and "None" not in err and "No space left on device" in err


# methods


def test_methods_is_a_table_of_80_columns(call):
    from flexlora.methods import names

    code, out, _ = call("methods")
    lines = out.splitlines()
    assert code == 0 and all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["name", "mixed", "ranks", "exact", "paper"]
    rows = {line.split()[0]: line.split() for line in lines[1 : 1 + len(names())]}
    assert sorted(rows) == names()
    assert rows["flexlora"][1:] == ["yes", "yes", "arXiv", "2402.11505"]
    assert rows["fedit"][1:] == ["no", "no", "arXiv", "2305.05644"]
    assert rows["raflora"][1:5] == ["yes", "by", "component", "arXiv"]


def test_one_method_is_described_with_its_options(call):
    code, out, _ = call("methods", "flexlora")
    assert code == 0 and "arXiv 2402.11505" in out
    assert "accuracy = 'bounded'" in out and "mixed ranks:   yes" in out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("methods flexl", ["flexlora"]),
        ("compare c.toml --methods flexlora,hetl", ["flexlora,hetlora"]),
        ("configs qui", ["quickstart"]),
        ("che", ["check"]),
    ],
)
def test_a_shell_completes_commands_methods_and_configs(tmp_path, words, offered):
    variables = {"_FLEXLORA_COMPLETE": "complete_bash", "COMP_WORDS": f"flexlora {words}"}
    variables["COMP_CWORD"] = str(len(words.split()))
    program = "from flexlora.cli.main import main; main()"
    done = commands.python("-c", program, cwd=tmp_path, **variables)
    assert done.out.split() == offered
