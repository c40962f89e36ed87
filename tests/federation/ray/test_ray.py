"""Clients on Ray's workers: equal numbers, workers that die, rounds that do not wait."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from flexlora import methods, wire
from flexlora.config.experiment import Experiment
from flexlora.federation import rounds, setup
from flexlora.federation.client_store import ClientStore
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import Lost, Reply, WaitPolicy
from flexlora.journal.events import LossKind
from flexlora.journal.record import Record
from flexlora.laws.rounds import (
    client_turn,
    clients_of,
    cohort_of,
    context_of,
    first_state,
    noise,
)
from flexlora.lowrank.factors import Adapter
from flexlora.method.averager import Cohort
from flexlora.method.interface import Download, Method, RoundContext, State
from flexlora.method.wrapper import MethodWrapper
from support import models
from support.factors import random_adapter
from support.states import assert_same_factors, assert_same_values

ray = pytest.importorskip("ray", reason="Ray is not installed; it is in the extra 'ray'.")

from flexlora.federation.ray.cluster import Cluster, Machine, cluster, fitted, shared  # noqa: E402
from flexlora.federation.ray.partial_step import Step  # noqa: E402
from flexlora.federation.ray.pool import ATTEMPTS, RayTransport  # noqa: E402
from flexlora.federation.ray.resident import Resident, described  # noqa: E402

pytestmark = [
    # What Ray opens for its daemons, and the daemons that it leaves to end by themselves.
    pytest.mark.filterwarnings("ignore:unclosed file <_io.* name='/dev/null':ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


def test_cores_are_shared_out_among_workers():
    eight = Machine(8, 0)
    assert shared(eight, None, 3, on_gpu=False) == Cluster(3, 2)
    assert shared(eight, 2, None, on_gpu=False) == Cluster(4, 2)
    assert shared(eight, 5, 3, on_gpu=False) == Cluster(3, 5)
    assert shared(Machine(8, 2), None, None, on_gpu=True) == Cluster(2, 4, 1)


def test_workers_fit_on_single_machines():
    machines = [Machine(8, 1), Machine(5, 4), Machine(0, 0)]
    assert fitted(machines, None, 3, on_gpu=False) == Cluster(3, 4)
    assert fitted(machines, 3, None, on_gpu=False) == Cluster(3, 3)
    assert fitted(machines, None, None, on_gpu=True) == Cluster(5, 1, 1)
    assert fitted(machines, None, 2, on_gpu=True) == Cluster(2, 5, 1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: shared(Machine(8, 0), None, None, on_gpu=False), "number of workers is open"),
        (lambda: shared(Machine(8, 0), None, None, on_gpu=True), "no GPU"),
        (lambda: shared(Machine(8, 2), None, 3, on_gpu=True), "3 workers .* this machine has 2"),
        (lambda: fitted([Machine(8, 0)], None, None, on_gpu=False), "number of workers is open"),
        (lambda: fitted([Machine(8, 0)] * 2, 5, 3, on_gpu=False), "room for 2 workers of 5"),
        (lambda: fitted([Machine(8, 0)], None, None, on_gpu=True), "room for 0 .* and a GPU"),
    ],
)
def test_what_does_not_fit_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        plan()


def test_an_address_where_nobody_answers_is_refused_at_once(tmp_path):
    # Stands before the tests that are connected to a cluster, which is refused as well.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with (
            pytest.raises(ValueError, match=f"No Ray cluster can be joined at '{address}'"),
            cluster(models.settings(tmp_path), 2, address),
        ):
            pass
    assert time.monotonic() - started < 10


def test_a_resumed_run_may_have_workers_and_nothing_else(monkeypatch, capsys, tmp_path):
    from flexlora.cli import main

    monkeypatch.setattr(sys, "argv", ["flexlora", "run", "--resume", str(tmp_path), "--exact"])
    with pytest.raises(SystemExit):
        main.main()
    stderr = capsys.readouterr().err
    assert "--resume takes the folder of a run, --set, --workers and --ray" in stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    pq.write_table(models.corpus().table, folder / "rows.parquet")
    return folder


def settings(folder: Path, **changes: Any) -> Experiment:
    """The tiny federation, its rows in a file that workers can read, one rank for all."""
    given = {"data": {"path": str(folder / "rows.parquet")}, **changes}
    return models.settings(folder, **given)


ONE_RANK = {"rank": 3, "types": None, "distribution": None}


@pytest.fixture(scope="module")
def connected(folder) -> Iterator[Cluster]:
    with cluster(settings(folder), workers=2) as found:
        # Workers do not find this module by its name.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield found
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    gc.collect()


def on_ray(
    ready: PreparedRun, folder: Path, connected: Cluster, **options: Any
) -> list[dict[str, Any]]:
    with connected.federation(ready, folder, **options) as federation:
        return list(rounds.run(ready, folder, federation))


def files(events: list[dict[str, Any]]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(events[-1]["adapter"]).iterdir()}


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        pytest.param("flexlora", {}, marks=pytest.mark.slow),
        pytest.param("flora", {}, marks=pytest.mark.slow),
        pytest.param("fedsalora", ONE_RANK, marks=pytest.mark.slow),
    ],
)
def test_numbers_are_those_of_one_process_to_the_bit(folder, connected, method, ranks):
    ready = setup.prepare(
        settings(folder, method={"name": method}, ranks=ranks, run={"clients_at_once": 2})
    )
    here = list(rounds.run(ready, folder / f"{method}-here"))
    there = on_ray(ready, folder / f"{method}-there", connected)
    assert files(there) == files(here)
    facts = ("round", "client", "loss_total", "tokens", "bytes_up", "bytes_down")
    trained = [
        sorted(
            tuple(event[name] for name in facts) for event in events if event["event"] == "client"
        )
        for events in (here, there)
    ]
    assert trained[0] == trained[1] and len(trained[0]) == 12
    assert here[0]["clients_at_once"] == there[0]["clients_at_once"] == 2


@dataclass(frozen=True)
class Mortal:
    """Real turns, but the first of a later round ends its worker when the training is done."""

    resident: Resident
    died: Path

    def __call__(self):
        turns = self.resident()

        def until_death(jobs: Iterable[TurnRequest]) -> Iterable[bytes]:
            taken = list(jobs)
            uploads = turns(taken)
            if taken[0].round == 2 and not self.died.exists():
                self.died.touch()
                os._exit(1)
            return uploads

        return until_death


@pytest.mark.slow
def test_numbers_are_the_same_when_a_worker_dies(folder, connected):
    ready = setup.prepare(
        settings(folder, method={"name": "fedsalora"}, ranks=ONE_RANK, run={"clients_at_once": 1})
    )
    here = list(rounds.run(ready, folder / "alive"))
    private, died = ClientStore(folder / "dying" / rounds.PRIVATE), folder / "died"
    resident = Resident(ready.experiment.model_dump_json(), private, folder, 1, described(ready))
    crew = RayTransport(Mortal(resident, died), 2, {"num_cpus": 1}, 1, connected.scratch)
    try:
        there = list(rounds.run(ready, folder / "dying", crew))
    finally:
        crew.close()
    assert died.exists() and files(there) == files(here)
    assert sum(event["event"] == "client" for event in there) == 12
    assert not any(event["event"] in ("lost", "stray") for event in there)


@dataclass(frozen=True)
class Merging:
    """Turns that merge the entries which all downloads bring, each as soon as all may, and read."""

    private: ClientStore
    workers: int

    def __call__(self):
        def turns(jobs: Iterable[TurnRequest]) -> list[bytes]:
            return [self._turn(job) for job in jobs]

        return turns

    def _turn(self, job: TurnRequest) -> bytes:
        entries = job.opened().base_updates
        for number, entry in entries.items():
            here = self.private.folder / f"{job.client} {number}"
            here.touch()
            until = time.monotonic() + 60
            while len(list(here.parent.glob(f"* {number}"))) < self.workers:
                assert time.monotonic() < until
            self.private.add_updates({number: entry})
            found = self.private.updates_before(number + 1)
            assert len(found) == number
            assert all(
                torch.equal(f.B, entries[round][m].B)
                for round, adapter in enumerate(found, 1)
                for m, f in adapter.items()
            )
        return b"merged"


@pytest.mark.slow
def test_workers_may_write_the_same_merged_entry_at_once(connected, tmp_path):
    """Nobody reads half an entry, and no draft is left."""
    private, count = ClientStore(tmp_path / "private"), 20
    private.folder.mkdir()
    shapes = {f"model.{n}": (64, 96) for n in range(20)}
    entries = {number: random_adapter(shapes, 8, number) for number in range(1, count + 1)}
    download = Download(Adapter({}), base_updates=entries)
    data = wire.encode_download(download, torch.float32)
    scratch = connected.scratch / "merging"
    crew = RayTransport(Merging(private, 2), 2, {"num_cpus": 0}, scratch=scratch)
    try:
        jobs = [TurnRequest(name, count + 1, data) for name in ("anna", "ben")]
        replies = list(crew.exchange(jobs, WaitPolicy()))
    finally:
        crew.close()
    assert [reply.data for reply in replies] == [b"merged"] * 2
    kept = sorted(path.name for path in (private.folder / "merged").iterdir())
    files = [f"{number:05d}.safetensors" for number in range(1, count + 1)]
    assert kept == sorted([*files, *(f"{file}.sha256" for file in files)])


@dataclass(frozen=True)
class Telling(MethodWrapper):
    """Says where each module was aggregated; ends a process other than ``own``, once or always."""

    inner: Method
    own: int = 0
    died: Path | None = None
    always: bool = False

    @property
    def wrapped(self) -> Method:
        return self.inner

    @property
    def label(self) -> str:
        return ""

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        here = os.getpid()
        if self.died is not None and here != self.own and (self._first() or self.always):
            os._exit(1)
        after = self.inner.aggregate(state, cohort, context)
        where = dict.fromkeys(state.model, here)
        return replace(after, per_module={**after.per_module, "where": where})

    def _first(self) -> bool:
        """Whether nobody died before, told to one process alone."""
        try:
            self.died.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


WIDE = {f"model.{n}": (20 + n, 40 - n) for n in range(24)}


def step_of(name: str, folder: Path) -> tuple[Method, State, Cohort, RoundContext]:
    """A server step over uploads on the disk."""
    method = methods.make(name)
    clients = clients_of(method, [dict.fromkeys(WIDE, rank) for rank in (2, 3, 4)])
    state, uploads = first_state(method, clients, WIDE), []
    context, learn = context_of(1, clients, WIDE), noise(method, 1)
    for client in clients:
        path = folder / client.id
        upload = client_turn(method, state, client, context, learn).upload
        path.write_bytes(wire.encode_upload(upload, torch.float32))
        uploads.append(wire.open_upload(path))
    return method, state, cohort_of(method, uploads, context), context


def aggregated(
    crew: RayTransport, method: Method, state: State, cohort: Cohort, context: RoundContext
) -> set[int]:
    """Where a server step was made, once it is shown to be that of one process."""
    list(crew.exchange([], WaitPolicy()))  # until both workers are there
    got = crew.aggregate(method, state, cohort, context)
    want = method.aggregate(state, cohort, context)
    where = [dict(each.per_module["where"]) for each in (got, want)]
    assert where[0].keys() == where[1].keys() == set(WIDE)
    assert_same_values(*(_without_where(each) for each in (got, want)))
    assert_same_factors(got.model, want.model)
    return set(where[0].values())


def _without_where(state: State) -> State:
    values = {name: each for name, each in state.per_module.items() if name != "where"}
    return replace(state, per_module=values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flexlora", "replication"])
def test_workers_take_a_server_step_in_parts(scripted, tmp_path, name):
    method, *step = step_of(name, tmp_path)
    assert os.getpid() not in aggregated(scripted[0], Telling(method), *step)


@pytest.mark.slow
def test_a_step_over_all_modules_at_once_is_not_shared(scripted, tmp_path):
    method, *step = step_of("hetlora", tmp_path)
    assert aggregated(scripted[0], Telling(method), *step) == {os.getpid()}


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_in_a_server_step_costs_its_part(scripted, tmp_path, always):
    """It is taken by another; where none is left, by the process that has the federation."""
    method, *step = step_of("flexlora", tmp_path)
    dying = Telling(method, os.getpid(), tmp_path / "died", always)
    where = aggregated(scripted[0], dying, *step)
    assert dying.died.exists() and (where == {os.getpid()}) is always
    found = list(scripted[0].exchange([TurnRequest(f"on {always}", 2, b"x")], WaitPolicy()))
    assert found == [Reply(f"on {always}", b"x")]


@pytest.mark.slow
def test_workers_that_do_not_see_the_uploads_are_not_asked(scripted, tmp_path, monkeypatch):
    method, *step = step_of("flexlora", tmp_path)
    made = Step.of(Telling(method), *step)
    assert made.sees_the_same_files() and len(made.files) == 3
    (tmp_path / "c1").write_bytes(b"another file")
    assert not made.sees_the_same_files()
    monkeypatch.setattr(Step, "of", lambda *_: made)
    method, *step = step_of("flexlora", tmp_path)
    assert aggregated(scripted[0], Telling(method), *step) == {os.getpid()}


@dataclass(frozen=True)
class Scripted:
    """Turns that do what a client's name says, and note that they were begun."""

    notes: Path

    def __call__(self):
        def turns(jobs: Iterable[TurnRequest]) -> list[bytes]:
            return [self._turn(job) for job in jobs]

        return turns

    def _turn(self, job: TurnRequest) -> bytes:
        with (self.notes / job.client).open("a") as note:
            note.write(f"{os.getpid()}\n")
        begun = len((self.notes / job.client).read_text().split())
        what, *rest = job.client.split()
        if what == "dies" and begun <= int(rest[0]):
            os._exit(1)
        if what == "sleeps":
            time.sleep(float(rest[0]))
        if what == "faulty":
            error = KeyError("a fault")
            error.add_note("It is known.")
            raise error
        held = job.download
        return held.read_bytes() if isinstance(held, Path) else held


