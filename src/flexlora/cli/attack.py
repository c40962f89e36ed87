"""The command that simulates attacks: ``flexlora attack``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexlora.cli.configs import refuse_missing
from flexlora.cli.interrupts import STOPPED
from flexlora.cli.options import Changes, ConfigFile
from flexlora.cli.outputs import output_folder

if TYPE_CHECKING:
    from flexlora.cli.progress import Display
    from flexlora.config import Experiment
    from flexlora.federation.attacks import AttackSettings, Cell
    from flexlora.journal import Event

Attacks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="sign-flip, scale, scale-once, noise, collusion, adaptive, direction, backdoor, "
        "poisoning; with a strength: sign-flip:10. Default: attack.attacks, or all.",
    ),
]
Defences = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="none, clip (the defaults of a run), geometric-median, multi-krum, fltrust. Default: "
        "attack.defences, or all.",
    ),
]
AttackRanks = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        metavar="A,B",
        help="Ranks of malicious clients: assigned by the config, or small, equal, large among its "
        "rank types. Default: attack.ranks, or assigned.",
    ),
]
Share = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="The share of malicious clients. Default: attack.share, or 0.1."
    ),
]
Rounds = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="The rounds of every run; else the config's.")
]
Seeds = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Number of seeds, from the config's on. Default: attack.seeds, or 1."
    ),
]
Trigger = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The text that opens the backdoor.")
]
Target = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The answer that backdoor and poisoning teach.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The simulation's folder; default: the run's with -attack."
    ),
]


def attack(
    path: ConfigFile,
    attacks: Attacks = None,
    defences: Defences = None,
    ranks: AttackRanks = None,
    share: Share = None,
    rounds: Rounds = None,
    seeds: Seeds = None,
    trigger: Trigger = None,
    target: Target = None,
    changes: Changes = None,
    output: Folder = None,
) -> None:
    """Simulate attacks by malicious clients, and show the damage under each defence.

    The same command resumes an interrupted simulation.
    """
    from flexlora.cli.progress import Display

    refuse_missing(path)
    with Display() as display:
        from flexlora.federation import compose
        from flexlora.federation.attacks import CELLS, plan, read_settings, with_changes
        from flexlora.reporting.damage import FILES

        more = [] if rounds is None else [f"federation.rounds={rounds}"]
        settings = compose.load(path, [*(changes or ()), *more])
        given: dict[str, Any] = {
            "attacks": _listed(attacks),
            "defences": _listed(defences),
            "ranks": _listed(ranks),
            "share": share,
            "seeds": seeds,
            "trigger": trigger,
            "target": target,
        }
        given = {key: value for key, value in given.items() if value is not None}
        chosen = with_changes(read_settings(path), given, "The options")
        folder = output or Path(f"{settings.run.folder or f'runs/{path.stem}'}-attack")
        output_folder(folder, "--out", {CELLS, *FILES}, "a simulation of attacks")
        cells = plan(chosen, settings.seed, folder)
        states = _simulate(settings, chosen, cells, folder, display)
    if "open" in states:
        print("stopped; resume with the same command", file=sys.stderr)
        raise SystemExit(STOPPED)


def _listed(text: str | None) -> tuple[str, ...] | None:
    """The names between commas; None if there is no text."""
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _simulate(
    settings: Experiment,
    chosen: AttackSettings,
    cells: Sequence[Cell],
    folder: Path,
    display: Display,
) -> set[str]:
    """Run the cells, write and show what they show, also after a stop; the states they end in."""
    from rich.table import Table

    from flexlora.federation import attacks
    from flexlora.reporting import damage

    outcomes = list[attacks.Outcome]()

    def watch(cell: Cell, events: Iterator[Event]) -> None:
        display.print()
        display.print(f"{len(outcomes) + 1} of {len(cells)}: {cell.name}", "bold")
        display.follow(events)

    try:
        for outcome in attacks.run(settings, chosen, cells, watch, display.meter):
            outcomes.append(outcome)
            if outcome.reason:
                display.print(f"{outcome.cell.name}: {outcome.state}: {outcome.reason}")
    except KeyboardInterrupt:
        outcomes += [attacks.Outcome(cell, "open") for cell in cells[len(outcomes) :]]
    shown = damage.Damage(outcomes, attacks.UNDEFENDED)
    damage.write(folder, shown)
    display.pause()
    for listing in shown.listings():
        table = Table(title=listing.title, caption=listing.note)
        for place, name in enumerate(listing.head):
            table.add_column(name, justify="right" if place else "left")
        for row in listing.rows:
            table.add_row(*row)
        display.console.print(table, highlight=False, markup=False)
    for name in damage.FILES:
        print(f"written: {folder / name}")
    return {outcome.state for outcome in outcomes}
