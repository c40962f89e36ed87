"""The command that evaluates an adapter or the base model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexlora.cli.configs import refuse_missing
from flexlora.cli.options import Changes, last_adapter, run_folder, stored
from flexlora.cli.outputs import output_file
from flexlora.cli.sentences import notices
from flexlora.errors import ConfigError
from flexlora.journal import counted

if TYPE_CHECKING:
    from flexlora.cli.progress import Display

_SCORES = (
    *("client", "category", "seen", "examples", "rouge_l", "exact_match"),
    *("loss_total", "loss_tokens"),
)
_ANSWERS = (
    *("population", "client", "category", "prompt", "reference", "answer", "rouge_l"),
    "exact_match",
)
"""The keys of each object in the two files that this command writes."""


def evaluate(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.toml|DIR",
            help="The config file, or a run's folder for its config and last adapter; default: "
            "the last run.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A PEFT adapter; default: the run's, or else the base model."
        ),
    ] = None,
    changes: Changes = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the scores to a JSON file.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every answer to a JSON Lines file.")
    ] = None,
) -> None:
    """Evaluate an adapter, or the base model, on the test rows of a config.

    flexlora eval RUN_DIR evaluates the last adapter of a run.
    """
    from rich.console import Console

    from flexlora.cli.progress import Display

    # The scores alone are the output.
    with Display(Console(stderr=True), lines=False) as display:
        rows = _evaluated(path, adapter, changes or (), out, answers, display)
    _print_scores(rows)


def _evaluated(
    path: Path | None,
    adapter: Path | None,
    changes: Sequence[str],
    out: Path | None,
    answers: Path | None,
    display: Display,
) -> list[dict[str, Any]]:
    """The scores of an adapter, written to the files that are named."""
    from flexlora import peft_format
    from flexlora.evaluation import evaluate_with_answers
    from flexlora.federation import compose, evaluations, setup
    from flexlora.lowrank import Adapter
    from flexlora.storage import write_atomically

    if path is None or path.is_dir():
        folder = run_folder(path, "eval")
        settings = stored(folder, changes)
        adapter = adapter or last_adapter(folder)
        print(f"adapter: {adapter}")
    else:
        refuse_missing(path)
        settings = compose.load(path, changes)
    loaded = peft_format.read(adapter).adapter if adapter else Adapter({})
    if out is not None:
        output_file(out, "--out", _SCORES)
    if answers is not None:
        output_file(answers, "--answers", _ANSWERS)
        if out is not None and out.resolve() == answers.resolve():
            raise ConfigError(f"--out and --answers are both {out}; give them two files.")
    settings.evaluation.require_engine()
    ready, meter = setup.prepare(settings, train=False, meter=display.meter), display.meter
    for line in notices(ready.notices):
        print(line, file=sys.stderr)
    questions = ready.questions
    meter.begin(f"evaluating {counted(len(questions), 'answer')}", len(questions))
    (result,) = evaluate_with_answers(
        ready.base, [loaded], questions, ready.prompt, settings.evaluation, meter
    )
    if out:
        write_atomically(out, json.dumps(result.rows, indent=1).encode())
    if answers:
        lines = [json.dumps(evaluations.line(answer)) + "\n" for answer in result.answers]
        write_atomically(answers, "".join(lines).encode())
    return result.rows


def _print_scores(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from flexlora.journal import mean_scores

    table = Table("", box=None)
    for heading in ("clients", "rows", "Rouge-L", "exact match", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault("seen clients" if row["seen"] else "unseen clients", []).append(row)
        groups.setdefault(f"  {row['category'] or 'no category'}", []).append(row)
    for name in sorted(groups, key=lambda name: (name.startswith(" "), name)):
        mean = mean_scores(groups[name])
        table.add_row(
            name,
            str(len({row["client"] for row in groups[name]})),
            f"{mean['examples']:.0f}",
            f"{mean['rouge_l']:.1f}",
            f"{mean['exact_match']:.1f} %",
            f"{mean['loss']:.3f}",
        )
    Console().print(table)