@pytest.fixture(scope="module")
def scripted(connected, tmp_path_factory) -> Iterator[tuple[RayTransport, Path]]:
    notes = tmp_path_factory.mktemp("notes")
    # It is there beside the workers of other tests, which have the cores.
    crew = RayTransport(Scripted(notes), 2, {"num_cpus": 0}, scratch=connected.scratch / "scripted")
    yield crew, notes
    crew.close()


def begun(notes: Path, client: str) -> int:
    return len((notes / client).read_text().split()) if (notes / client).exists() else 0


@pytest.mark.slow
def test_every_job_is_answered_and_drawn_when_somebody_takes_it(scripted, tmp_path):
    crew, _ = scripted
    shared_file = tmp_path / "shared"
    shared_file.write_bytes(b"the same for many")
    drawn = []

    def jobs():
        for number in range(40):
            drawn.append(number)
            own = b"%d" % number
            yield TurnRequest(f"{number}", 7, shared_file if number % 2 else own)

    answered = {}
    for count, reply in enumerate(crew.exchange(jobs(), WaitPolicy()), 1):
        answered[reply.client] = reply.data
        assert len(drawn) <= count + 3  # two at work, one ahead
    assert drawn == list(range(40))
    assert answered == {f"{n}": shared_file.read_bytes() if n % 2 else b"%d" % n for n in range(40)}


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_job(scripted):
    crew, notes = scripted
    names = ["dies 1", *(f"after {n}" for n in range(9))]
    found = list(
        crew.exchange((TurnRequest(name, 1, name.encode()) for name in names), WaitPolicy())
    )
    assert {reply.client: reply.data for reply in found} == {n: n.encode() for n in names}
    assert [begun(notes, name) for name in names] == [2] + 9 * [1]
    assert list(crew.exchange([TurnRequest("next round", 2, b"x")], WaitPolicy())) == [
        Reply("next round", b"x")
    ]


