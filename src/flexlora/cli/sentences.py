"""The events of a run as lines of text, which are broken between words only."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from flexlora.cli.tally import Tally, left_text
from flexlora.journal import (
    Event,
    LossKind,
    counted,
    duration,
    loss_kind,
    mean_scores,
    number,
    size,
)
from flexlora.reporting.names import rank_text
from flexlora.storage.untrusted import printable

_KEEP = "\N{NO-BREAK SPACE}"


def sentences(event: Event, tally: Tally) -> list[str]:
    """One event as lines of text; none for those that say nothing to a reader.

    Spaces that must not become line breaks are no-break spaces. Names and reasons in a journal may
    come from strangers: each line is printable, and begins no other.
    """
    return [_KEEP.join(map(printable, line.split(_KEEP))) for line in _sentences(event, tally)]


def _sentences(event: Event, tally: Tally) -> list[str]:
    match event["event"]:
        case "start":
            return [_start(event), *notices(event.get("notices", ()))]
        case "client":
            return [_client(event, tally)]
        case "lost":
            return [_lost(event)]
        case "clipped":
            return [_clipped(event)]
        case "limited":
            return [_limited(event)]
        case "kept":
            return [f"round {event['round']}: the model stays as it was: {event['reason']}"]
        case "stray":
            return [f"round {event['round']}: late answer of {event['client']} ignored"]
        case "short":
            return [_short(event)]
        case "damaged":
            return [f"damaged: {event['reason']}"]
        case "weights":
            return _weights(event)
        case "round":
            return [_round(event)]
        case "evaluation":
            return _evaluation(event)
        case "client_evaluation":
            return _client_evaluation(event)
        case "finish":
            return [_finish(event, tally)]
    return []


def notices(texts: Iterable[str]) -> list[str]:
    """The notices of a prepared run as lines of text."""
    return [f"note: {text}" for text in texts]


def _start(event: Event) -> str:
    types = ", ".join(
        f"{_keep(f'{n} of')} {_keep(_rank_type(name, event['ranks'][name]))}"
        for name, n in event["rank_types"].items()
    )
    return (
        f"{_keep(counted(event['clients'], 'client'))}: {types}; "
        f"{_keep(counted(event['unseen_clients'], 'held-out client'))}; "
        f"{_keep(counted(event['modules'], 'adapted module'))}; {event['hardware']}"
    )


def _rank_type(name: str, ranks: list[int]) -> str:
    """A rank type with its ranks; of a real client, whose type is made of them, the ranks alone."""
    if _is_of_a_client(name):
        return rank_text(name, ranks, {})
    return f"type {name} ({'rank' if len(ranks) == 1 else 'ranks'} {' and '.join(map(str, ranks))})"


def _is_of_a_client(name: str) -> bool:
    # A type whose ranks are known from its name alone.
    return bool(rank_text(name, (), {}))


def _client(event: Event, tally: Tally) -> str:
    left = left_text(tally.time_left.left(event.get("time", 0.0)))
    of = f" of {tally.now.wanted}" if tally.now.wanted else ""
    kind = rank_text(event["rank_type"], (), {}) or event["rank_type"]
    return (
        f"  round {event['round']}: client {event['client']} ({kind}): "
        f"loss {_loss(event):.3f}, {event['tokens']:,} tokens in {duration(event['seconds'], 1)}, "
        f"upload {tally.uploads}{of}{f', {left}' if left else ''}"
    )


def _lost(event: Event) -> str:
    round_, client, kind = event["round"], event["client"], loss_kind(event)
    if kind is LossKind.NOT_NEEDED:
        text = f"upload of {client} not used (enough uploads had arrived)"
    else:
        reason = "" if kind is LossKind.OTHER else f" ({kind.text})"
        text = f"client {client} failed{reason}: {event['reason']}"
    return f"  round {round_}: {text}"


def _clipped(event: Event) -> str:
    return (
        f"  round {event['round']}: upload of {event['client']} scaled down: its change is "
        f"{number(event['ratio'], 1)} times the median, {event['share']:.3g} of it is used"
    )


def _limited(event: Event) -> str:
    shares = ", ".join(f"{id} ({share:.0%})" for id, share in sorted(event["shares"].items())[:5])
    more = f" and {len(event['shares']) - 5} more" if len(event["shares"]) > 5 else ""
    return (
        f"round {event['round']}: clients above the largest share of the weights count less: "
        f"{shares}{more} (federation.most_share is {event['most_share']:g})"
    )


def _short(event: Event) -> str:
    return (
        f"round {event['round']}: {_keep(counted(event['received'], 'upload'))} after attempt "
        f"{event['attempt']}, {event['quorum']} needed"
    )


def _weights(event: Event) -> list[str]:
    """The clients that an averager counts for less than a tenth of an equal share, if any."""
    shares = event["shares"]
    low = sorted((share, id) for id, share in shares.items() if share < 0.1 / len(shares))
    if not low:
        return []
    listed = ", ".join(f"{id} ({100 * share:.2g} %)" for share, id in low[:5])
    more = f" and {len(low) - 5} more" if len(low) > 5 else ""
    return [f"round {event['round']}: the averager counts little or nothing of {listed}{more}"]


def _round(event: Event) -> str:
    rate = event["tokens"] / event["seconds"] if event["seconds"] else None
    parts = (
        f"loss {_loss(event):.3f}",
        number(rate, 0, " tokens/s"),
        f"up {size(event['bytes_up'])}",
        f"down {size(event['bytes_down'])}",
        duration(event["seconds"]),
    )
    return f"round {event['round']}: {', '.join(map(_keep, parts))}"


def _evaluation(event: Event) -> list[str]:
    names = {"base": "the base model", "global": "the global adapter"}
    adapter = event["adapter"]
    name = names.get(adapter, f"the global adapter truncated to type {adapter}")
    when = f"after round {event['round']}" if event["round"] else "before training"
    lines = [f"evaluation of {name} {when}:"]
    for group, seen in (("seen", True), ("unseen", False)):
        rows = [row for row in event["clients"] if row["seen"] is seen]
        if rows:
            lines.append(f"  {_keep(f'{group:<6} clients')}  {_scores(rows)}")
    return lines


def _client_evaluation(event: Event) -> list[str]:
    rows = event["clients"]
    when = f"after round {event['round']}" if event["round"] else "before training"
    lines = [f"  {id} did not evaluate: {reason}" for id, reason in event["missing"].items()]
    if rows:
        examples = sum(row["examples"] for row in rows)
        where = f"{counted(len(rows), 'client')}, {counted(examples, 'held-out row')}"
        spread = f"{event['loss_min']:.3f} to {event['loss_max']:.3f}"
        parts = (
            f"loss {event['loss']:.3f}",
            *([f"by client {spread}", f"worst {event['worst']}"] if len(rows) > 1 else []),
        )
        head = f"evaluation by the clients {when} ({_keep(where)}): "
        lines.insert(0, head + ", ".join(map(_keep, parts)))
    return lines


def _scores(rows: list[dict[str, Any]]) -> str:
    mean = mean_scores(rows)
    parts = (
        f"Rouge-L {mean['rouge_l']:.1f} %",
        f"exact match {mean['exact_match']:.1f} %",
        f"loss {mean['loss']:.3f}",
    )
    return ", ".join(map(_keep, parts))


def _finish(event: Event, tally: Tally) -> str:
    parts = [f"finished: {counted(event['rounds'], 'round')}", duration(event["seconds"])]
    if tally.tokens:
        parts.append(f"{tally.speed:,.0f} tokens/s")
    if not tally.now.start.get("resumed"):
        parts += [f"{way} {size(tally.now.totals[f'bytes_{way}'])}" for way in ("up", "down")]
    return ", ".join(map(_keep, parts))


def _loss(event: Event) -> float:
    """The mean loss; a client may report no token of loss."""
    return float(event["loss_total"] / max(event["loss_tokens"], 1))


def _keep(text: str) -> str:
    """The text as one word, which is not broken at the end of a line."""
    return text.replace(" ", _KEEP)


def plain(text: str) -> str:
    """The text on one line, for those who read lines."""
    return text.replace(_KEEP, " ")


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most this width, broken between words, later ones indented."""
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    lines = textwrap.wrap(
        text,
        max(width, 20),
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    ) or [text]
    return plain("\n".join(lines))
