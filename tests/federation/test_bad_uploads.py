"""Every bad upload of the corpus in a round: refused with its code, and the round as without it."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexlora.federation import client_turn, collect, setup
from flexlora.federation.client_store import ClientStore
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.collect import Collector
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import Lost, Reply, WaitPolicy
from flexlora.journal.events import LossKind
from flexlora.journal.record import Record
from flexlora.method import State
from flexlora.storage.untrusted import RefusalCode
from support import models
from support.bad_uploads import BAD, Parts, built

SAME = {"rank": 3, "types": None, "distribution": None}
METHODS = {
    "plain": {"method": {"name": "flexlora"}},
    "sparse": {"method": {"name": "flasc"}, "ranks": SAME},
    "numbered": {"method": {"name": "fslora"}},
    "aux": {
        "method": {"name": "fedit"},
        "regularizer": {"name": "scaffold"},
        "training": {"optimizer": "sgd"},
        "ranks": SAME,
    },
}
VICTIM = "client1"
EVERY = int(os.environ.get("FLEXLORA_BAD_UPLOADS_EVERY", "12"))
"""Of how many bad uploads one goes through the aggregation too; 1 for all of them."""


@dataclass(frozen=True)
class Replayed:
    """Uploads made before; nobody trains."""

    uploads: dict[str, bytes]
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply | Lost]:
        for job in jobs:
            if job.client in self.uploads:
                yield Reply(job.client, self.uploads[job.client])
            else:
                yield Lost(job.client, "unplugged", LossKind.NO_ANSWER)


@dataclass(frozen=True)
class Round:
    """The first round of a run: what is sent, what honest clients answer, and where it is."""

    ready: PreparedRun
    state: State
    folder: Path
    good: dict[str, bytes]
    most: dict[str, int]

    def collected(self, uploads: dict[str, bytes]) -> tuple[Collector, list[dict]]:
        spool = self.folder / "uploads-00001"
        spool.mkdir(exist_ok=True)
        for file in spool.glob("*.safetensors"):
            file.unlink()
        collector = Collector(self.ready, Replayed(uploads), 1, self.state, spool)
        return collector, list(collector.events(Record(self.folder)))

    def after(self, collector: Collector) -> State:
        context = self.ready.context(1)
        uploads = [collector.uploads[id] for id in self.ready.clients if id in collector.uploads]
        cohort = self.ready.averager.cohort(uploads, self.ready.method.weights, context)
        return self.ready.method.aggregate(collector.state, cohort, context)


def first_round(folder: Path, **changes) -> Round:
    """With both clients in the cohort, so that the victim is."""
    where = {
        "federation": {"rounds": 1, "cohort": 2, "quorum": 1},
        "evaluation": {"seen_clients": 0, "truncated": False},
    }
    ready = setup.prepare(models.settings(folder, **where, **changes), models.corpus(2))
    ready = ready.with_runtime(clients=ClientStore(folder / "clients"))
    state = ready.method.start(ready.fresh(), ready.context(0))
    requests = collect.turn_requests(ready, 1, state, list(ready.clients), folder / "downloads")
    good, most = {}, {}
    for request in requests:
        good[request.client] = client_turn.turn(request, ready.runtime)
        most[request.client] = request.most_bytes_up
    return Round(ready, state, folder, good, most)


@pytest.fixture(scope="module", params=METHODS)
def group(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def round_(group, tmp_path_factory) -> Round:
    folder = tmp_path_factory.mktemp(group)
    models.save(folder / "model")
    return first_round(folder, **METHODS[group])


def assert_same(got: State, want: State) -> None:
    assert got.model.keys() == want.model.keys()
    for module, factors in want.model.items():
        assert torch.equal(got.model[module].B, factors.B)
        assert torch.equal(got.model[module].A, factors.A)


def test_the_corpus_is_large_and_of_all_kinds():
    assert sum(map(len, BAD.values())) >= 350
    codes = {each.code for cases in BAD.values() for each in cases.values()}
    assert codes == set(RefusalCode) - {RefusalCode.UNREADABLE, RefusalCode.UNEXPECTED}


def test_good_uploads_are_used_and_almost_as_large_as_they_can_be(round_, group):
    """Taken apart and built again too, so that the bad ones differ by what their names say."""
    for uploads in (round_.good, {id: built(Parts.of(data)) for id, data in round_.good.items()}):
        _, events = round_.collected(uploads)
        assert [event["event"] for event in events] == ["client"] * 2
    for client, data in round_.good.items():
        slack = round_.most[client] - len(data)
        tensors = len(Parts.of(data).tensors)
        assert 0 <= slack < (12 * tensors if group != "sparse" else round_.most[client])


def test_each_is_refused_with_its_code_and_the_round_is_as_without_it(
    round_, group, capsys, monkeypatch
):
    monkeypatch.setattr(
        os, "fsync", lambda _: None
    )  # what survives a power cut is tested elsewhere
    others = {client: data for client, data in round_.good.items() if client != VICTIM}
    without, _ = round_.collected(others)
    expected = round_.after(without)
    same, wrong = [round_.good[VICTIM], built(Parts.of(round_.good[VICTIM]))], []
    for number, (name, case) in enumerate(BAD[group].items()):
        data = case.make(round_.good[VICTIM])
        assert data not in same, name
        collector, events = round_.collected({**others, VICTIM: data})
        losses = [event for event in events if event["event"] == "lost"]
        assert len(losses) == 1, name
        lost = losses[0]
        assert (lost["client"], lost["kind"]) == (VICTIM, LossKind.INVALID_UPLOAD), name
        if lost["code"] != case.code:
            wrong.append(f"{name}: {lost['code']}, not {case.code}: {lost['reason']}")
        assert lost["reason"].isprintable() and len(lost["reason"]) < 900, name
        assert collector.uploads.keys() == others.keys(), name
        assert len(list(collector.spool.glob("*.safetensors"))) == len(others), name
        if number % EVERY == 0:
            assert_same(round_.after(collector), expected)
    assert not wrong, "\n".join(wrong)
    assert capsys.readouterr().err == ""
