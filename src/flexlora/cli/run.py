"""The commands that train and evaluate in this process or on Ray: run, compare, eval."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.cli.configs import refuse_missing
from flexlora.cli.interrupts import STOPPED
from flexlora.cli.methods import completed
from flexlora.cli.options import (
    Changes,
    ConfigFile,
    alone_in,
    finished_rounds,
    refuse_file,
    stored,
)
from flexlora.cli.outputs import refuse_foreign_config, refuse_parts_of_runs
from flexlora.errors import ConfigError
from flexlora.storage import locked

if TYPE_CHECKING:
    from flexlora.cli.progress import Display
    from flexlora.config import Experiment
    from flexlora.federation.compare import Cell
    from flexlora.federation.prepared import PreparedRun
    from flexlora.federation.ray.cluster import Cluster
    from flexlora.journal import Event

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
    from flexlora.cli.progress import Display

    if dry and (resume is not None or workers is not None or ray is not None):
        raise ConfigError("--dry-run trains nothing: leave out --resume, --workers and --ray.")
    if resume is not None:
        if path is not None or folder is not None or exact or plugin:
            raise ConfigError(
                "--resume takes the folder of a run, --set, --workers and --ray, and nothing else."
            )
        for change in changes or ():
            _refuse_when_resumed(change)
        with (
            Display() as display,
            stoppable(resume, f"flexlora run --resume {resume}"),
            locked(resume),
        ):
            settings = stored(resume, changes or ())
            if not _has_finished(settings, resume):
                with _cluster(settings, workers, ray) as cluster:
                    run_and_report(settings, resume, display, resume=True, cluster=cluster)
        return
    if path is None:
        raise ConfigError("Give a CONFIG.toml, or --resume DIR; flexlora init writes a config.")
    refuse_missing(path)
    forced = ["method.accuracy='exact'"] if exact else []
    with Display() as display:
        settings = _loaded(path, [*(changes or ()), *forced], plugin)
        target = folder or Path(settings.run.folder or f"runs/{path.stem}")
        _refuse_existing(target)  # before a folder or a lock is made, and again when it is locked
        if dry:
            from flexlora.cli.dry_run import dry_run

            refuse_file(target, "--out")
            dry_run(settings, display)
            return
        command = f"flexlora run --resume {target}"
        with stoppable(target, command), alone_in(target, "--out"):
            _refuse_existing(target)
            with _cluster(settings, workers, ray) as cluster:
                run_and_report(settings, target, display, cluster=cluster)


def _loaded(path: Path, changes: Sequence[str], plugin: Path | None) -> Experiment:
    """The experiment of a config file, with the plug-in of a Python file if one is given."""
    from flexlora.federation import compose

    settings = compose.load(path, changes)
    return settings if plugin is None else compose.with_plugin(settings, plugin)


Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="all|A,B,C",
        help="List: flexlora methods. Default: compare.methods, or all.",
        autocompletion=completed,
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Number of seeds, from the config's on. Default: compare.seeds, or 3."
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METHOD.KEY=VALUE",
        help="Set an option of a method, or a setting for it: hetlora.training.learning_rate=1e-3.",
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=A,B", help="Compare these values: ranks.rank=4,8,16."),
]
ComparisonFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The comparison's folder; default: the run's with -compare."
    ),
]


def compare(
    path: ConfigFile,
    names: Methods = None,
    seeds: Seeds = None,
    changes: Changes = None,
    options: MethodOptions = None,
    vary: Vary = None,
    output: ComparisonFolder = None,
) -> None:
    """Compare methods, and settings, on one config, all else being equal.

    The same command resumes an interrupted comparison.
    """
    from flexlora.cli.progress import Display

    refuse_missing(path)
    with Display() as display:
        from dataclasses import replace

        from flexlora.config import read_comparison, varied
        from flexlora.federation import compare, compose

        settings = compose.load(path, changes or ())
        compared = read_comparison(path)
        if vary:
            compared = replace(compared, variants=varied(vary))
        chosen = names or ",".join(compared.methods) or compare.ALL
        count = compared.seeds or 3 if seeds is None else seeds
        target = output or Path(f"{settings.run.folder or f'runs/{path.stem}'}-compare")
        methods = compare.chosen(chosen)
        planned = (settings, methods, count, target, options or (), compared)
        refuse_parts_of_runs(target, "--out")
        compare.plan(*planned)  # refused before a folder is made
        with alone_in(target, "--out"):
            states = _compare(compare.plan(*planned), target, display)
    if "open" in states:
        print("stopped; resume with the same command", file=sys.stderr)
        raise SystemExit(STOPPED)
    if "failed" in states or ("refused" in states and chosen.strip().lower() != compare.ALL):
        raise typer.Exit(1)


def run_and_report(
    settings: Experiment,
    folder: Path,
    display: Display,
    resume: bool = False,
    cluster: Cluster | None = None,
) -> list[Event]:
    """Run a federation, show its events and write its report; returns the events.

    If it is interrupted, the report shows the rounds so far. For a caller that has the lock of
    the folder, which exists.
    """
    from flexlora.federation import checkpoint, compose, rounds, setup
    from flexlora.reporting import page, tracker, trackers

    settings = cluster.settings(settings) if cluster else settings
    # Refused before the data is read, if another version wrote it.
    point = checkpoint.load(folder) if resume else None
    followers = trackers.of(settings.run.trackers, folder)
    settings.evaluation.require_engine()
    ready = setup.prepare(settings, meter=display.meter)
    compose.store(settings if resume else _as_here(settings, ready), folder)
    for view in (f"{one.title}: {one.view}" for one in followers if one.view):
        display.console.print(view, soft_wrap=True, highlight=False, markup=False)
    at_once = point.clients_at_once if point else None
    transport = cluster.federation(ready, folder, at_once) if cluster else nullcontext()
    try:
        with transport as federation:
            events = rounds.run_locked(ready, folder, federation, resume, display.meter)
            with closing(tracker.following(events, followers, folder)) as followed:
                shown = display.follow(followed)
        display.meter.begin("writing the report")
        report = page.write(folder)
    except KeyboardInterrupt:
        display.meter.begin("writing the report of the rounds so far")
        page.write(folder)
        raise
    display.meter.end()
    display.console.print(f"adapter: {shown[-1]['adapter']}", soft_wrap=True, highlight=False)
    display.console.print(f"report:  {report}", soft_wrap=True, highlight=False)
    return shown


@contextmanager
def stoppable(folder: Path, command: str) -> Iterator[None]:
    """Let an interrupted block end with the ``command`` that resumes the runs in ``folder``."""
    try:
        yield
    except KeyboardInterrupt:
        from flexlora.federation import checkpoint

        is_begun = any(folder.rglob(checkpoint.POINTER))
        text = f"resume with: {command}" if is_begun else "nothing was trained yet"
        print(f"\nstopped; {text}", file=sys.stderr)
        raise SystemExit(STOPPED) from None


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


def _compare(cells: Sequence[Cell], target: Path, display: Display) -> set[str]:
    """Run and watch the cells, write what they show, also after a stop; the states they end in."""
    from flexlora.federation import compare
    from flexlora.reporting import comparison, tracker, trackers

    outcomes = list[compare.Outcome]()
    # All before the first cell begins, so that a missing package is reported at once.
    followers = {c.folder: trackers.of(c.experiment.run.trackers, c.folder) for c in cells}

    def watch(cell: Cell, events: Iterator[Event]) -> None:
        name = f"{len(outcomes) + 1} of {len(cells)}: {cell.name}, seed {cell.seed}"
        display.print()
        display.print(name, "bold")
        at = cell.folder
        with closing(tracker.following(events, followers[at], at)) as followed:
            display.follow(followed)

    try:
        for outcome in compare.run(cells, watch, display.meter):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        outcomes += [compare.Outcome(cell, "open") for cell in cells[len(outcomes) :]]
    display.meter.begin("writing the comparison")
    shown = comparison.printed(comparison.write(target, outcomes))
    display.pause()
    for part in shown:
        display.console.print(part, highlight=False, markup=False)
    for name in compare.FILES:
        print(f"written: {target / name}")
    return {outcome.state for outcome in outcomes}


def _as_here(settings: Experiment, ready: PreparedRun) -> Experiment:
    """The settings with what this machine has chosen: other numbers of threads, and other
    precisions, round otherwise.
    """
    import torch

    threads = settings.run.model_copy(update={"threads": torch.get_num_threads()})
    return settings.model_copy(update={"run": threads, "model": ready.experiment.model})


def _refuse_when_resumed(change: str) -> None:
    if not re.match(r"(run\.|federation\.rounds *=)", change.strip()):
        raise ConfigError(
            f"--set {change}: of a run that is resumed only federation.rounds and the section run "
            "may change; start a new run for another value."
        )


def _has_finished(settings: Experiment, folder: Path) -> bool:
    """Whether a run to resume has done all its rounds; then says so, and how to add more."""
    from flexlora.federation import rounds

    done, wanted = finished_rounds(folder), settings.federation.rounds
    if done > wanted:
        raise ConfigError(
            f"federation.rounds is {wanted}, but the run in {folder} has finished {done} rounds; "
            "give a larger number."
        )
    if done == wanted and not rounds.is_complete(settings, folder):
        print(f"The adapter of the run in {folder} is damaged; it is written again.")
        return False
    if done == wanted:
        print(f"The run in {folder} has finished all {done} rounds. For more:")
        print(f"flexlora run --resume {folder} --set federation.rounds={2 * done}")
    return done == wanted


def _refuse_existing(folder: Path) -> None:
    from flexlora.federation import checkpoint

    refuse_parts_of_runs(folder, "--out")

    if checkpoint.is_begun(folder):
        raise ConfigError(
            f"{folder} already holds a run; resume it with: flexlora run --resume {folder}, or "
            "give another --out."
        )
    refuse_foreign_config(folder, "--out")
