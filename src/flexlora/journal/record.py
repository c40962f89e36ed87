"""What remains of a run: an append-only journal of events that reports read and nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL = "metrics.jsonl"

Event = dict[str, Any]
"""One line of the journal; its kind stands under ``event``, and under ``time`` when it was
written, in seconds since 1970. The kinds and their fields:

``start``       version, config, hardware, versions, clients, unseen_clients, modules,
                rank_types {name: clients}, ranks {name: [ranks in use]},
                trainable {name: parameters}, clients_at_once, resumed (bool)
``joined``      client, rank_type, ranks (those in use), examples, device, tokens_per_second,
                note (what is to be said of it): a client that came to a real federation, or
                came back
``asked``       round, client: it was handed its job (a real federation)
``client``      round, client, rank_type, examples, tokens (of the examples), computed
                (tokens that went through the model: shared ones once), steps,
                loss_total, loss_tokens (their quotient is the mean training loss),
                seconds, bytes_up, bytes_down
``lost``        round, client, reason (for people), kind (a ``LossKind``; journals of earlier
                versions have none)
``stray``       round (the one going on), client, reason: a late or second answer
``short``       round, attempt, received, quorum: too few answered, others are asked
``round``       round, cohort (clients asked), received, examples, tokens, loss_total,
                loss_tokens, seconds (the whole round), aggregate_seconds, bytes_up,
                bytes_down, update_norm
``spectrum``    round, rank_levels [8, 30, 200], energy {module: [share of the squared
                singular values in each block between levels, then beyond the last]},
                values {module: [singular values]} for a few modules
``evaluation``  round (0 is before training), adapter ("base", "global", "type1", ...),
                seconds (its part of the clock, where several adapters were evaluated at
                once), clients [{client, category, seen, examples, rouge_l, exact_match
                (sums over examples), loss_total, loss_tokens}]
``finish``      rounds, seconds, adapter (its path)
"""


@dataclass(frozen=True)
class Record:
    """The journal of the run in ``folder``."""

    folder: Path

    @property
    def path(self) -> Path:
        """Where the journal lies."""
        return self.folder / JOURNAL

    @property
    def bytes(self) -> int:
        """How long the journal is now; a checkpoint remembers it."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event, make sure that it is on the disk, and return it.

        Raises:
            ValueError: a field holds NaN or infinity, which JSON cannot say.
        """
        entry: Event = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(entry, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        return entry

    def rewind(self, length_bytes: int) -> None:
        """Forget what was written after the journal had this length."""
        if self.bytes > length_bytes:
            os.truncate(self.path, length_bytes)

    def events(self, *kinds: str) -> Iterator[Event]:
        """The events in order, all of them or those of the kinds named.

        A last line cut off by a crash is left out.
        """
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as journal:
            for line in journal:
                if not line.endswith("\n"):
                    return
                event: Event = json.loads(line)
                if not kinds or event["event"] in kinds:
                    yield event


def mean_scores(clients: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Example-weighted means of an evaluation's rows: totals are added, then divided once.

    ``rouge_l`` and ``exact_match`` are in percent, ``loss`` in nats a token.
    """
    examples = sum(row["examples"] for row in clients)
    tokens = sum(row["loss_tokens"] for row in clients)
    return {
        "examples": examples,
        "rouge_l": 100 * sum(row["rouge_l"] for row in clients) / max(examples, 1),
        "exact_match": 100 * sum(row["exact_match"] for row in clients) / max(examples, 1),
        "loss": sum(row["loss_total"] for row in clients) / max(tokens, 1),
    }
