"""The command line: thin calls into the library, nothing else."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from flexlora import config, methods, peft_format
from flexlora.cli import demo, deploy, progress
from flexlora.cli.deploy import Changes
from flexlora.errors import ConfigError, FlexloraError
from flexlora.evaluation import evaluate_each
from flexlora.federation import checkpoint, compare, compose, rounds, setup
from flexlora.journal import JOURNAL, Event, mean_scores
from flexlora.lowrank import Adapter
from flexlora.method import Feature
from flexlora.peft_format import check as inspect
from flexlora.peft_format import merge as merge_adapters
from flexlora.peft_format import parse_rank
from flexlora.reporting import comparison, page, tracker, trackers
from flexlora.storage.files import write_atomically

if TYPE_CHECKING:
    from flexlora.federation.ray.cluster import Cluster

BUG = (
    "This is a fault of flexlora or of a plug-in, not of your input; please report it with the "
    "traceback above."
)

app = typer.Typer(
    help="Federated LoRA fine-tuning of language models by clients of unequal means.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


app.command("keys")(deploy.make_keys)
app.command()(deploy.serve)
app.command()(deploy.join)
app.command("demo-flower")(deploy.show_demo)


def main() -> None:
    """Run the command line; a fault that the user can mend is one message and exit code 2."""
    try:
        app()
    except FlexloraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception:
        traceback.print_exc()
        print(BUG, file=sys.stderr)
        raise SystemExit(1) from None


@app.command()
def run(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml")] = None,
    changes: Changes = None,
    folder: Annotated[Path | None, typer.Option(help="Where the run is kept.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a run that was stopped.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Decompose exactly; as --set method.accuracy='exact'.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Train in N processes, by Ray.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Train on a Ray cluster: HOST:PORT, ray://... or auto."
        ),
    ] = None,
) -> None:
    """Run a federation, or go on with one."""
    if resume is not None:
        if path is not None or changes or folder is not None or exact:
            raise ConfigError(
                "--resume takes the folder of a run, --workers and --ray, and nothing else."
            )
        with _cluster(_stored(resume), workers, ray) as cluster:
            _run(_stored(resume), resume, resume=True, cluster=cluster)
        return
    if path is None:
        raise ConfigError("Give a CONFIG.toml, or --resume DIR.")
    forced = ["method.accuracy='exact'"] if exact else []
    settings = compose.load(path, [*(changes or ()), *forced])
    target = folder or Path(settings.run.folder or f"runs/{path.stem}")
    _refuse_existing(target)
    with _cluster(settings, workers, ray) as cluster:
        _run(settings, target, cluster=cluster)


@app.command("demo")
def show_demo(
    folder: Annotated[Path | None, typer.Option(help="Where the two runs are kept.")] = None,
) -> None:
    """Compare mixed ranks with rank 8 everywhere on a small real model, offline."""
    console = Console()
    target = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    table = Table(title="Procedural tasks, one family of tasks per client")
    for heading in ("", "Rouge-L", "exact match", "loss", "Rouge-L", "exact match", "loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("", "seen clients", "", "", "unseen clients", "", "")
    found: list[tuple[str, list[Event], Path]] = []
    for number, arm in enumerate(demo.ARMS):
        place = target / arm.replace(" ", "-")
        console.print(f"\n{arm}", style="bold")
        settings = demo.experiment(arm, str(place), evaluate_base=number == 0)
        found.append((arm, _run(settings, place), place))
    table.add_row("before", *_demo_cells(found[0][1], "base"))
    for arm, events, _ in found:
        table.add_row(arm, *_demo_cells(events, "global"))
    console.print()
    console.print(table)
    for arm, events, place in found:
        console.print(f"{arm}: adapter {events[-1]['adapter']}, report {place / page.PAGE}")


@app.command("compare")
def compare_methods(
    path: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    names: Annotated[
        str, typer.Option("--methods", metavar="all|A,B,C", help="See: flexlora methods.")
    ] = compare.ALL,
    seeds: Annotated[int, typer.Option(help="How many, from the config's seed on.")] = 3,
    changes: Changes = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="METHOD.KEY=VALUE", help="Set a method's option."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the comparison is kept.")] = None,
) -> None:
    """Compare methods on one config, all else the same; goes on where it was stopped."""
    settings = compose.load(path, changes or ())
    target = output or Path(f"{settings.run.folder or f'runs/{path.stem}'}-compare")
    cells = compare.plan(settings, compare.chosen(names), seeds, target, options or ())
    states = _compare(cells, target)
    if "open" in states:
        print("stopped; go on with the same command", file=sys.stderr)
        raise SystemExit(130)
    if "failed" in states or ("refused" in states and names.strip() != compare.ALL):
        raise typer.Exit(1)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="DIR...")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The merged adapter.")],
    weights: Annotated[
        str | None, typer.Option(metavar="3,1,2", help="Relative weights; equal by default.")
    ] = None,
    rank: Annotated[
        str, typer.Option(help="A number, an energy share such as 0.99, or max (no loss).")
    ] = "max",
    base: Annotated[str | None, typer.Option(help="The base model's name in the result.")] = None,
) -> None:
    """Merge PEFT adapters of any ranks and scales; no base model is loaded."""
    kept = merge_adapters(adapters, out, _numbers(weights), parse_rank(rank), base)
    table = Table("module", "summed rank", "rank", "energy kept", box=None)
    for facts in kept:
        table.add_row(
            facts.module, str(facts.summed_rank), str(facts.rank), f"{100 * facts.energy:.4f} %"
        )
    Console().print(table)
    lowest = min(kept, key=lambda facts: facts.energy)
    print(f"least energy kept: {100 * lowest.energy:.4f} % in {lowest.module}")
    print(f"written: {out}")


@app.command("eval")
def evaluate_adapter(
    path: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A PEFT adapter; without it, the base.")
    ] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Scores as JSON.")] = None,
) -> None:
    """Evaluate an adapter by generation on a config's test rows."""
    settings = compose.load(path, changes or ())
    loaded = peft_format.read(adapter).adapter if adapter else None
    ready = setup.prepare(settings, train=False)
    (rows,) = evaluate_each(
        ready.base, [loaded or Adapter({})], ready.questions, ready.prompt, settings.evaluation
    )
    if out:
        write_atomically(out, json.dumps(rows, indent=1).encode())
    _print_scores(rows)


