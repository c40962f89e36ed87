"""The damage of attacks by defence, as tables for the terminal, Markdown, JSON and a page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexlora.federation.attacks import NONE, RANKS, Outcome, Scores
from flexlora.journal import NOTHING
from flexlora.reporting.document import Header, Paragraph, Section, Table
from flexlora.reporting.html import render_document
from flexlora.storage import write_atomically

FILES = ("attack.md", "attack.json", "attack.html")
"""The files of a simulation in its folder, beside its cells."""

_NOTES = {
    "Held-out loss": (
        "Relative to the honest run without a defence, on rows that clients which are never "
        "malicious hold out. The mean of the seeds; in brackets the worst of them, if there are "
        "several."
    ),
    "Distance of the global adapter": (
        "Of its product to that of the honest run without a defence, relative to the norm of the "
        "latter."
    ),
    "Probability of the target": (
        "Of a token of the attacker's target, as the answer to rows with the trigger (backdoor) or "
        "to all rows (poisoning)."
    ),
}
_DIVERGED = "no number"


@dataclass(frozen=True)
class Listing:
    """One table of text: attacks in rows, defences in columns."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Damage:
    """The outcomes of a simulation; ``undefended`` names the defence that is none."""

    outcomes: Sequence[Outcome]
    undefended: str

    def listings(self) -> list[Listing]:
        """The tables: loss, distance and, where an attack has one, the target."""
        titles = iter(_NOTES.items())
        tables = [
            self._listing(*next(titles), self._loss),
            self._listing(*next(titles), self._distance),
        ]
        if any(outcome.scores and outcome.scores.target is not None for outcome in self.outcomes):
            tables.append(self._listing(*next(titles), self._target))
        return tables

    def unfinished(self) -> list[str]:
        """Why cells have no scores, a sentence each."""
        return [f"{o.cell.name}: {o.state}: {o.reason}" for o in self.outcomes if o.reason]

    def loss_change(self, outcome: Outcome) -> float | None:
        """The loss of a cell relative to the honest run's, minus 1; None without one of the two."""
        honest = self._honest(outcome)
        if not (outcome.scores and honest and outcome.scores.loss and honest.loss):
            return None
        return outcome.scores.loss / honest.loss - 1

    def _honest(self, outcome: Outcome) -> Scores | None:
        cell = outcome.cell
        wanted = (NONE, self.undefended, cell.ranks, cell.seed)
        for other in self.outcomes:
            place = (other.cell.attack, other.cell.defence, other.cell.ranks, other.cell.seed)
            if place == wanted:
                return other.scores
        return None

    def _listing(self, title: str, note: str, cell: Callable[[Sequence[Outcome]], str]) -> Listing:
        defences = list(dict.fromkeys(o.cell.defence for o in self.outcomes))
        rows = []
        for attack, ranks in self._kinds():
            texts = []
            for defence in defences:
                chosen = [
                    o
                    for o in self.outcomes
                    if (o.cell.attack, o.cell.ranks, o.cell.defence) == (attack, ranks, defence)
                ]
                texts.append(cell(chosen) if chosen else NOTHING)
            if any(text != NOTHING for text in texts):
                rows.append([attack if ranks == RANKS[0] else f"{attack}, {ranks} rank", *texts])
        return Listing(title, note, ["attack", *defences], rows)

    def _kinds(self) -> Iterator[tuple[str, str]]:
        return iter(dict.fromkeys((o.cell.attack, o.cell.ranks) for o in self.outcomes))

    def _loss(self, outcomes: Sequence[Outcome]) -> str:
        return _shown(
            outcomes, [self.loss_change(outcome) for outcome in outcomes], _percent, _DIVERGED
        )

    def _distance(self, outcomes: Sequence[Outcome]) -> str:
        values = [o.scores.distance if o.scores else None for o in outcomes]
        return _shown(outcomes, values, lambda value: f"{value:.3g}", NOTHING)

    def _target(self, outcomes: Sequence[Outcome]) -> str:
        values = [o.scores.target if o.scores else None for o in outcomes]
        return _shown(outcomes, values, lambda value: f"{value:.3g}", NOTHING)


def write(folder: Path, damage: Damage) -> None:
    """Write the tables into the simulation's folder as Markdown, JSON and a self-contained page."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        {
            "attack": o.cell.attack,
            "defence": o.cell.defence,
            "ranks": o.cell.ranks,
            "seed": o.cell.seed,
            "state": o.state,
            "reason": o.reason,
            "scores": None if o.scores is None else asdict(o.scores),
            "loss_change": damage.loss_change(o),
        }
        for o in damage.outcomes
    ]
    contents = (
        markdown(damage),
        json.dumps({"cells": cells}, indent=1, allow_nan=False) + "\n",
        page(damage, folder.resolve().name),
    )
    for name, text in zip(FILES, contents, strict=True):
        write_atomically(folder / name, text.encode(errors="replace"))


def markdown(damage: Damage) -> str:
    """The tables as Markdown."""
    parts = ["# Damage by attack and defence\n"]
    for listing in damage.listings():
        lines = [listing.head, ["---"] * len(listing.head), *listing.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {listing.title}\n\n{listing.note}\n\n{table}\n")
    parts += [f"- {text}" for text in damage.unfinished()]
    return "\n".join(parts) + "\n"


def page(damage: Damage, name: str) -> str:
    """The tables as one self-contained page."""
    sections = [
        Section(listing.title, [Paragraph(listing.note), Table(listing.head, listing.rows, {0})])
        for listing in damage.listings()
    ]
    if texts := damage.unfinished():
        sections.append(Section("Runs without scores", [Paragraph(text) for text in texts]))
    header = Header(f"Attacks: {name}", "Damage by attack and defence", "", [], [])
    return render_document(header.title, header, sections)


def _shown(
    outcomes: Sequence[Outcome],
    values: Sequence[float | None],
    text: Callable[[float], str],
    none: str,
) -> str:
    """The mean of the values as text, the worst in brackets; a state where one has no value."""
    if ends := [outcome.state for outcome in outcomes if outcome.state != "finished"]:
        return ends[0]
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values) or not known:
        return none
    mean = text(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean} ({text(max(known))})"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"
