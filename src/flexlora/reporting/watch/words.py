"""How a run stands, in numbers for programs and in words for the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from flexlora.journal import duration, size
from flexlora.reporting.watch.run_state import ClientState, RunState, Scores, kind_of_loss

MOST_CLIENTS = 200
_LONGEST_NAME, _LONGEST_REASON = 60, 160

Words = dict[str, Any]
"""What the page shows, ready to be put into its places as text:

``title``        the window's; ``name`` the run's
``state``        {kind, text}; the kind is waiting, running, short, stopped or finished
``about``        method, model and version
``progress``     {share (0 to 1), text}
``facts``        [[label, value, note]], always the same labels
``scores``       rows {state, cells} of the latest evaluations
``clients``      rows {state, cells} by name; the state is idle, training, answered or lost
``count``        how many clients are in which state
``more``         of the clients that are not shown, or empty
``updated``      when this was said
"""


def status(now: RunState, name: str, at: float) -> dict[str, Any]:
    """The run called ``name`` at a moment, in seconds since 1970; ``shown`` is the page's.

    Of many clients the ``MOST_CLIENTS`` last heard of are listed. Costs as much as these.
    """
    listed = sorted(now.latest(MOST_CLIENTS), key=lambda client: _natural(client.name))
    scores = sorted(now.scores.values(), key=lambda row: (-row.round, row.adapter, row.group))
    return {
        "name": name,
        "state": now.state,
        "round": now.round,
        "rounds_finished": now.rounds,
        "rounds_planned": now.planned,
        "uploads_wanted": now.wanted,
        "training_loss": now.loss,
        "tokens_per_second": now.tokens_per_second,
        "round_seconds": now.last_round.get("seconds"),
        "server_seconds": now.last_round.get("aggregate_seconds"),
        "last_event": now.last_time,
        "totals": dict(now.totals),
        "losses": dict(now.losses),
        "clients_by_state": now.by_state,
        "clients_not_listed": len(now.clients) - len(listed),
        "evaluations": [vars(row) for row in scores],
        "clients": [{**vars(client), "state": now.state_of(client.name)} for client in listed],
        "shown": _words(now, name, at, listed, scores),
    }


def _words(
    now: RunState, name: str, at: float, listed: Sequence[ClientState], scores: Sequence[Scores]
) -> Words:
    more = len(now.clients) - len(listed)
    return {
        "title": f"{_progress(now)} · {_cut(name)}",
        "name": name,
        "state": {"kind": now.state, "text": _state(now)},
        "about": _what(now),
        "progress": {"share": _share(now), "text": _progress(now)},
        "facts": _facts(now, at),
        "scores": [{"state": row.group, "cells": _score_cells(row)} for row in scores],
        "clients": [_row(now, client, at) for client in listed],
        "count": _count(now),
        "more": f"{more:,} more clients were heard of longer ago." if more else "",
        "updated": f"As of {datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S %Z}.",
    }


def _state(now: RunState) -> str:
    if now.state == "short":
        short = now.short or {}
        answered = len(now.busy["answered"])
        return f"waiting: {answered} of a quorum of {short['quorum']} answered"
    if now.state == "stopped":
        return f"stopped: {_cut((now.stopped or {})['reason'], _LONGEST_REASON)}"
    return {"waiting": "waiting for the run to begin"}.get(now.state, now.state)


def _what(now: RunState) -> str:
    config = now.start.get("config") or {}
    method, model = config.get("method") or {}, config.get("model") or {}
    said = [
        str(method.get("name", "")),
        f"on {_cut(str(model['name']))}" if model.get("name") else "",
        f"(flexlora {now.start['version']})" if now.start.get("version") else "",
    ]
    return " ".join(part for part in said if part) or "Nothing is known of it yet."


def _share(now: RunState) -> float:
    if not now.planned:
        return 0.0
    here = min(len(now.busy["answered"]) / now.wanted, 1.0) if now.wanted else 0.0
    return round(min((now.rounds + here) / now.planned, 1.0), 4)


def _progress(now: RunState) -> str:
    if not now.start:
        return "not begun"
    planned = f" of {now.planned:,}" if now.planned else ""
    said = f"round {now.round:,}{planned}"
    if now.round == now.rounds:
        return f"{said} finished" if now.rounds else said
    wanted = f" of {now.wanted:,}" if now.wanted else ""
    return f"{said}: {len(now.busy['answered']):,}{wanted} uploads"


def _facts(now: RunState, at: float) -> list[list[str]]:
    last, totals = now.last_round, now.totals
    whole = "of the last round as a whole" if last else ""
    took, server = last.get("seconds"), last.get("aggregate_seconds")
    sent = {way: f"{size(last[way])} in the last round" if last else "" for way in _WAYS}
    refused = f"; {totals['refused']:,} nodes were not let in" if totals["refused"] else ""
    strays = f"late or second ones{refused}"
    losses = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in now.losses.items())
    return [
        ["Training loss", _number(now.loss, 3), "nats a token, last round" if last else ""],
        ["Speed", _number(now.tokens_per_second, 0, " tokens/s"), whole],
        ["Last round", _seconds(took), f"of it {_seconds(server)} on the server" if last else ""],
        ["Last event", _ago(now.last_time, at), "in the journal"],
        ["Received", size(totals["bytes_up"]), sent["bytes_up"]],
        ["Handed out", size(totals["bytes_down"]), sent["bytes_down"]],
        ["Lost turns", f"{sum(now.losses.values()):,}", losses],
        ["Stray answers", f"{totals['strays']:,}", strays],
    ]


_WAYS = ("bytes_up", "bytes_down")


def _score_cells(row: Scores) -> list[str]:
    return [
        _cut(row.adapter),
        f"{row.round:,}",
        row.group,
        f"{row.examples:,}",
        f"{row.rouge_l:.1f}",
        f"{row.exact_match:.1f}",
        f"{row.loss:.3f}",
    ]


def _row(now: RunState, client: ClientState, at: float) -> dict[str, Any]:
    state = now.state_of(client.name)
    ranks = f"({', '.join(map(str, client.ranks))})" if client.ranks else ""
    spared = state == "lost" and kind_of_loss(client.reason) == "not_needed"
    return {
        "state": "idle" if spared else state,
        "cells": [
            _cut(client.name),
            f"{_cut(client.rank_type)} {ranks}".strip() or "–",
            "–" if client.examples is None else f"{client.examples:,}",
            _client_state(state, client, at),
            _number(client.tokens_per_second, 0),
            size(client.bytes_up),
            size(client.bytes_down),
            f"{client.turns:,}",
            f"{client.lost:,}",
            _ago(client.seen, at),
        ],
    }


def _client_state(state: str, client: ClientState, at: float) -> str:
    if state == "training" and client.since is not None:
        return f"training for {_about(at - client.since)}"
    return f"lost: {_cut(client.reason, _LONGEST_REASON)}" if state == "lost" else state


def _count(now: RunState) -> str:
    said = ", ".join(f"{count:,} {state}" for state, count in now.by_state.items() if count)
    heard, known = len(now.clients), now.start.get("clients") or 0
    of = f"{heard:,} of {known:,} clients were heard of" if heard < known else f"{heard:,} clients"
    return f"{of}: {said}." if said else f"{of}."


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 60 else duration(value)


def _ago(time: float | None, at: float) -> str:
    return "–" if time is None else f"{_about(at - time)} ago"


def _about(seconds: float) -> str:
    """A time in one unit, as nobody reads another."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length:,.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _cut(text: str, longest: int = _LONGEST_NAME) -> str:
    """A text of the journal on one line; what is left out of a long one shows as dots.

    Characters that are not seen, such as those that turn the direction of a text around, show.
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _natural(name: str) -> list[Any]:
    """A key by which client-10 comes after client-9.

    Digits are compared by count and then as text: as numbers, very long ones are refused.
    """
    parts = re.split("([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]
