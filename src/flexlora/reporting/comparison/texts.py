"""A comparison as tables of text, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora import methods
from flexlora.journal import NOTHING, counted, size
from flexlora.method import Feature, Method
from flexlora.reporting import sections
from flexlora.reporting.comparison.numbers import COSTS, DIGITS
from flexlora.reporting.comparison.values import (
    Comparison,
    Row,
    Spread,
    Standing,
    block,
    blocks_of,
    groups_of,
    score,
    text_of,
)
from flexlora.reporting.comparison.verdict import verdict

BEST, LEVEL = "★", "≈"
NEEDS = {
    Feature.MIXED_RANKS: "the same rank for all clients",
    Feature.PER_MODULE: "clients that all train the same layers",
    Feature.PRODUCT_STATE: "no server optimizer",
    Feature.COMMON_FACTORS: "no SCAFFOLD",
}
"""What a method without a feature needs of a config."""


@dataclass(frozen=True)
class Listing:
    """One table of text; ``words`` are the columns of words, ``spans`` as in ``document.Table``."""

    title: str
    note: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: set[int]
    spans: Sequence[tuple[str, int]] = ()
    long: bool = False


def listings(comparison: Comparison) -> list[Listing]:
    """The tables: scores, what is missing, best rounds, costs, kinds of methods, energy."""
    groups = groups_of(comparison)
    tables = [scores(comparison, groups)]
    if any(row.state for row in comparison.rows):
        tables.append(_missing(comparison))
    runs = [run for row in comparison.rows for run in row.runs]
    if any(len(run.scores.get(group, {})) > 2 for run in runs for group in groups):
        tables.append(_best_rounds(comparison, groups))
    tables += [_costs(comparison), _kinds(comparison)]
    blocks = blocks_of(comparison)
    if len(blocks) > 2:
        tables += [_energy(comparison, blocks, whole) for whole in (False, True)]
    return tables


def scores(comparison: Comparison, groups: Sequence[str]) -> Listing:
    """The scores on these groups after the last round, best first."""
    head, spans = ["", "Method", "Seeds"], [("", 3)]
    if comparison.group is None:
        head, spans = [*head, "Training loss", "Behind the best"], [*spans, ("", 2)]
    for group in groups:
        behind = ["Behind the best"] if group == comparison.group else []
        head += ["Loss", *behind, "Rouge-L", "Exact match"]
        spans.append((f"{group.capitalize()} clients", 3 + len(behind)))
    lines = [_scores(row, comparison, groups) for row in comparison.used]
    if before := _before(comparison, groups):
        lines.append(before)
    return Listing("Scores", _scores_note(comparison), head, lines, {1}, spans)


def _scores_note(comparison: Comparison) -> str:
    units = (
        "After the last round, the lowest loss first. Loss in nats per token, Rouge-L and exact "
        f"match in percent. {BEST} is the best method."
    )
    if len(comparison.seeds) == 1:
        return f"{units} Of one seed."
    return (
        f"{units} Mean ± sample standard deviation over seeds; {LEVEL} is behind the best by at "
        "most the larger of the two standard deviations. “Behind the best” is the difference in "
        "loss between runs of the same seed. A seed determines clients, data and evaluation "
        "questions for all methods, so this difference is more informative than that of the means."
    )


def _missing(comparison: Comparison) -> Listing:
    lines = [[", ".join(names), f"skipped: {why}"] for why, names in _skipped(comparison)]
    lines += [[row.method, row.state] for row in comparison.used if row.state]
    note = "Methods that are incompatible with this configuration or did not finish."
    return Listing("Not finished", note, ["Method", "Why"], lines, {0, 1})


def _scores(row: Row, comparison: Comparison, groups: Sequence[str]) -> list[str]:
    standing = comparison.standing(row)
    away = text_of(standing.behind, 3, "+") if standing and row is not comparison.best else NOTHING
    cells = [_mark(row, comparison, standing), row.method, _finished(row, comparison)]
    if comparison.group is None:
        cells += [text_of(row.spread(comparison.loss), 3), away]
    for group in groups:
        loss, *others = (
            text_of(row.spread(score(group, key)), digits) for key, digits in DIGITS.items()
        )
        cells += [loss, away, *others] if group == comparison.group else [loss, *others]
    return cells


def _finished(row: Row, comparison: Comparison) -> str:
    """How many seeds are complete, or in one word why none is."""
    states = {other.state for other in row.others}
    if not row.runs and len(states) == 1 and "open" not in states:
        return states.pop()
    return f"{len(row.runs)} of {len(comparison.seeds)}"


def _mark(row: Row, comparison: Comparison, standing: Standing | None) -> str:
    if row is comparison.best:
        return BEST
    return LEVEL if standing and standing.level else ""


def _before(comparison: Comparison, groups: Sequence[str]) -> list[str]:
    """The base model's line, from all the seeds in which it was evaluated."""
    by_seed = {run.seed: run for row in comparison.rows for run in row.runs}
    cells = []
    for group in groups:
        rows = [row for run in by_seed.values() if (row := run.before(group))]
        for key, digits in DIGITS.items():
            values = [value for row in rows if (value := getattr(row, key)) is not None]
            cells.append(text_of(Spread.of(values) if values else None, digits))
            if key == "loss" and group == comparison.group:
                cells.append(NOTHING)
    seeds = sum(any(run.before(group) for group in groups) for run in by_seed.values())
    return ["", "(before training)", f"{seeds} of {len(comparison.seeds)}", *cells] if seeds else []


