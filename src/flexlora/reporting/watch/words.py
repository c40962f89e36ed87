"""The state of a run: as numbers for programs, and in words for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from flexlora.journal import NOTHING, LossKind, age, counted, duration, number, size
from flexlora.reporting.names import natural, rank_type_text, shortened
from flexlora.reporting.watch.curve import Curve, loss_curve
from flexlora.reporting.watch.run_state import ClientState, LogEntry, RunState, Scores
from flexlora.reporting.watch.time_left import Estimate

MOST_CLIENTS = 200
MOST_EVENTS = 20
_LONGEST_REASON = 160

Words = dict[str, Any]
"""What the page shows, as text for its elements:

``title``        of the window; ``name`` that of the run
``state``        {kind, text}; the kind is waiting, running, short, stopped or finished
``about``        method, model and version
``progress``     {share (0 to 1), text}
``facts``        [[label, value, note]], always as many
``scores``       rows {state, cells} of the latest evaluations
``clients``      rows {state, cells} by name; the state is idle, training, answered or lost
``count``        the number of clients in each state
``empty``        {scores, clients, events}: what an empty table says
``curve``        {lines: [{name, last, line, points}], top, bottom, first, last}
``curve_text``   the curve in words, for those who do not see it
``events``       rows {state, cells} of the latest events; the state is bad or empty
``report``       the address of the report, or empty
``more``         how many clients are not shown, or empty
``updated``      the time of this status
"""


def status(
    now: RunState, name: str, at: float, report: str = "", left: Estimate | None = None
) -> dict[str, Any]:
    """The run called ``name`` at a time, in seconds since 1970; ``shown`` is for the page.

    ``report`` is the address of the run's report, empty if there is none, ``left`` the estimate of
    the time left. Of many clients the
    ``MOST_CLIENTS`` most recently active are listed, and only these cost time.
    """
    listed = sorted(now.latest(MOST_CLIENTS), key=lambda client: natural(client.name))
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
        "seconds_left": left.seconds if left else None,
        "last_event": now.last_time,
        "totals": dict(now.totals),
        "losses": dict(now.losses),
        "clients_by_state": now.by_state,
        "clients_not_listed": len(now.clients) - len(listed),
        "evaluations": [vars(row) for row in scores],
        "clients": [{**vars(client), "state": now.state_of(client.name)} for client in listed],
        "training_loss_by_round": now.losses_by_round,
        "evaluation_loss_by_round": now.curves,
        "events": [vars(entry) for entry in _latest(now)],
        "shown": _words(now, name, at, listed, scores, left) | {"report": report},
    }


def _words(
    now: RunState,
    name: str,
    at: float,
    listed: Sequence[ClientState],
    scores: Sequence[Scores],
    left: Estimate | None,
) -> Words:
    more, curve = len(now.clients) - len(listed), loss_curve(now)
    return {
        "title": f"{_progress(now)} · {shortened(name)}",
        "name": name,
        "state": {"kind": now.state, "text": _state(now)},
        "about": _about(now),
        "progress": {"share": _share(now), "text": _progress(now)},
        "facts": [_time_left(now, left), *_facts(now, at)],
        "scores": [{"state": row.group, "cells": _score_cells(row)} for row in scores],
        "clients": [_row(now, client, at) for client in listed],
        "count": _count(now),
        "empty": _empty(now),
        "curve": asdict(curve),
        "curve_text": _curve_text(curve),
        "events": [
            {"state": "bad" if entry.bad else "", "cells": _entry_cells(entry)}
            for entry in _latest(now)
        ],
        "more": f"{counted(more, 'less recently active client')} not shown." if more else "",
        "updated": f"As of {datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S %Z}.",
    }


def _latest(now: RunState) -> list[LogEntry]:
    return list(now.log)[: -MOST_EVENTS - 1 : -1]


def _entry_cells(entry: LogEntry) -> list[str]:
    when = NOTHING
    if entry.time is not None:
        when = f"{datetime.fromtimestamp(entry.time).astimezone():%m-%d %H:%M:%S}"
    number_ = NOTHING if entry.round is None else f"{entry.round:,}"
    return [when, number_, shortened(entry.text, _LONGEST_REASON)]


def _curve_text(curve: Curve) -> str:
    values = ", ".join(f"{line.name} {line.last}" for line in curve.lines if line.last)
    return f"Loss by round in nats per token; last values: {values}." if values else ""


def _empty(now: RunState) -> dict[str, str]:
    """What the tables say while they are empty; of a run that is over, nothing is yet to come."""
    if now.state in ("finished", "stopped"):
        return {"scores": "Nothing was evaluated.", "clients": "No client took part.", "events": ""}
    return {
        "scores": _no_scores(now),
        "clients": "No client yet.",
        "events": "Nothing has happened yet.",
    }


def _no_scores(now: RunState) -> str:
    settings = (now.start.get("config") or {}).get("evaluation") or {}
    if settings and not (settings.get("seen_clients") or settings.get("unseen_clients")):
        return "The server evaluates nothing with this config."
    if settings and not settings.get("every") and not settings.get("base"):
        return "The first evaluation is after the last round."
    return "Not evaluated yet."


def _state(now: RunState) -> str:
    if now.state == "short":
        short = now.short or {}
        answered = len(now.busy["answered"])
        return f"waiting for a quorum: {answered} of {short['quorum']} uploads"
    if now.state == "stopped":
        return f"stopped: {shortened((now.stopped or {})['reason'], _LONGEST_REASON)}"
    return {"waiting": "waiting for the run to start"}.get(now.state, now.state)


def _about(now: RunState) -> str:
    config = now.start.get("config") or {}
    method, model = config.get("method") or {}, config.get("model") or {}
    parts = [
        str(method.get("name", "")),
        f"on {shortened(str(model['name']))}" if model.get("name") else "",
        f"(flexlora {now.start['version']})" if now.start.get("version") else "",
    ]
    return " ".join(part for part in parts if part) or "Nothing was recorded yet."


def _share(now: RunState) -> float:
    if not now.planned:
        return 0.0
    current = min(len(now.busy["answered"]) / now.wanted, 1.0) if now.wanted else 0.0
    return round(min((now.rounds + current) / now.planned, 1.0), 4)


def _progress(now: RunState) -> str:
    if not now.start:
        return "not started"
    planned = f" of {now.planned:,}" if now.planned else ""
    text = f"round {now.round:,}{planned}"
    if now.round == now.rounds:
        return f"{text} finished" if now.rounds else text
    wanted = f" of {now.wanted:,}" if now.wanted else ""
    return f"{text}: {len(now.busy['answered']):,}{wanted} uploads"


def _time_left(now: RunState, left: Estimate | None) -> list[str]:
    """The estimated time left; of a run that is over, how long it took."""
    if now.finish:
        return ["Took", duration(now.finish.get("seconds")), "since it was started or resumed"]
    if left is None:
        return ["Time left", NOTHING, "" if now.state == "stopped" else "not known yet"]
    note = "without evaluations" if left.without_evaluations else "estimated"
    return ["Time left", duration(left.seconds), note]


def _facts(now: RunState, at: float) -> list[list[str]]:
    last, totals = now.last_round, now.totals
    rate = "in the last round" if last else ""
    took, server = last.get("seconds"), last.get("aggregate_seconds")
    sent = {way: f"{size(last[way])} in the last round" if last else "" for way in _WAYS}
    unused = now.losses[LossKind.NOT_NEEDED]
    notes = [
        f"{n:,} {kind.text}" for kind, n in now.losses.items() if kind is not LossKind.NOT_NEEDED
    ]
    notes += [f"{counted(unused, 'upload')} not needed"] if unused else []
    notes += [f"{counted(totals['strays'], 'late answer')} ignored"] if totals["strays"] else []
    notes += [f"{counted(totals['refused'], 'client')} rejected"] if totals["refused"] else []
    failed = sum(now.losses.values()) - unused
    aggregation = f"of which {duration(server, 1)} aggregation" if last else ""
    return [
        ["Training loss", number(now.loss, 3), "nats per token, last round" if last else ""],
        ["Speed", number(now.tokens_per_second, 0, " tokens/s"), rate],
        ["Last round", duration(took, 1), aggregation],
        ["Last event", _ago(now.last_time, at), "in the journal"],
        ["Received", size(totals["bytes_up"]), sent["bytes_up"]],
        ["Sent", size(totals["bytes_down"]), sent["bytes_down"]],
        ["Client failures", f"{failed:,}", ", ".join(notes)],
    ]


_WAYS = ("bytes_up", "bytes_down")


def _score_cells(row: Scores) -> list[str]:
    return [
        shortened(row.adapter),
        f"{row.round:,}",
        row.group,
        f"{row.examples:,}",
        f"{row.rouge_l:.1f}",
        f"{row.exact_match:.1f}",
        f"{row.loss:.3f}",
    ]


def _row(now: RunState, client: ClientState, at: float) -> dict[str, Any]:
    state = now.state_of(client.name)
    config = now.start.get("config") or {}
    return {
        "state": state,
        "cells": [
            shortened(client.name),
            rank_type_text(client.rank_type, client.ranks, config) or NOTHING,
            NOTHING if client.examples is None else f"{client.examples:,}",
            _client_state(state, client, at),
            number(client.tokens_per_second, 0),
            size(client.bytes_up),
            size(client.bytes_down),
            f"{client.turns:,}",
            f"{client.lost:,}",
            _ago(client.seen, at),
        ],
    }


def _client_state(state: str, client: ClientState, at: float) -> str:
    if state == "training" and client.since is not None:
        return f"training for {age(at - client.since)}"
    if state == "idle" and client.loss_kind is LossKind.NOT_NEEDED:
        return "idle: its upload was not needed"
    if state == "idle" and client.reason:
        return f"idle; last failure: {shortened(client.reason, _LONGEST_REASON)}"
    return f"failed: {shortened(client.reason, _LONGEST_REASON)}" if state == "lost" else state


def _count(now: RunState) -> str:
    names = {"lost": "failed"}
    states = ", ".join(
        f"{count:,} {names.get(state, state)}" for state, count in now.by_state.items() if count
    )
    active, registered = len(now.clients), now.start.get("clients") or 0
    of = f"{active:,} of {registered:,} clients have been active"
    text = of if active < registered else counted(active, "client")
    return f"{text}: {states}." if states else f"{text}."


def _ago(time: float | None, at: float) -> str:
    return NOTHING if time is None else f"{age(at - time)} ago"
