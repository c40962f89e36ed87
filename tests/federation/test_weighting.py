"""Robust averagers in whole runs: the journal, resumption to the bit, and a trusted client."""

import dataclasses
import itertools

import pytest

from flexlora.errors import ConfigError, ProtocolError
from flexlora.federation import checkpoint, rounds, setup
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Lost, Reply
from flexlora.journal import LossKind
from flexlora.lowrank import Adapter, Factors
from flexlora.method import averagers
from support import models

SILENT = {"seen_clients": 0, "unseen_clients": 0, "base": False, "truncated": False}


@pytest.fixture(scope="module")
def ready(folder):
    """A run of six clients under the geometric median."""
    return prepared(folder, {"name": "geometric_median"})


def prepared(folder, averager, base=None, **federation):
    settings = models.settings(
        folder,
        averager=averager,
        evaluation=SILENT,
        federation={"rounds": 2, "cohort": 6, "quorum": 5, **federation},
    )
    return setup.prepare(settings, models.corpus(), base=base)


def with_averager(ready, section, **federation):
    """The same clients and model under another averager."""
    settings = ready.experiment.federation.model_copy(update=federation)
    return dataclasses.replace(
        ready,
        averager=averagers.make(section),
        experiment=ready.experiment.model_copy(
            update={"averager": section, "federation": settings}
        ),
    )


def model(folder) -> Adapter:
    return checkpoint.load(folder).state.model


def same(one: Adapter, other: Adapter) -> bool:
    def equal(f: Factors, g: Factors) -> bool:
        return bool((f.B == g.B).all() and (f.A == g.A).all())

    return all(equal(f, other[m]) for m, f in one.items())


def test_the_journal_has_the_share_and_the_score_of_every_client(ready, tmp_path):
    events = list(rounds.run(ready, tmp_path / "run"))
    weights = [event for event in events if event["event"] == "weights"]
    assert [event["round"] for event in weights] == [1, 2]
    for event in weights:
        assert list(event["shares"]) == list(event["scores"]) == list(ready.clients)
        assert sum(event["shares"].values()) == pytest.approx(1)
        assert all(score > 0 for score in event["scores"].values())
    assert model(tmp_path / "run")


def test_plain_averaging_says_nothing_of_weights(ready, tmp_path):
    plain = with_averager(ready, {"name": "plain"})
    events = itertools.takewhile(
        lambda event: event["event"] != "spectrum", rounds.run(plain, tmp_path / "plain")
    )
    assert "weights" not in {event["event"] for event in events}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geometric_median", "multi_krum"])
def test_a_run_that_was_stopped_is_the_same_to_the_bit(ready, tmp_path, name):
    run = with_averager(ready, {"name": name})
    whole = list(rounds.run(run, tmp_path / "whole"))
    for event in rounds.run(run, tmp_path / "stopped"):
        if event["event"] == "client" and event["round"] == 2:
            break
    resumed = list(rounds.run(run, tmp_path / "stopped", resume=True))
    assert same(model(tmp_path / "whole"), model(tmp_path / "stopped"))
    last = [[e for e in each if e["event"] == "weights"][-1] for each in (whole, resumed)]
    assert last[0]["shares"] == last[1]["shares"] and last[0]["scores"] == last[1]["scores"]
    if name == "multi_krum":
        # Of six one may be malicious, so that two are left out.
        assert list(last[0]["shares"].values()).count(0.0) == 2


def test_the_trusted_client_is_in_every_round(ready, tmp_path):
    trusted = with_averager(ready, {"name": "fltrust", "trusted": "client3"}, cohort=2, quorum=1)
    events = list(rounds.run(trusted, tmp_path / "trusted"))
    for event in events:
        if event["event"] == "round":
            assert "client3" in event["cohort"] and event["received"] == 2
        if event["event"] == "weights":
            assert event["scores"]["client3"] == pytest.approx(1)


@dataclasses.dataclass(frozen=True)
class Losing:
    """A transport that loses the uploads of one client."""

    inner: SimulatedTransport
    client: str
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs, patience):
        for reply in self.inner.exchange(jobs, patience):
            lost = isinstance(reply, Reply) and reply.client == self.client
            yield Lost(self.client, "It is offline.", LossKind.UNREACHABLE) if lost else reply


def test_without_the_trusted_client_there_is_no_round(ready, tmp_path):
    trusted = with_averager(
        ready, {"name": "fltrust", "trusted": "client3"}, cohort=2, quorum=1, attempts=2
    )
    losing = Losing(SimulatedTransport(trusted.runtime), "client3")
    with pytest.raises(ProtocolError, match=r"None came from \['client3'\], without which"):
        list(rounds.run(trusted, tmp_path / "lost", losing))


def test_what_cannot_work_is_refused_before_anything_is_trained(folder, ready):
    for averager, quorum, message in (
        ({"name": "geometric_median"}, 2, r"set federation\.quorum to 3 or more"),
        ({"name": "multi_krum"}, 4, r"set federation\.quorum to 5 or more"),
        ({"name": "fltrust", "trusted": "nobody"}, 5, "'nobody', which does not train"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepared(folder, averager, ready.base, quorum=quorum)
    with pytest.raises(ConfigError, match="trusted is missing"):
        models.settings(folder, averager={"name": "fltrust"})
    with pytest.raises(ConfigError, match=r"has no option 'atackers'. Did you mean 'attackers'"):
        models.settings(folder, averager={"name": "multi_krum", "atackers": 0.1})
