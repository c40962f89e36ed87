"""The ``flexlora`` program: its commands by group, and what becomes of a fault."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flexlora.cli import (
    adapters,
    attack,
    configs,
    demo,
    demo_flower,
    deploy,
    evaluate,
    init,
    laws,
    methods,
    run,
    train,
    watch,
)
from flexlora.cli.interrupts import STOPPED, raised
from flexlora.cli.options import with_last_run
from flexlora.errors import sentence
from flexlora.storage.untrusted import printable_lines

BUG = (
    "This is a fault of flexlora or of a plug-in, not of your input; please report it with the "
    "traceback above."
)

COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "Simulation": {
        "init": init.init,
        "configs": configs.list_configs,
        "run": run.run,
        "compare": run.compare,
        "attack": attack.attack,
        "eval": evaluate.evaluate,
        "methods": methods.list_methods,
        "laws": laws.laws,
        "report": watch.report,
        "watch": watch.watch,
        "demo": demo.demo,
    },
    "PEFT adapters": {
        "train": train.train,
        "merge": adapters.merge,
        "check": adapters.check,
    },
    "Clients on other machines": {
        "keys": deploy.make_keys,
        "serve": deploy.serve,
        "join": deploy.join,
        "demo-flower": demo_flower.show_demo,
    },
}
"""Every command by its name, in the groups of ``flexlora --help``."""

_FORMER_OPTIONS = {"folder": "out", "output": "out"}
"""Former names of options, which are accepted still."""

_LONGEST = 2000
"""Characters of an error; one that is longer is cut in the middle, as the remedy is at its end."""

app = typer.Typer(
    help="Federated LoRA fine-tuning of language models across clients with different LoRA ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: _FORMER_OPTIONS.get(word, word),
    },
)

_MISUSED: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""What is raised for wrong words: click's exception, or that of the click which newer versions of
typer have in themselves; both are bases of the class that typer offers."""


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which an interrupt ends with a word and the exit code that shells expect."""

    @functools.wraps(command)
    def run(*words: Any, **options: Any) -> Any:
        try:
            with raised():
                _refuse_no_paths(options)
                return command(*words, **options)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(STOPPED) from None

    return run


def _refuse_no_paths(options: Mapping[str, Any]) -> None:
    """Refuse paths at which nothing can ever be, such as a link to itself."""
    from flexlora.storage import expanded

    for name, value in options.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                expanded(path, f"--{name}")


for _group, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(_interruptible(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        from flexlora import __version__

        print(f"flexlora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """The options of the program itself."""


def main() -> None:
    """Run the command line.

    A fault that the user can mend is one message and exit code 2. Any other exception is a fault
    of flexlora: its traceback, a line that says so, and exit code 1.
    """
    try:
        code = app(with_last_run(sys.argv[1:]), prog_name="flexlora", standalone_mode=False)
        sys.stdout.flush()
    except _MISUSED as error:
        _end_misused(error)
    except BrokenPipeError:
        _close_output()  # whoever read it, such as `head`, has read enough
        raise SystemExit(1) from None
    except Exception as error:
        if said := sentence(error):
            _fail(said)
        traceback.print_exc()
        print(BUG, file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    """Print what is wrong, without what would not print and at a length that can be read."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    print(f"error: {printable_lines(message)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _close_output()
    raise SystemExit(2)


def _close_output() -> None:
    """Let nothing more be written to the output, which Python would try at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # it has no file


def _end_misused(error: Exception) -> NoReturn:
    """Say in one sentence what is wrong with the words of a command; no words ask for help."""
    misused: Any = error
    if type(error).__name__ == "NoArgsIsHelpError":
        print(misused.message)
        raise SystemExit(misused.exit_code)
    context = getattr(misused, "ctx", None)
    command = context.command_path if context else "flexlora"
    _fail(f"{misused.format_message().rstrip('.')}; see: {command} --help")