def _best_rounds(comparison: Comparison, groups: Sequence[str]) -> Listing:
    lines = []
    for row in (row for row in comparison.rows if row.runs):
        cells = [row.method]
        for group in groups:
            rounds = [best.round for run in row.runs if (best := run.best(group))]
            cells.append(", ".join(map(str, rounds)) or NOTHING)
            cells += [
                text_of(row.spread(score(group, key, best=True)), digits)
                for key, digits in DIGITS.items()
            ]
        lines.append(cells)
    head = ["Method", *["Round", "Loss", "Rouge-L", "Exact match"] * len(groups)]
    spans = [("", 1), *((f"{group.capitalize()} clients", 4) for group in groups)]
    note = (
        "After the round with the lowest loss on these same clients, chosen for each seed: the "
        "most that early stopping could have gained."
    )
    return Listing("Best round", note, head, lines, {0}, spans)


def _costs(comparison: Comparison) -> Listing:
    lines = []
    for row in comparison.used:
        spreads = {key: row.spread(value) for key, value in COSTS.items()}
        lost = spreads["lost_turns"]
        traffic = (spreads["bytes_up"], spreads["bytes_down"])
        lines.append(
            [
                row.method,
                text_of(spreads["training_loss"], 3),
                *(NOTHING if sent is None else size(sent.mean) for sent in traffic),
                text_of(spreads["seconds"], 1),
                text_of(spreads["server_seconds"], 2),
                NOTHING if lost is None else f"{sum(lost.values):.0f}",
            ]
        )
    head = ["Method", "Training loss", "Up", "Down", "Time (s)", "Server (s)", "Failed"]
    several = len(comparison.seeds) > 1
    note = (
        "Training loss of the last round in nats per token; bytes of all clients and rounds; "
        "wall-clock seconds of all rounds without evaluation, and of their aggregations (server)"
        f"{'; means over seeds' if several else ''}. Failed counts client rounds without a usable "
        f"upload{', summed over seeds' if several else ''}."
    )
    return Listing("Cost", note, head, lines, {0})


def _kinds(comparison: Comparison) -> Listing:
    compared = {row.kind: methods.make(row.kind) for row in comparison.used}
    lines = [
        [
            name,
            method.title,
            method.info.paper,
            _exact(method),
            "yes" if Feature.MIXED_RANKS in method.features else "no",
            "one per client" if Feature.PERSONAL in method.features else "one",
        ]
        for name, method in compared.items()
    ]
    head = ["Method", "Title", "Paper", "Exact", "Mixed ranks", "Model"]
    note = (
        "Exact: the aggregate's product B @ A is the weighted mean of the clients' products; by "
        "component: of each rank-one component, over the clients that have it. If each client has "
        "a model of its own, that model answers the client's questions, so its scores on seen "
        "clients do not compare with those of one model for all clients."
    )
    return Listing("Methods", note, head, lines, set(range(6)))


