"""How a run stands, as metrics that Prometheus scrapes.

No label is a client's name: there are as many series as states, kinds of losses and adapters.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from flexlora.reporting.watch.run_state import FAILED, LOSSES, RunState, Scores

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def text(standing: RunState) -> bytes:
    """All metrics as Prometheus reads them, counted since the start of the run."""
    registry = CollectorRegistry()
    registry.register(_Collector(standing))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, standing: RunState) -> None:
        self.standing = standing

    def collect(self) -> Iterator[Metric]:
        yield from _counters(self.standing)
        yield from _gauges(self.standing)
        yield from _evaluations(self.standing)


def _counters(now: RunState) -> Iterator[Metric]:
    for name, said, key in (
        ("rounds", "Rounds finished.", "rounds"),
        ("uploads", "Uploads that were of use.", "uploads"),
        ("strays", "Answers that nobody waited for any more: late or second ones.", "strays"),
        ("refusals", "Nodes that were not let in.", "refused"),
        ("upload_bytes", "Bytes of the uploads that were of use.", "bytes_up"),
        ("download_bytes", "Bytes handed out to clients whose uploads were of use.", "bytes_down"),
        ("tokens", "Tokens of the examples that were trained on.", "tokens"),
    ):
        yield CounterMetricFamily(f"flexlora_{name}", said, value=now.totals[key])
    lost = CounterMetricFamily("flexlora_lost", "Turns of clients that were lost.", labels=["kind"])
    for kind in dict.fromkeys((*LOSSES.values(), FAILED)):
        lost.add_metric([kind], now.losses[kind])
    yield lost


def _gauges(now: RunState) -> Iterator[Metric]:
    last = now.last_round
    for name, said, value in (
        ("round", "The round that goes on, or the last one.", now.round),
        ("rounds_planned", "Rounds that the config asks for.", now.planned),
        ("finished", "1 when the run has come to its end.", int(now.finish is not None)),
        ("short_of_quorum", "1 while too few clients answered.", int(now.state == "short")),
        ("training_loss", "Mean training loss of the last round in nats a token.", now.loss),
        ("update_norm", "Norm of the global update after the last round.", last.get("update_norm")),
        ("round_seconds", "Seconds of the last round.", last.get("seconds")),
        ("server_seconds", "Of these, seconds of aggregation.", last.get("aggregate_seconds")),
        ("tokens_per_second", "Tokens of the last round by its seconds.", now.tokens_per_second),
        ("last_event_timestamp_seconds", "When the journal last grew.", now.last_time),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"flexlora_{name}", said, value=value)
    clients = GaugeMetricFamily("flexlora_clients", "Clients heard of.", labels=["state"])
    for state, count in now.by_state.items():
        clients.add_metric([state], count)
    yield clients


def _evaluations(now: RunState) -> Iterator[Metric]:
    labels = ["adapter", "clients"]
    for key, said in (
        ("loss", "Loss of the latest evaluation in nats a token."),
        ("rouge_l", "Rouge-L of the latest evaluation in percent."),
        ("exact_match", "Exact matches of the latest evaluation in percent."),
    ):
        family = GaugeMetricFamily(f"flexlora_evaluation_{key}", said, labels=labels)
        for scores in now.scores.values():
            family.add_metric([scores.adapter, scores.group], _score(scores, key))
        yield family


def _score(scores: Scores, key: str) -> float:
    return float(getattr(scores, key))
