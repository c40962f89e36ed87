"""What a journal may contain: the types of events with their fields, and the kinds of losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

JOURNAL = "metrics.jsonl"
"""The journal's file name in the folder of a run."""

Event = dict[str, Any]
"""One line of the journal, an object. ``event`` names its type, one of ``EVENTS``; ``time`` is when
it was written, in seconds since 1970."""


@dataclass(frozen=True)
class EventType:
    """One type of event: when it is written, and what its fields contain.

    The ``optional`` fields are missing in some events, or in journals of earlier versions.
    """

    when: str
    fields: Mapping[str, str]
    optional: Mapping[str, str]


class LossKind(StrEnum):
    """Why a round goes on without a client's upload; the field ``kind`` of a ``lost`` event.

    Status pages, metrics and reports read the kind; the reason beside it is for people only.
    """

    NO_ANSWER = "no_answer"
    """Its local training was not over, or nothing had come back, at the deadline."""

    NOT_BEGUN = "not_begun"
    """Its local training had not begun at the deadline."""

    NOT_NEEDED = "not_needed"
    """The round had enough uploads before this one came (over-selection); no failure."""

    INVALID_UPLOAD = "invalid_upload"
    """Its upload cannot be read, or is not the upload that the round asks for."""

    TOO_LARGE_CHANGE = "too_large_change"
    """Its upload would change the model many times more than the others' do."""

    CLIENT_ERROR = "client_error"
    """The client reported an error of its own."""

    UNREACHABLE = "unreachable"
    """Its node is offline, or the transport could not carry the request or the answer."""

    LOST_STATE = "lost_state"
    """The client reported that its stored state is gone, so it cannot use the download."""

    WORKER_DIED = "worker_died"
    """The processes that trained it died, as often as the transport tries again."""

    OTHER = "other"
    """None of these, and every loss in a journal that was written without kinds."""

    @property
    def text(self) -> str:
        """The kind in words, for people."""
        return "of another kind" if self is LossKind.OTHER else self.replace("_", " ")


def loss_kind(event: Mapping[str, Any]) -> LossKind:
    """The kind of a ``lost`` event; ``OTHER`` if it has none, or one of a later version."""
    try:
        return LossKind(event.get("kind", LossKind.OTHER))
    except ValueError:
        return LossKind.OTHER


def _type(when: str, optional: Mapping[str, str] | None = None, /, **fields: str) -> EventType:
    return EventType(when, fields, optional or {})


_ROUND = "the number of the round, from 1"
_CLIENT = "the client's name"
_TOTALS = {
    "examples": "examples trained on, every pass counted",
    "tokens": "tokens of these examples",
    "loss_total": "sum of the training loss in nats",
    "loss_tokens": "tokens in that sum; loss_total / loss_tokens is the mean training loss",
    "bytes_up": "bytes of uploads",
    "bytes_down": "bytes of downloads",
}