def _exact(method: Method) -> str:
    """As docs/methods.md has it: a personal model is no aggregate, so it has a dash."""
    if Feature.PERSONAL in method.features:
        return NOTHING
    return {"exact": "yes", "inexact": "no"}.get(method.info.exactness, method.info.exactness)


def _energy(comparison: Comparison, blocks: Sequence[str], whole: bool) -> Listing:
    """The energy by block after the last round, or after every one."""
    lines = []
    for row in comparison.used:
        shares = [row.by_round(block(name)) for name in blocks]
        numbers = sorted({number for share in shares for number in share})
        for number in numbers if whole else numbers[-1:]:
            cells = [text_of(share.get(number), 2) for share in shares]
            lines.append([row.method, *([str(number)] if whole else []), *cells])
    head = ["Method", *(["Round"] if whole else []), *(f"Ranks {name}" for name in blocks)]
    if whole:
        return Listing("Energy by round", "In percent, as above.", head, lines, {0}, long=True)
    over = "modules and seeds" if len(comparison.seeds) > 1 else "modules"
    note = (
        "Share of the squared singular values of the global update in each block of ranks, in "
        f"percent, mean over {over}, after the last round. The last block lies beyond "
        "the largest rank in use: no client receives it."
    )
    return Listing("Energy by rank", note, head, lines, {0})


def title(comparison: Comparison) -> str:
    """The title of the comparison."""
    names = [row.method for row in comparison.used]
    kinds, variants = (
        {getattr(row, key) for row in comparison.used} for key in ("kind", "variant")
    )
    if len(variants) > 1:
        return f"{counted(len(kinds), 'method')} and {len(variants)} variants compared"
    if not names:
        return "No method can be used"
    return f"{' and '.join(names)} compared" if len(names) < 3 else f"{len(names)} methods compared"


def facts(comparison: Comparison) -> dict[str, str]:
    """What all cells have in common."""
    run = next((run for row in comparison.rows for run in row.runs), None)
    seeds = ", ".join(map(str, comparison.seeds))
    if run is None:
        return {"Seeds": seeds}
    common = run.facts
    return {
        "Base model": common.base_model or "",
        "Clients": sections.client_count(common),
        "Rank types": " or ".join(
            dict.fromkeys(
                sections.rank_types(each.rank_types) for row in comparison.rows for each in row.runs
            )
        ),
        "Rounds": f"{common.rounds_done:,}",
        "Seeds": seeds,
        "flexlora": common.version or "",
        "Hardware": sections.flat(common.hardware),
    }


def unfinished(comparison: Comparison) -> list[str]:
    """A line for each reason why methods were skipped, and for each that did not finish."""
    lines = [f"Skipped, {why}: {', '.join(names)}" for why, names in _skipped(comparison)]
    return lines + [f"{row.method}: {row.state}" for row in comparison.used if row.state]


def _skipped(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The methods that cannot be used with the config, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.refused:
            refusal = row.others[0]
            needs = NEEDS.get(refusal.lacks) if refusal.lacks else None
            # Other reasons are sentences that name the method.
            by_reason.setdefault(needs or refusal.reason.rstrip("."), []).append(row.method)
    verbs = {True: "it needs", False: "they need"}
    return [
        (f"{verbs[len(names) == 1]} {why}" if why in NEEDS.values() else why, names)
        for why, names in by_reason.items()
    ]


def markdown(comparison: Comparison) -> str:
    """The comparison's words and tables as Markdown."""
    parts = [f"# {title(comparison)}", " ".join(verdict(comparison))]
    parts.append("\n".join(f"- {name}: {text}" for name, text in facts(comparison).items() if text))
    for listing in listings(comparison):
        rule = ["---" if place in listing.words else "---:" for place in range(len(listing.head))]
        groups = [name for name, width in listing.spans for _ in range(width)]
        head = [
            f"{name} ({groups[place].lower()})" if groups and groups[place] else name
            for place, name in enumerate(listing.head)
        ]
        parts += [f"## {listing.title}", listing.note]
        parts.append("\n".join(map(_line, (head, rule, *listing.lines))))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    words = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(words)} |"