@pytest.mark.slow
def test_whoever_kills_every_worker_is_lost_and_nobody_else(scripted):
    crew, notes = scripted
    names = ["dies 99", "beside"]
    found = {
        r.client: r for r in crew.exchange([TurnRequest(n, 1, b"x") for n in names], WaitPolicy())
    }
    assert begun(notes, "dies 99") == ATTEMPTS
    lost = found["dies 99"]
    assert isinstance(lost, Lost) and lost.reason.startswith("3 workers died while training it")
    assert lost.reason.endswith(".") and "\n" not in lost.reason
    assert found["beside"] == Reply("beside", b"x")


@pytest.mark.slow
def test_who_is_late_is_lost_and_the_next_round_has_all_workers(scripted):
    crew, _ = scripted
    names = ["sleeps 600", "sleeps 601", "never begun"]
    started = time.monotonic()
    found = list(crew.exchange([TurnRequest(name, 1, b"x") for name in names], WaitPolicy(1.0)))
    assert time.monotonic() - started < 60
    assert found == [
        Lost("sleeps 600", "Its local training was not over after 1 s.", LossKind.NO_ANSWER),
        Lost("sleeps 601", "Its local training was not over after 1 s.", LossKind.NO_ANSWER),
        Lost("never begun", "Its local training had not begun after 1 s.", LossKind.NOT_BEGUN),
    ]
    again = list(
        crew.exchange([TurnRequest(f"again {n}", 2, b"x") for n in range(4)], WaitPolicy(60))
    )
    assert sorted(reply.client for reply in again) == [f"again {n}" for n in range(4)]