EVENTS: Mapping[str, EventType] = {
    "start": _type(
        "The run starts, or is resumed.",
        {
            "notices": (
                "[sentences for people: what is configured without effect, or done unusually]"
            ),
            "rounds_done": "rounds completed before, if it goes on from a checkpoint",
            "questions": "test rows that every evaluated adapter answers",
            "truncated": "[rank types that the last adapter is also evaluated truncated to]",
        },
        version="version of flexlora",
        config="all settings",
        hardware="processor, cores, device and threads, as text",
        versions="{package: version}",
        clients="number of clients that train",
        unseen_clients="number of held-out clients",
        modules="number of adapted modules",
        rank_types="{rank type: number of clients}",
        ranks="{rank type: [different ranks of its modules]}",
        trainable="{rank type: trainable parameters of one client}",
        clients_at_once="clients trained at the same time",
        resumed="whether the run goes on from a checkpoint",
    ),
    "joined": _type(
        "A client of a real federation connected, or connected again.",
        {
            "note": "a remark for people, such as that its weight is limited",
            "holdout": "examples that it holds out of its training for evaluation",
        },
        round=_ROUND,
        client=_CLIENT,
        rank_type="its rank type",
        ranks="[different ranks of its modules]",
        examples="examples that it trains on",
        device="the PyTorch device that it trains on",
        tokens_per_second="its measured training speed, or null",
    ),
    "refused": _type(
        "A node of a real federation was rejected.",
        {"client": "the client's name, if its key is registered"},
        round=_ROUND,
        reason="why, for people",
    ),
    "asked": _type(
        "A client of a real federation was sent its request.", round=_ROUND, client=_CLIENT
    ),
    "client": _type(
        "A usable upload arrived.",
        round=_ROUND,
        client=_CLIENT,
        rank_type="its rank type",
        **_TOTALS,
        computed="tokens that went through the model; shared prefixes count once",
        steps="optimizer steps",
        seconds="seconds of local training",
    ),
    "lost": _type(
        "The round goes on without a client.",
        {
            "kind": "a LossKind; not in journals of earlier versions",
            "code": "of an invalid upload, a RefusalCode: which check it failed",
        },
        round=_ROUND,
        client=_CLIENT,
        reason="why, for people",
    ),
    "stray": _type(
        "A late or second answer arrived; it changes nothing.",
        round="the round in progress",
        client=_CLIENT,
        reason="why it is not used, for people",
    ),
    "short": _type(
        "An attempt ended with fewer uploads than the quorum.",
        round=_ROUND,
        attempt="the number of the attempt, from 1",
        received="usable uploads so far",
        quorum="uploads that the round needs",
    ),
    "clipped": _type(
        "An upload changed more than the others, and was scaled down.",
        round=_ROUND,
        client=_CLIENT,
        ratio="how many times the median change it was",
        share="which share of its change was kept",
    ),
    "limited": _type(
        "Clients had more than the largest share of the weights; they count less.",
        round=_ROUND,
        most_share="federation.most_share",
        shares="{client: the share of the cohort's weights that it would have had}",
    ),
    "kept": _type(
        "The aggregate of a round is not usable; the model stays as it was before the round.",
        round=_ROUND,
        reason="why, for people",
    ),
    "round": _type(
        "A round was aggregated.",
        round=_ROUND,
        cohort="[clients that were sent a request]",
        received="usable uploads",
        **_TOTALS,
        seconds="seconds of the whole round",
        aggregate_seconds="of these, seconds of aggregation",
        update_norm="Frobenius norm of the global update",
    ),
    "weights": _type(
        "An averager that compares clients has weighted those of a round.",
        round=_ROUND,
        shares="{client: its share of the weights; 0 if it was left out}",
        scores=(
            "{client: its distance to the geometric median, its score in multi-Krum, or its cosine "
            "to the trusted client}"
        ),
    ),
    "spectrum": _type(
        "The singular values of the global update after a round.",
        round=_ROUND,
        rank_levels="[ranks in use], ascending",
        energy=(
            "{module: [share of the squared singular values in each block between two levels, then "
            "beyond the last]}"
        ),
        values="{module: [singular values]}, of a few modules",
    ),
    "evaluation": _type(
        "An adapter was evaluated.",
        round="the number of the round; 0 is before training",
        adapter="base, global, or the rank type that the global adapter was truncated to",
        seconds="its share of the time, if several adapters were evaluated together",
        clients=(
            "[{client, category, seen, examples, rouge_l, exact_match (sums over examples), "
            "loss_total, loss_tokens}]"
        ),
    ),
    "client_evaluation": _type(
        "Clients evaluated the global adapter on rows of their own that never train.",
        round="the number of the round; 0 is the base model before training",
        clients="[{client, examples, loss_total (nats), loss_tokens}], in the order of the names",
        missing="{client: why it did not evaluate, for people}",
        loss="mean loss in nats per token, weighted by tokens; null if no client evaluated",
        loss_min="the lowest of the clients' own mean losses, or null",
        loss_max="the highest of them, or null",
        loss_std="their standard deviation, every client counted once, or null",
        worst="name of the client with the highest loss, or null",
        seconds="seconds of the whole evaluation",
        bytes_down="bytes of the adapters that were sent for it; 0 in a simulation",
    ),
    "damaged": _type(
        "A file of the run was damaged; the run goes on without what it contained.",
        round="the round in progress, or after which a resumed run goes on",
        file="the file, below the run's folder",
        reason="what was found and what is done about it, for people",
    ),
    "certificate": _type(
        "A certificate of a real federation's server expires within 30 days, or was renewed.",
        round="the round in progress",
        note="what there is to know and to do, for people",
        renewed="whether it was renewed",
    ),
    "stopped": _type("A real federation stopped with an error.", reason="the error, for people"),
    "finish": _type(
        "The run is complete.",
        {"sha256": "{file of the adapter: its SHA-256}; not in journals of earlier versions"},
        rounds="rounds completed",
        seconds="seconds since it was started or resumed",
        adapter="path of the global adapter",
    ),
}
"""The types of events by name."""
