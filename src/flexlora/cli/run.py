"""The commands that train and evaluate in this process or on Ray: run, compare, eval."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexlora.cli.options import (
    Changes,
    ConfigFile,
    finished_rounds,
    last_adapter,
    make_folder,
    refuse_file,
    run_folder,
    stored,
)
from flexlora.errors import ConfigError

if TYPE_CHECKING:
    from flexlora.config import Experiment
    from flexlora.federation.compare import Cell
    from flexlora.federation.ray.cluster import Cluster
    from flexlora.journal import Event

STOPPED = 130
"""The exit code of a command that was interrupted, as shells have it."""


OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The run's folder; default: run.folder or runs/CONFIG."
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="[DIR]", help="Resume an interrupted run; default: the last in runs."),
]
Plugin = Annotated[
    Path | None,
    typer.Option(metavar="FILE.py", help="Use the method or other plug-in in this file."),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Exact SVDs; the same as --set method.accuracy='exact'."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Train in N processes, started with Ray."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Train on a Ray cluster: HOST:PORT, ray://... or auto."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show clients, bytes, time and two prompts; train nothing."),
]


def run(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The config file.")
    ] = None,
    changes: Changes = None,
    folder: OutFolder = None,
    dry: DryRun = False,
    resume: Resume = None,
    plugin: Plugin = None,
    exact: Exact = False,
    workers: Workers = None,
    ray: RayAddress = None,
) -> None:
    """Simulate a federation, or resume an interrupted simulation."""
    if dry and (resume is not None or workers is not None or ray is not None):
        raise ConfigError("--dry-run trains nothing: leave out --resume, --workers and --ray.")
    if resume is not None:
        if path is not None or folder is not None or exact or plugin:
            raise ConfigError(
                "--resume takes the folder of a run, --set, --workers and --ray, and nothing else."
            )
        for change in changes or ():
            _refuse_when_resumed(change)
        settings = stored(resume, changes or ())
        if not _has_finished(settings, resume):
            with _cluster(settings, workers, ray) as cluster:
                run_and_report(settings, resume, resume=True, cluster=cluster)
        return
    if path is None:
        raise ConfigError("Give a CONFIG.toml, or --resume DIR.")
    from flexlora.federation import compose

    forced = ["method.accuracy='exact'"] if exact else []
    settings = compose.load(path, [*(changes or ()), *forced])
    if plugin is not None:
        settings = compose.with_plugin(settings, plugin)
    target = folder or Path(settings.run.folder or f"runs/{path.stem}")
    _refuse_existing(target)
    if dry:
        from flexlora.cli.dry_run import dry_run

        refuse_file(target, "--out")
        dry_run(settings)
        return
    with _cluster(settings, workers, ray) as cluster:
        run_and_report(settings, target, cluster=cluster)


def compare(
    path: ConfigFile,
    names: Annotated[
        str, typer.Option("--methods", metavar="all|A,B,C", help="List: flexlora methods.")
    ] = "all",
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Number of seeds, from the config's seed on.")
    ] = 3,
    changes: Changes = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="METHOD.KEY=VALUE", help="Set an option of a method."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The comparison's folder; default: the run's with -compare.",
        ),
    ] = None,
) -> None:
    """Compare methods on one config, all else being equal.

    The same command resumes an interrupted comparison.
    """
    from flexlora.federation import compare, compose

    settings = compose.load(path, changes or ())
    target = output or Path(f"{settings.run.folder or f'runs/{path.stem}'}-compare")
    cells = compare.plan(settings, compare.chosen(names), seeds, target, options or ())
    states = _compare(cells, target)
    if "open" in states:
        print("stopped; resume with the same command", file=sys.stderr)
        raise SystemExit(STOPPED)
    if "failed" in states or ("refused" in states and names.strip() != compare.ALL):
        raise typer.Exit(1)


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
    from flexlora import peft_format
    from flexlora.cli import progress
    from flexlora.evaluation import evaluate_with_answers
    from flexlora.federation import compose, evaluations, setup
    from flexlora.lowrank import Adapter
    from flexlora.storage import write_atomically

    if path is None or path.is_dir():
        folder = run_folder(path, "eval")
        settings = stored(folder, changes or ())
        adapter = adapter or last_adapter(folder)
        print(f"adapter: {adapter}")
    else:
        settings = compose.load(path, changes or ())
    loaded = peft_format.read(adapter).adapter if adapter else Adapter({})
    for file, option in ((out, "--out"), (answers, "--answers")):
        if file is not None:
            _prepare_file(file, option)
    ready = setup.prepare(settings, train=False)
    for line in progress.notices(ready.notices):
        print(line, file=sys.stderr)
    (result,) = evaluate_with_answers(
        ready.base, [loaded], ready.questions, ready.prompt, settings.evaluation
    )
    if out:
        write_atomically(out, json.dumps(result.rows, indent=1).encode())
    if answers:
        lines = [json.dumps(evaluations.line(answer)) + "\n" for answer in result.answers]
        write_atomically(answers, "".join(lines).encode())
    _print_scores(result.rows)


def run_and_report(
    settings: Experiment,
    folder: Path,
    resume: bool = False,
    cluster: Cluster | None = None,
) -> list[Event]:
    """Run a federation, show its events and write its report; returns the events.

    If it is interrupted, the report shows the rounds so far, and the command to resume is printed.
    """
    from rich.console import Console

    from flexlora.cli import progress
    from flexlora.federation import checkpoint, rounds, setup
    from flexlora.reporting import page, tracker, trackers
    from flexlora.storage import write_atomically

    settings = cluster.settings(settings) if cluster else settings
    if not resume:
        make_folder(folder, "--out")
    # Refused before the data is read, if another version wrote it.
    point = checkpoint.load(folder) if resume else None
    console, followers = Console(), trackers.of(settings.run.trackers, folder)
    console.print("reading the data and the model", style="dim")
    ready = setup.prepare(settings)
    content = (settings if resume else _with_threads(settings)).model_dump_json(indent=1)
    write_atomically(folder / "config.json", content.encode())
    done, at_once = (point.round, point.clients_at_once) if point else (0, None)
    turns = (settings.federation.rounds - done) * min(ready.cohort_size, len(ready.clients))
    transport = cluster.federation(ready, folder, at_once) if cluster else nullcontext()
    try:
        with (
            transport as federation,
            closing(
                tracker.following(rounds.run(ready, folder, federation, resume), followers, folder)
            ) as followed,
        ):
            events = progress.show(followed, console, turns)
    except KeyboardInterrupt:
        page.write(folder)
        print(f"\nstopped; resume with: flexlora run --resume {folder}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    console.print(f"adapter: {events[-1]['adapter']}", soft_wrap=True)
    console.print(f"report:  {page.write(folder)}", soft_wrap=True)
    return events


def _cluster(
    settings: Experiment, workers: int | None, address: str | None
) -> AbstractContextManager[Cluster | None]:
    """The Ray cluster to train on; None without ``--workers`` and ``--ray``."""
    if workers is None and address is None:
        return nullcontext()
    from flexlora.federation import ray

    if address is None:
        ray.require_token()
    from flexlora.federation.ray import cluster

    return cluster.cluster(settings, workers, address)


def _compare(cells: Sequence[Cell], target: Path) -> set[str]:
    """Run and watch the cells, write what they show, also after a stop; the states they end in."""
    from rich.console import Console

    from flexlora.cli import progress
    from flexlora.federation import compare
    from flexlora.reporting import comparison, tracker, trackers

    console, outcomes = Console(), list[compare.Outcome]()
    # All before the first cell begins, so that a missing package is reported at once.
    followers = {c.folder: trackers.of(c.experiment.run.trackers, c.folder) for c in cells}

    def watch(cell: Cell, events: Iterator[Event], turns: int) -> None:
        name = f"\n{len(outcomes) + 1} of {len(cells)}: {cell.method}, seed {cell.seed}"
        console.print(name, style="bold")
        at = cell.folder
        with closing(tracker.following(events, followers[at], at)) as followed:
            progress.show(followed, console, turns)

    try:
        for outcome in compare.run(cells, watch):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        outcomes += [compare.Outcome(cell, "open") for cell in cells[len(outcomes) :]]
    for shown in comparison.printed(comparison.write(target, outcomes)):
        console.print(shown, highlight=False, markup=False)
    for name in compare.FILES:
        print(f"written: {target / name}")
    return {outcome.state for outcome in outcomes}


def _with_threads(settings: Experiment) -> Experiment:
    """The settings with the number of threads in use: other numbers round otherwise."""
    import torch

    threads = settings.run.model_copy(update={"threads": torch.get_num_threads()})
    return settings.model_copy(update={"run": threads})


def _prepare_file(file: Path, option: str) -> None:
    """Make the folder of a file that an option names."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give {option} the name of a file.")
    make_folder(file.resolve().parent, option)


def _refuse_when_resumed(change: str) -> None:
    if not re.match(r"(run\.|federation\.rounds *=)", change.strip()):
        raise ConfigError(
            f"--set {change}: of a run that is resumed only federation.rounds and the section run "
            "may change; start a new run for another value."
        )


def _has_finished(settings: Experiment, folder: Path) -> bool:
    """Whether a run to resume has done all its rounds; then says so, and how to add more."""
    done, wanted = finished_rounds(folder), settings.federation.rounds
    if done > wanted:
        raise ConfigError(
            f"federation.rounds is {wanted}, but the run in {folder} has finished {done} rounds; "
            "give a larger number."
        )
    if done == wanted:
        print(f"The run in {folder} has finished all {done} rounds. For more:")
        print(f"flexlora run --resume {folder} --set federation.rounds={2 * done}")
    return done == wanted


def _refuse_existing(folder: Path) -> None:
    from flexlora.federation import checkpoint

    if (folder / checkpoint.POINTER).exists():
        raise ConfigError(
            f"{folder} already holds a run; resume it with: flexlora run --resume {folder}, or "
            "give another --out."
        )


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