@pytest.mark.slow
def test_with_enough_nobody_is_waited_for(scripted):
    crew, _ = scripted
    found: list[Reply | Lost] = []
    jobs = (TurnRequest(name, 1, b"x") for name in ("sleeps 602", "quick", "not begun", "nor this"))
    for reply in crew.exchange(jobs, WaitPolicy(None, lambda: len(found) >= 2)):
        found.append(reply)
    assert [reply.client for reply in found] == ["quick", "not begun"]


@pytest.mark.slow
def test_a_machine_that_lacks_what_is_needed_is_named(connected, monkeypatch):
    absent = types.ModuleType("absent_elsewhere")
    absent.Scripted = type("Scripted", (), {"__module__": "absent_elsewhere"})
    monkeypatch.setitem(sys.modules, "absent_elsewhere", absent)
    crew = RayTransport(absent.Scripted(), 1, {"num_cpus": 0}, scratch=connected.scratch / "absent")
    with pytest.raises(ValueError, match=r"A worker could not be started: .*absent_elsewhere"):
        list(crew.exchange([], WaitPolicy()))
    crew.close()


@pytest.mark.slow
def test_an_error_in_a_turn_is_raised_as_it_was(scripted):
    crew, _ = scripted
    with pytest.raises(KeyError, match="a fault") as caught:
        list(crew.exchange([TurnRequest("faulty", 1, b"x")], WaitPolicy()))
    assert caught.value.__notes__ == ["It is known."]