@app.command()
def check(adapter: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Say what is in a PEFT adapter and which programs would misread it."""
    report = inspect(adapter)
    for line in report.lines():
        print(line)
    if not report.alike:
        raise typer.Exit(1)


@app.command("methods")
def list_methods() -> None:
    """List the methods with their papers and properties."""
    for name in methods.names():
        method = methods.make(name)
        options = ", ".join(f"{key}={value!r}" for key, value in vars(method).items()) or "none"
        exact = "exact" if method.info.exact else "inexact"
        mixed = "yes" if Feature.MIXED_RANKS in method.features else "no"
        print(f"{name}: {method.title} ({method.info.paper})")
        modules = "yes" if Feature.PER_MODULE in method.features else "no"
        told = f"aggregate {exact}; mixed ranks: {mixed}, modules: {modules}; options: {options}"
        print(f"    {told}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write a run's report.html anew from its journal."""
    print(page.write(folder))


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Others than this machine see it if named.")
    ] = "127.0.0.1:8800",
) -> None:
    """Serve a status page of a run, read-only, while it goes on or afterwards."""
    from flexlora.reporting import watch as watching

    if not any((folder / name).exists() for name in (JOURNAL, "config.json")):
        raise ConfigError(f"There is no run in {folder}: it has no {JOURNAL} and no config.json.")
    watching.serve(folder, *watching.address(listen))


def _cluster(
    settings: config.Experiment, workers: int | None, address: str | None
) -> AbstractContextManager[Cluster | None]:
    """The Ray cluster to train on; None if nothing was said of one."""
    if workers is None and address is None:
        return nullcontext()
    from flexlora.federation import ray

    if address is None:
        ray.require_token()
    from flexlora.federation.ray import cluster

    return cluster.cluster(settings, workers, address)


def _run(
    settings: config.Experiment,
    folder: Path,
    resume: bool = False,
    cluster: Cluster | None = None,
) -> list[Event]:
    """Run and watch a federation; say how to go on if it is stopped."""
    settings = cluster.settings(settings) if cluster else settings
    console, followers = Console(), trackers.of(settings.run.trackers, folder)
    console.print("reading data and model", style="dim")
    ready = setup.prepare(settings)
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        stored = _pinned(settings).model_dump_json(indent=1)
        write_atomically(folder / "config.json", stored.encode())
    point = checkpoint.load(folder) if resume else None
    done, at_once = (point.round, point.clients_at_once) if point else (0, None)
    turns = (settings.federation.rounds - done) * min(ready.cohort_size, len(ready.clients))
    spread = cluster.federation(ready, folder, at_once) if cluster else nullcontext()
    try:
        with (
            spread as federation,
            closing(
                tracker.following(rounds.run(ready, folder, federation, resume), followers, folder)
            ) as followed,
        ):
            events = progress.show(followed, console, turns)
    except KeyboardInterrupt:
        page.write(folder)
        print(f"\nstopped; go on with: flexlora run --resume {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    console.print(f"adapter: {events[-1]['adapter']}", soft_wrap=True)
    console.print(f"report:  {page.write(folder)}", soft_wrap=True)
    return events


def _compare(cells: list[compare.Cell], target: Path) -> set[str]:
    """Run and watch the cells, write what they show, also after a stop; how they ended."""
    console, outcomes = Console(), list[compare.Outcome]()
    # All before the first begins, so that a package that is missing is said at once.
    followers = {c.folder: trackers.of(c.experiment.run.trackers, c.folder) for c in cells}

    def watch(cell: compare.Cell, events: Iterator[Event], turns: int) -> None:
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
    print(f"written: {', '.join(str(target / name) for name in compare.FILES)}")
    return {outcome.state for outcome in outcomes}


def _pinned(settings: config.Experiment) -> config.Experiment:
    """The settings with the number of threads in use: other numbers round otherwise."""
    pinned = settings.run.model_copy(update={"threads": torch.get_num_threads()})
    return settings.model_copy(update={"run": pinned})


def _stored(folder: Path) -> config.Experiment:
    """The experiment that a run was started with."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"There is no run to resume in {folder}: it has no config.json.")
    return compose.parse(json.loads(path.read_text(encoding="utf-8")), str(path))


def _refuse_existing(folder: Path) -> None:
    if (folder / checkpoint.POINTER).exists():
        raise ConfigError(
            f"{folder} already holds a run; go on with: flexlora run --resume {folder}, or give "
            "another --folder."
        )


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights takes numbers such as 3,1,2, not {text!r}.") from None


def _demo_cells(events: list[Event], adapter: str) -> list[str]:
    cells = []
    for seen in (True, False):
        mean = demo.scores(events, adapter, seen)
        cells += [f"{mean['rouge_l']:.1f}", f"{mean['exact_match']:.1f} %", f"{mean['loss']:.3f}"]
    return cells


def _print_scores(rows: list[dict[str, Any]]) -> None:
    table = Table("", "clients", "rows", "Rouge-L", "exact match", "loss", box=None)
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
