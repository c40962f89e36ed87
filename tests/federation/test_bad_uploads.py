"""Every bad upload of the corpus in a round: refused with its code, and the round as without it."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.federation import client_turn, collect, setup
from flexlora.federation.client_store import ClientStore, file_name
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.collect import Collector
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import Lost, Reply, WaitPolicy
from flexlora.journal.events import LossKind
from flexlora.journal.record import Record
from flexlora.method import State
from flexlora.storage import write_summed
from flexlora.storage.untrusted import RefusalCode
from flexlora.wire import validate
from support import models
from support.bad_uploads import BAD, Parts, built, edited

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

    def collector(self, uploads: dict[str, bytes]) -> Collector:
        """In the spool as it is."""
        spool = self.folder / "uploads-00001"
        return Collector(self.ready, Replayed(uploads), 1, self.state, spool)

    def collected(self, uploads: dict[str, bytes]) -> tuple[Collector, list[dict]]:
        """In an empty spool; the events too."""
        shutil.rmtree(self.folder / "uploads-00001", ignore_errors=True)
        (self.folder / "uploads-00001").mkdir()
        collector, events = self.collector(uploads), []
        with contextlib.suppress(ProtocolError):  # too few for the quorum
            events += collector.events(Record(self.folder))
        return collector, events

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


@pytest.fixture(
    scope="module",
    params=["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "plain")],
)
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
    of_others = {RefusalCode.UNREADABLE, RefusalCode.UNEXPECTED}
    by_comparison = {RefusalCode.TOO_LARGE_CHANGE, RefusalCode.CANCELLING}
    assert codes == set(RefusalCode) - of_others - by_comparison


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
    round_, group, capsys, unsynced
):
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


# --- a start that meets one on the disk ----------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Round:
    folder = tmp_path_factory.mktemp("again")
    models.save(folder / "model")
    return first_round(folder, **METHODS["plain"])


def stored(round_: Round, data: bytes) -> Path:
    """The spool of a run that was killed after it had written the victim's upload."""
    _, _ = round_.collected({})  # makes it, and empties it
    file = round_.folder / "uploads-00001" / f"{file_name(VICTIM)}.safetensors"
    write_summed(file, data)
    return file


POISON = [
    "tensors: [2^63, 0]",
    "tensors: [2^64 - 1, 0]",
    "tensors: 1,000 dimensions",
    "JSON: depth 2,000",
    "offsets: at 2^200",
    "values: NaN",
    "fields: client of a surrogate",
]


@pytest.mark.parametrize("name", POISON)
def test_a_start_that_meets_a_bad_upload_removes_it_and_asks_again(plain, name):
    """The client may have been repaired since; the run must go on in any case."""
    case = BAD["plain"][name]
    file = stored(plain, case.make(plain.good[VICTIM]))
    others = {client: data for client, data in plain.good.items() if client != VICTIM}
    collector = plain.collector(others)
    losses = [e for e in collector.events(Record(plain.folder)) if e["event"] == "lost"]
    assert [loss["code"] for loss in losses[:1]] == [case.code]
    assert not file.exists() and collector.uploads.keys() == others.keys()
    again = plain.collector(plain.good)
    assert [e["event"] for e in again.events(Record(plain.folder))] == ["client"] * 2


def test_an_upload_from_the_disk_counts_what_was_sent_not_what_it_says(plain):
    """Also one that was stored before a kill: the download is made again to be counted."""
    sizes = {}
    data = edited(lambda p: p.fields["facts"].update(bytes_down=123))(plain.good[VICTIM])
    for how in ("sent", "stored"):
        if how == "stored":
            stored(plain, data)
        else:
            plain.collected({})
        events = list(plain.collector({**plain.good, VICTIM: data}).events(Record(plain.folder)))
        (sizes[how],) = [e["bytes_down"] for e in events if e.get("client") == VICTIM]
    honest, _ = plain.collected(plain.good)
    assert sizes["sent"] == sizes["stored"] == honest.uploads[VICTIM].metrics["bytes_down"] != 123


@pytest.mark.parametrize(
    "error",
    [
        TypeError("empty(): argument 'size' failed to unpack"),
        RuntimeError("can't allocate memory"),
        MemoryError(),
        OverflowError("too large"),
        RecursionError("too deep"),
        KeyError("x"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_looking_at_an_upload_raises_costs_that_client_alone(
    plain, monkeypatch, capsys, error
):
    """A fault of ours: the round goes on, the traceback is printed, and no start meets it again."""
    values = validate.values

    def faulty(upload, place):
        if upload.client == VICTIM:
            raise error
        values(upload, place)

    monkeypatch.setattr(validate, "values", faulty)
    collector, events = plain.collected(plain.good)
    (lost,) = [event for event in events if event["event"] == "lost"]
    assert (lost["client"], lost["code"]) == (VICTIM, RefusalCode.UNEXPECTED)
    assert type(error).__name__ in lost["reason"] and "report" in lost["reason"]
    assert "Traceback" in capsys.readouterr().err
    assert collector.uploads.keys() == plain.good.keys() - {VICTIM}
    assert len(list(collector.spool.glob("*.safetensors"))) == 1


def test_a_fault_of_the_method_ends_the_run_as_any_bug_does(plain, monkeypatch):
    """It must not look like one of the clients."""
    monkeypatch.setattr(
        type(plain.ready.method), "upload_spec", lambda *_: (_ for _ in ()).throw(KeyError("bug"))
    )
    with pytest.raises(KeyError, match="bug"):
        plain.collected(plain.good)


def test_a_disk_that_does_not_give_an_upload_back_costs_that_client(plain, monkeypatch):
    opened = wire.open_upload

    def failing(path, expected):
        if expected.client == VICTIM:
            raise OSError(5, "Input/output error", str(path))
        return opened(path, expected)

    monkeypatch.setattr(wire, "open_upload", failing)
    _, events = plain.collected(plain.good)
    (lost,) = [event for event in events if event["event"] == "lost"]
    assert lost["code"] == RefusalCode.UNREADABLE and "Input/output error" in lost["reason"]


def test_an_upload_that_is_too_large_is_not_written(plain, monkeypatch):
    written = []
    write = collect.write_summed
    monkeypatch.setattr(
        collect, "write_summed", lambda path, data: written.append(len(data)) or write(path, data)
    )
    _, events = plain.collected({**plain.good, VICTIM: plain.good[VICTIM] + bytes(10**6)})
    assert [e.get("code") for e in events if e["event"] == "lost"] == [RefusalCode.WRONG_SIZE]
    assert len(written) == 1
