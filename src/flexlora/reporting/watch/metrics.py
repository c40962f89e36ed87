"""The state of a run as metrics for Prometheus.

No label is a client's name: the number of series depends on states, kinds of losses and adapters.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from flexlora.journal import LossKind
from flexlora.reporting.watch.run_state import RunState, Scores

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def text(state: RunState) -> bytes:
    """All metrics as Prometheus reads them, counted since the start of the run."""
    registry = CollectorRegistry()
    registry.register(_Collector(state))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, state: RunState) -> None:
        self.state = state

    def collect(self) -> Iterator[Metric]:
        yield from _counters(self.state)
        yield from _gauges(self.state)
        yield from _evaluations(self.state)


def _counters(now: RunState) -> Iterator[Metric]:
    for name, description, key in (
        ("rounds", "Rounds completed.", "rounds"),
        ("uploads", "Usable uploads.", "uploads"),
        ("strays", "Late or repeated answers, which are ignored.", "strays"),
        ("refusals", "Nodes that were rejected.", "refused"),
        ("upload_bytes", "Bytes of usable uploads.", "bytes_up"),
        ("download_bytes", "Bytes of the downloads for usable uploads.", "bytes_down"),
        ("tokens", "Tokens of the examples that were trained on.", "tokens"),
    ):
        yield CounterMetricFamily(f"flexlora_{name}", description, value=now.totals[key])
    description = "Client rounds without a usable upload."
    lost = CounterMetricFamily("flexlora_lost", description, labels=["kind"])
    for kind in LossKind:
        lost.add_metric([kind.value], now.losses[kind])
    yield lost


def _gauges(now: RunState) -> Iterator[Metric]:
    last = now.last_round
    for name, description, value in (
        ("round", "The round in progress, or the last one.", now.round),
        ("rounds_planned", "Rounds in the config.", now.planned),
        ("finished", "1 when the run is complete.", int(now.finish is not None)),
        (
            "short_of_quorum",
            "1 while the round lacks uploads for its quorum.",
            int(now.state == "short"),
        ),
        ("training_loss", "Mean training loss of the last round in nats per token.", now.loss),
        ("update_norm", "Norm of the global update after the last round.", last.get("update_norm")),
        ("round_seconds", "Seconds of the last round.", last.get("seconds")),
        (
            "server_seconds",
            "Seconds of aggregation in the last round.",
            last.get("aggregate_seconds"),
        ),
        (
            "tokens_per_second",
            "Tokens of the last round per second of the round.",
            now.tokens_per_second,
        ),
        ("last_event_timestamp_seconds", "When the journal last grew.", now.last_time),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"flexlora_{name}", description, value=value)
    clients = GaugeMetricFamily(
        "flexlora_clients", "Clients that have been active, by state.", labels=["state"]
    )
    for state, count in now.by_state.items():
        clients.add_metric([state], count)
    yield clients


def _evaluations(now: RunState) -> Iterator[Metric]:
    labels = ["adapter", "clients"]
    for key, description in (
        ("loss", "Loss of the latest evaluation in nats per token."),
        ("rouge_l", "Rouge-L of the latest evaluation in percent."),
        ("exact_match", "Exact matches of the latest evaluation in percent."),
    ):
        family = GaugeMetricFamily(f"flexlora_evaluation_{key}", description, labels=labels)
        for scores in now.scores.values():
            family.add_metric([scores.adapter, scores.group], _score(scores, key))
        yield family


def _score(scores: Scores, key: str) -> float:
    return float(getattr(scores, key))