@pytest.mark.slow
def test_a_fault_of_a_client_names_it(folder, connected):
    ready = setup.prepare(settings(folder))
    state = ready.method.start(ready.fresh(), ready.context(0))
    handed = ready.method.handout(state, ready.clients["client1"], ready.context(1))
    job = TurnRequest("nobody", 1, wire.encode_download(handed, ready.wire_dtype))
    with (
        connected.federation(ready, folder / "fault") as federation,
        pytest.raises(KeyError) as caught,
    ):
        list(federation.exchange([job], WaitPolicy()))
    assert caught.value.__notes__ == ["In the turn of client 'nobody' in round 1."]


@pytest.mark.slow
def test_a_worker_that_reads_other_data_is_refused(folder, connected):
    ready = setup.prepare(settings(folder), models.corpus(clients=5))
    with (
        connected.federation(ready, folder / "other") as federation,
        pytest.raises(ValueError, match=r"A worker has 6 clients, .* but the run has 5 clients"),
    ):
        list(federation.exchange([], WaitPolicy()))


def flexlora(*words: object) -> str:
    """A command in a process of its own: a cluster of its own is to end with it."""
    command = [sys.executable, "-m", "flexlora", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_run_with_workers_goes_on_with_workers_to_the_same_adapter(folder, tmp_path):
    config = models.write_config(
        tmp_path / "config.toml",
        folder,
        data={"path": str(folder / "rows.parquet"), "unseen_clients": None},
        ranks={
            "types": {
                "small": {"attention": 2, "feed_forward": 3},
                "large": {"attention": 5, "feed_forward": 5},
            },
            "distribution": {"small": 0.5, "large": 0.5},
        },
        training=None,
        federation={"rounds": 1, "cohort": 4},
        evaluation={"base": False, "seen_clients": 0, "unseen_clients": 0},
        run={"threads": None, "clients_at_once": 2},
    )
    left = set(Path("/tmp").glob("flexlora-ray-*"))
    said = flexlora("run", config, "--out", tmp_path / "there", "--workers", 2)
    assert said == ""
    stored = tmp_path / "there" / "config.json"
    content = json.loads(stored.read_text())
    assert content["run"]["threads"] == max(len(os.sched_getaffinity(0)) // 2, 1)
    more = ("--set", "federation.rounds=2")
    flexlora("run", "--resume", tmp_path / "there", "--workers", 2, *more)
    assert set(Path("/tmp").glob("flexlora-ray-*")) <= left
    threads = f"run.threads={content['run']['threads']}"
    flexlora("run", config, "--out", tmp_path / "here", *more, "--set", threads)
    ends = [list(Record(tmp_path / name).events()) for name in ("there", "here")]
    assert files(ends[0]) == files(ends[1])
