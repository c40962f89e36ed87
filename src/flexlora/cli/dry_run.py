"""A run without training: what it would do and cost, and two of its prompts."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from flexlora.cli.progress import Display
from flexlora.cli.sentences import notices
from flexlora.journal import counted, duration, size

if TYPE_CHECKING:
    from flexlora.config import Experiment
    from flexlora.data import Tokens
    from flexlora.federation.prepared import PreparedRun
    from flexlora.federation.rehearsal import Rehearsal

START, END = ">>>", "<<<"
"""What stands around the part of an example that is trained."""

_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:s|min|h|B|KiB|MiB|GiB)\b)")


def dry_run(settings: Experiment, display: Display) -> None:
    """Prepare a run as it would be, and print what it would do; nothing is written."""
    from flexlora.federation import rehearsal, setup

    console = display.console
    prepared = setup.prepare(settings, meter=display.meter)
    display.meter.begin("measuring one local step of each rank type")
    measured = rehearsal.rehearse(prepared)
    display.pause()
    for line in _facts(prepared, measured):
        _print(console, line)
    console.print(_table(measured))
    for note in notices(prepared.notices):
        _print(console, note)
    for client, tokens in rehearsal.sample_tokens(prepared, 2):
        _print_prompt(console, prepared, client, tokens)
    console.print("\nThis was a dry run: nothing was trained, and no run folder was made.")


def _facts(prepared: PreparedRun, measured: Rehearsal) -> Iterator[str]:
    federation, rows = prepared.experiment.federation, prepared.runtime.rows
    yield (
        f"method:      {prepared.method.title}, {counted(len(prepared.shapes), 'adapted module')}"
    )
    yield (
        f"clients:     {len(prepared.clients)} that train on "
        f"{counted(sum(len(rows[id]) for id in prepared.clients), 'row')}, "
        f"{len(prepared.unseen)} held out"
    )
    yield (
        f"rounds:      {federation.rounds}, {counted(measured.cohort, 'client')} in each; "
        f"about {size(measured.bytes_up)} up and {size(measured.bytes_down)} down in each"
    )
    seen = sum(question.seen for question in prepared.questions)
    yield (
        f"evaluation:  {counted(len(prepared.questions), 'test row')} ({seen} of clients that "
        f"train, {len(prepared.questions) - seen} of held-out clients), "
        f"evaluated {counted(measured.evaluations, 'time')}"
    )
    yield (
        f"time:        about {duration(measured.seconds)} on this machine: rounds of "
        f"{duration(measured.round_seconds, 1)} and evaluations of "
        f"{duration(measured.evaluation_seconds, 1)}. An estimate from one local step of each "
        "rank type and a few answers, without the server's step"
    )


def _table(measured: Rehearsal) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("rank type", overflow="fold")
    for heading in ("clients", "rank", "rows", "steps", "up", "down", "step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in measured.types:
        table.add_row(
            each.name,
            str(each.clients),
            "/".join(map(str, each.ranks)),
            _range(each.examples),
            _range(each.steps),
            size(each.bytes_up),
            size(each.bytes_down),
            duration(each.step_seconds, 1),
        )
    return table


def _range(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"


def _print_prompt(console: Console, prepared: PreparedRun, client: str, tokens: Tokens) -> None:
    trained = tokens.ids if prepared.experiment.training.prompt_loss else tokens.response
    before = tokens.ids[: len(tokens) - len(trained)]
    console.print()
    _print(
        console,
        f"A row of client {client!r}, {counted(len(tokens), 'token')}. The loss is on the "
        f"{len(trained)} between {START} and {END}:",
    )
    text = f"{_text(prepared, before.tolist())}{START}{_text(prepared, trained.tolist())}{END}"
    indented = textwrap.indent(text, "  | ", lambda _: True)
    console.print(indented, highlight=False, markup=False, soft_wrap=True)


def _text(prepared: PreparedRun, ids: Sequence[int]) -> str:
    decoded = prepared.base.tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(decoded)


def _print(console: Console, line: str) -> None:
    indent = " " * (13 if line[:13].rstrip().endswith(":") else 2)
    # A number keeps its unit on its line.
    joined = _BEFORE_UNIT.sub("\u00a0", line)
    text = textwrap.fill(joined, max(console.width, 20), subsequent_indent=indent)
    console.print(text.replace("\u00a0", " "), highlight=False, markup=False)
