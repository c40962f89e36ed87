"""A round's uploads as the config's averager weights them, and what the journal says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flexlora.federation.prepared import PreparedRun
from flexlora.lowrank import normalized
from flexlora.method import Changes, Cohort, State, Untrained, Upload, space_of


def cohort_of(prepared: PreparedRun, state: State, uploads: Sequence[Upload], round: int) -> Cohort:
    """The uploads of a round in which ``state`` was handed out, as a cohort.

    None counts more examples than the config lets it.

    An averager that compares clients reads every upload once, and what was handed out; the
    others read nothing yet.

    Raises:
        ProtocolError: the averager cannot do without a client that is missing.
    """
    method, context, settings = prepared.method, prepared.context(round), prepared.experiment
    if (most := settings.federation.most_examples) is not None:
        uploads = [replace(upload, examples=min(upload.examples, most)) for upload in uploads]
    clients = {upload.client: prepared.clients[upload.client] for upload in uploads}
    untrained = Untrained(method, state, context, clients, prepared.wire_dtype)
    share = settings.federation.most_share
    changes = Changes(uploads, untrained, space_of(method), method.weights, share)
    return prepared.averager.cohort(uploads, method.weights, context, changes)


def weights_facts(cohort: Cohort, uploads: Sequence[Upload]) -> dict[str, Any] | None:
    """The share of every client of the round and its score; None where clients are not compared."""
    if not cohort.scores:
        return None
    shares = dict(zip(cohort.clients, normalized(list(cohort.weights.values())), strict=True))
    return {
        "shares": {upload.client: shares.get(upload.client, 0.0) for upload in uploads},
        "scores": dict(cohort.scores),
    }
