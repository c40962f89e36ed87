"""The server's side of a real federation: laid out, hosted, watched and gone on with."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from flexlora import model
from flexlora.config.ranks import RankType
from flexlora.deployment import run_spec
from flexlora.deployment.flower.processes import ProcessId
from flexlora.deployment.server import admission, delivery, run_files, server_run
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.run_files import ARRIVALS, NODES
from flexlora.deployment.server.server_run import ServePlan
from flexlora.deployment.server.supervisor import Listening
from flexlora.errors import ConfigError, ProtocolError
from flexlora.federation import checkpoint, compose
from flexlora.journal.record import Record
from flexlora.lowrank import Adapter
from flexlora.method.interface import State
from support import models

RANKS = {"types": None, "distribution": None, "rank": 5}
QUIET = {"seen_clients": 0, "unseen_clients": 0}


@pytest.fixture(scope="module")
def loaded() -> dict[str, model.Base]:
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch, loaded):
    """The same model is read from the disk once."""
    models.load_once(monkeypatch, loaded)


def settings(folder, **changes):
    data = {"format": "remote", "path": None, "prompt": "plain"}
    usual = {"ranks": RANKS, "evaluation": QUIET, "data": data}
    return models.settings(folder, **{**usual, **changes})


# Laying out


def test_every_run_has_a_name_of_its_own():
    names = {ServePlan.new(3, bound=True).run for _ in range(50)}
    assert len(names) == 50 and all(len(name) == 32 and int(name, 16) >= 0 for name in names)


def test_what_is_laid_out_is_read_again(folder, tmp_path):
    made, plan = settings(folder), ServePlan.new(4, bound=False)
    server_run.write_run_folder(tmp_path / "run", made, plan)
    assert ServePlan.read(tmp_path / "run") == plan
    assert server_run.read_config(tmp_path / "run") == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ranks": {"types": None, "distribution": "uniform"}},
            r"ranks\.distribution assigns ranks to a fixed set of simulated clients",
        ),
        (
            {"ranks": {"distribution": None, "clients": {"ash": "huge"}}},
            r"ranks\.clients names the types \['huge'\]",
        ),
        (
            {"method": {"name": "fedsalora"}, "evaluation": {"seen_clients": 2}},
            r"set evaluation\.seen_clients = 0 and evaluation\.unseen_clients = 0",
        ),
    ],
)
def test_what_only_a_simulation_can_run_is_refused_before_anything_is_written(
    folder, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        server_run.write_run_folder(
            tmp_path / "run", settings(folder, **changes), ServePlan.new(2, bound=True)
        )
    assert not (tmp_path / "run").exists()


def test_several_ranks_for_a_method_of_one_are_refused_before_anything_is_written(folder, tmp_path):
    """As a simulation refuses it."""
    named = {"distribution": None, "clients": {"ash": "small", "birch": "large"}}
    made = settings(folder, ranks=named, method={"name": "fedsalora"})
    with pytest.raises(ValueError, match="one rank"):
        server_run.write_run_folder(tmp_path / "run", made, ServePlan.new(2, bound=True))


PHONES = {
    "distribution": None,
    "types": {
        "phone": {"attention": 3, "feed_forward": 0},
        "site": {"attention": 3, "feed_forward": 3},
    },
    "clients": {"ash": "phone", "birch": "site"},
}


def test_limits_that_leave_out_modules_need_a_method_that_goes_by_module(folder, tmp_path):
    """As a simulation refuses it; and one rank is one where a module is trained."""
    plan = ServePlan.new(2, bound=True)
    made = settings(folder, ranks=PHONES, method={"name": "hetlora"})
    with pytest.raises(ValueError, match="does not support aggregation by module"):
        server_run.write_run_folder(tmp_path / "run", made, plan)
    assert not (tmp_path / "run").exists()
    server_run.write_run_folder(
        tmp_path / "fedit", settings(folder, ranks=PHONES, method={"name": "fedit"}), plan
    )
    server_run.write_run_folder(tmp_path / "flexlora", settings(folder, ranks=PHONES), plan)


# Whether it lives


def test_a_run_that_has_not_begun_counts_as_alive(tmp_path):
    assert server_run.is_alive(tmp_path)


def test_a_run_is_alive_as_long_as_its_process_holds_the_lock(tmp_path):
    with server_run._pid_lock(tmp_path):
        assert server_run.is_alive(tmp_path)
        assert server_run.is_alive(tmp_path)  # looking takes nothing away
        assert ProcessId.read(tmp_path / server_run.PID).pid == os.getpid()
    assert not server_run.is_alive(tmp_path)
    server_run.end_process(tmp_path)
    assert server_run.is_alive(tmp_path)  # another is awaited


def test_what_a_killed_process_left_behind_is_dead_whatever_its_number(tmp_path):
    (tmp_path / server_run.PID).write_text("1")  # a process that is always there
    assert not server_run.is_alive(tmp_path)


def test_forgetting_twice_is_no_fault(tmp_path):
    (tmp_path / server_run.PID).write_text("7")
    server_run.end_process(tmp_path)
    server_run.end_process(tmp_path)
    assert server_run.is_alive(tmp_path)


# Hosting


class Enough(Exception):
    """Ends a run from within."""


@dataclass
class Watched:
    """A federation that notes what it is asked, and ends the run."""

    asked: list = field(default_factory=list)
    together: int = 1
    ends: BaseException = field(default_factory=Enough)

    def wait_for_clients(self, clients):
        self.asked.append(clients)
        raise self.ends


def hosted(folder, made, plan, watched=None):
    """What the federation of a folder is made of, and whom it waits for."""
    watched = watched or Watched()
    if not (folder / server_run.PLAN).exists():
        server_run.write_run_folder(folder, made, plan)
    given = []

    def connect(*arguments):
        given.extend(arguments)
        return watched

    with pytest.raises(type(watched.ends)):
        server_run.run_server(folder, connect)
    return given, watched.asked


def test_nodes_are_told_the_terms_of_the_config(folder, tmp_path):
    how = {"federation": {"rounds": 2, "cohort": 3, "quorum": 2}, "method": {"name": "flora"}}
    plan = ServePlan.new(3, bound=True)
    (roll, told, quorum), _ = hosted(tmp_path / "run", settings(folder, **how), plan)
    agreed = run_spec.parse(told)
    assert agreed.run == plan.run and agreed.method["name"] == "flora"
    assert (agreed.attention, agreed.feed_forward, quorum) == (5, 5, 2)
    assert roll.folder == tmp_path / "run" and roll.limits == RankLimits(RankType(5, 5), {})
    assert len(roll.modules) == 14


def test_the_roll_knows_what_a_client_weighs_at_most(folder, tmp_path):
    how = {"federation": {"rounds": 2, "cohort": 3, "most_examples": 500}}
    plan = ServePlan.new(3, bound=True)
    (roll, *_), _ = hosted(tmp_path / "run", settings(folder, **how), plan)
    assert roll.most_examples == 500


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(("method", "alike"), [("flexlora", False), ("fedsalora", True)])
def test_the_plan_and_the_method_decide_who_is_let_in(folder, tmp_path, bound, method, alike):
    made = settings(folder, method={"name": method})
    (roll, _, _), _ = hosted(tmp_path / "run", made, ServePlan.new(2, bound=bound))
    assert (roll.bound, roll.one_rank) == (bound, alike)


def test_the_first_round_waits_for_all_and_a_resumed_run_for_its_quorum(folder, tmp_path):
    made = settings(folder, federation={"rounds": 2, "cohort": 3, "quorum": 2})
    plan, run = ServePlan.new(4, bound=True), tmp_path / "run"
    assert hosted(run, made, plan)[1] == [4]
    assert hosted(run, made, plan)[1] == [4]  # stopped before its first checkpoint
    checkpoint.save(run, 0, 0, State(Adapter({})))
    assert hosted(run, made, plan)[1] == [2]


def test_why_a_run_stopped_is_in_its_journal(folder, tmp_path):
    run = tmp_path / "run"
    watched = Watched(ends=ValueError("too few have come"))
    hosted(run, settings(folder), ServePlan.new(1, bound=True), watched)
    (event,) = Record(run).events("stopped")
    assert event["reason"] == "ValueError: too few have come"


@pytest.mark.parametrize("ends", [SystemExit(1), KeyboardInterrupt()])
def test_a_process_that_was_told_to_end_is_dead(folder, tmp_path, ends):
    """By SIGTERM, when memory is short: nothing says that it stopped."""
    run = tmp_path / "run"
    hosted(run, settings(folder), ServePlan.new(1, bound=True), Watched(ends=ends))
    assert list(Record(run).events("stopped", "finish")) or not server_run.is_alive(run)


def test_a_process_that_could_not_say_why_it_stopped_is_dead(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "append", full)
    hosted(run, settings(folder), ServePlan.new(1, bound=True), Watched(ends=OSError()))
    assert not server_run.is_alive(run)


# Watching from without


class FakeProcess:
    """Of Flower's or the gate; it lives until a test ends it."""

    def __init__(self, *arguments):
        self.ended, self.starts, self.log = None, 0, "its.log"

    def start(self):
        self.ended, self.starts = None, self.starts + 1

    def end_left_behind(self):
        assert self.starts == 0  # before anything of this server runs

    def stop(self):
        self.ended = -15

    def last_lines(self):
        return "the last lines"


class FakeLink:
    """A SuperLink whose run does, each time it is submitted, what the next of ``acts`` does."""

    def __init__(self, home, port, keys):
        self.process, self.url = FakeProcess(), f"https://127.0.0.1:{port}"
        self.submitted, self.registered = 0, []
        FakeLink.last = self

    def start(self):
        self.process.start()

    def submit(self, folder):
        self.submitted += 1
        return next(FakeLink.acts)(folder)

    def register(self, public, name):
        if public.read_bytes() in FakeLink.known:
            raise ValueError("Flower refused `flwr supernode register`: key already in use")
        FakeLink.known.append(public.read_bytes())
        self.registered.append(name)
        return 1000 + len(FakeLink.known)

    def number(self, public, name, recorded):
        if public.read_bytes() in FakeLink.known:
            found = 1001 + FakeLink.known.index(public.read_bytes())
            assert found not in recorded
            return found
        return self.register(public, name)

    def unregister(self, node):
        FakeLink.out.append(node)

    def status(self, run):
        return "finished:failed"


@pytest.fixture
def serving(monkeypatch):
    """``serve`` without Flower; ``acts`` are what its processes do."""
    pytest.importorskip("flwr", reason="needs flexlora[flower]")
    from flexlora.deployment.server import supervisor

    naps, meanwhile = [], []

    def nap(seconds):
        naps.append(seconds)
        assert len(naps) < 100, "the server waits for ever"
        if meanwhile:
            meanwhile.pop(0)()

    monkeypatch.setattr(supervisor, "SuperLink", FakeLink)
    monkeypatch.setattr(supervisor, "Process", FakeProcess)
    monkeypatch.setattr(supervisor.time, "sleep", nap)
    FakeLink.known, FakeLink.out = [], []

    def events(folder, *acts, keys=None, then=(), stay_seconds=0.0):
        """``then`` is what happens between one look and the next."""
        FakeLink.acts = iter(acts)
        meanwhile[:] = then
        listening = supervisor.Listening("127.0.0.1", 8090, keys)
        return supervisor.serve(folder, listening, stay_seconds)

    return events


def ran(*events, dies=False):
    """A process that writes these events, and is killed or ends."""

    def act(folder):
        for event, fields in events:
            Record(folder).append(event, **fields)
        if dies:
            (folder / server_run.PID).write_text("7")

    return act


LONG = ("start", {"config": "x" * 3000})
FINISH = ("finish", {"rounds": 1})


def round_(folder, number, *events):
    """A round's events and the checkpoint after it."""
    ran(*events)(folder)
    checkpoint.save(folder, number, Record(folder).bytes, State(Adapter({})))


def test_events_are_told_as_they_come_until_the_run_has_finished(serving, tmp_path):
    found = list(serving(tmp_path, ran(LONG, ("asked", {"client": "ash"}), FINISH)))
    assert [event["event"] for event in found] == ["start", "asked", "finish"]
    assert FakeLink.last.process.ended == -15 and FakeLink.last.submitted == 1


def test_after_the_last_round_it_stays_until_the_delivery_is_over(serving, tmp_path):
    """And cuts nothing from the journal if a process is restarted meanwhile."""
    config = {"federation": {"rounds": 1, "cohort": 1}, "ranks": {"rank": 2}}
    made = compose.parse({"model": {"name": "m"}, "data": {"format": "remote"}, **config}, "-")
    server_run.write_config(tmp_path, made)
    round_(tmp_path, 1, LONG)
    naps = [lambda: None] * 3
    naps += [lambda: setattr(FakeLink.last.process, "ended", 1)]  # the SuperLink is killed
    naps += [lambda: None] * 3 + [lambda: delivery.close(tmp_path)]
    found = list(serving(tmp_path, ran(FINISH), ran(), then=naps, stay_seconds=1e9))
    assert [event["event"] for event in found] == ["finish"]
    assert FakeLink.last.submitted == 2 and naps
    assert [e["event"] for e in Record(tmp_path).events()] == ["start", "finish"]
    journal = Record(tmp_path).path.read_bytes()
    naps = [lambda: None] * 3 + [lambda: delivery.close(tmp_path)]
    assert list(serving(tmp_path, ran(), then=naps, stay_seconds=1e9)) == []
    assert Record(tmp_path).path.read_bytes() == journal


def test_a_run_that_gets_more_rounds_forgets_who_had_the_last_adapter(serving, tmp_path):
    config = {"federation": {"rounds": 3, "cohort": 1}, "ranks": {"rank": 2}}
    made = compose.parse({"model": {"name": "m"}, "data": {"format": "remote"}, **config}, "-")
    server_run.write_config(tmp_path, made)
    round_(tmp_path, 1, LONG)
    ran(FINISH)(tmp_path)
    delivery.close(tmp_path)
    more = ran(("start", {}), ("finish", {"rounds": 3}))
    found = list(serving(tmp_path, more))
    assert [event["event"] for event in found] == ["start", "finish"]
    assert [e["event"] for e in Record(tmp_path).events()] == ["start", "start", "finish"]
    assert not delivery.is_closed(tmp_path)


def test_a_clients_line_is_printed_before_the_events_that_follow_from_it(serving, tmp_path, capsys):
    def comes(folder):
        (folder / ARRIVALS).write_text("client ash connected\n")
        Record(folder).append("joined", client="ash")

    with contextlib.closing(serving(tmp_path, comes)) as events:
        assert next(events)["event"] == "joined"
        assert capsys.readouterr().err == "client ash connected\n"


def test_a_run_that_stopped_says_why_and_how_to_go_on(serving, tmp_path):
    stopped = ("stopped", {"reason": "ValueError: too few."})
    with pytest.raises(
        ValueError, match=r"stopped: ValueError: too few\. Resume it with: flexlora"
    ):
        list(serving(tmp_path, ran(LONG, stopped)))
    assert FakeLink.last.process.ended == -15


def test_a_run_that_stopped_can_be_gone_on_with(serving, tmp_path):
    """What stopped it the last time does not stop it now."""
    round_(tmp_path, 1, LONG, ("round", {"round": 1}))
    ran(("asked", {"client": "ash"}), ("stopped", {"reason": "x"}))(tmp_path)
    found = list(serving(tmp_path, ran(LONG, FINISH)))
    assert [event["event"] for event in found] == ["start", "finish"]
    kinds = [event["event"] for event in Record(tmp_path).events()]
    assert kinds == ["start", "round", "start", "finish"]


def test_after_a_kill_the_journal_is_read_from_the_checkpoint_on(serving, tmp_path):
    """The resumed run writes over what came after it: in whole lines, and other ones."""
    one = ("asked", {"client": "ash", "padding": "x" * 50})
    then = [
        lambda: round_(tmp_path, 1, ("round", {"round": 1})),
        lambda: ran(one, one)(tmp_path),
        lambda: ran(dies=True)(tmp_path),
    ]
    found = list(serving(tmp_path, ran(LONG), ran(LONG, one, FINISH), then=then))
    kinds = [event["event"] for event in found]
    assert kinds == ["start", "round", "asked", "asked", "start", "asked", "finish"]
    assert FakeLink.last.submitted == 2


def test_a_run_killed_before_its_first_checkpoint_begins_again(serving, tmp_path):
    found = list(serving(tmp_path, ran(dies=True), ran(LONG, FINISH)))
    assert [event["event"] for event in found] == ["start", "finish"]


def test_a_superlink_that_ended_is_started_again_with_its_run(serving, tmp_path):
    def first(folder):
        FakeLink.last.process.ended = 1

    list(serving(tmp_path, first, ran(FINISH)))
    assert FakeLink.last.process.starts == 2 and FakeLink.last.submitted == 2


def test_what_ends_again_and_again_ends_the_server(serving, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)ended 21 times; .* its\.log:.the last lines"):
        list(serving(tmp_path, *[ran(dies=True)] * 30))
    assert FakeLink.last.process.ended == -15


def test_a_process_that_ends_before_it_begins_is_not_waited_for(serving, tmp_path, monkeypatch):
    """Python or Flower could not start it: Flower knows that it has failed."""
    monkeypatch.setattr("flexlora.deployment.server.supervisor._BEGIN_SECONDS", -1.0)
    with pytest.raises(ValueError, match="log"):
        list(serving(tmp_path, *[lambda folder: "1"] * 30))


def test_two_servers_in_one_folder_are_one_too_many(serving, tmp_path):
    with contextlib.closing(serving(tmp_path, ran(LONG))) as one:
        next(one)
        with (
            contextlib.closing(serving(tmp_path, ran(LONG))) as other,
            pytest.raises(ValueError, match="already"),
        ):
            next(other)


# What a crash left behind


@pytest.fixture
def sleeper(tmp_path):
    """Flower's process, of a log: it sleeps."""
    processes = pytest.importorskip("flexlora.deployment.flower.processes")
    made = []

    def make(log="its.log"):
        command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
        made.append(processes.Process(command, tmp_path / log, dict(os.environ)))
        return made[-1]

    yield make
    for process in made:
        process.stop()


def identity(process):
    return ProcessId.read(process.id_file)


def up(process) -> None:
    """Start a process and wait until it has its environment."""
    process.start()
    while not process.last_lines():
        time.sleep(0.01)


def test_what_a_crash_left_behind_is_ended_before_it_is_started_again(sleeper):
    first, second = sleeper(), sleeper()
    up(first)
    second.start()
    assert first._running.wait(5) == -signal.SIGKILL
    assert identity(second).pid == second._running.pid and second.ended is None


def test_a_server_that_goes_on_may_have_the_port_of_the_one_that_was_killed(sleeper):
    """Its gate outlives it, and listens still."""
    first, second = sleeper(), sleeper()
    code = (
        "import socket, time\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "time.sleep(60)"
    )
    first.arguments = [sys.executable, "-c", code]
    up(first)
    listening = Listening("127.0.0.1", int(first.last_lines()), None)
    with pytest.raises(ConfigError, match="Address already in use"):
        listening.check_free()
    second.end_left_behind()
    listening.check_free()


def test_what_it_had_started_in_another_group_is_ended_too(sleeper, tmp_path):
    """Flower starts the server's side of the run in a group of its own."""
    first, second = sleeper(), sleeper()
    sleep = f"[{sys.executable!r}, '-c', 'import time; time.sleep(60)']"
    code = (
        "import subprocess, time\n"
        f"child = subprocess.Popen({sleep}, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    first.arguments = [sys.executable, "-c", code]
    up(first)
    import psutil

    child = psutil.Process(int(first.last_lines()))
    os.kill(first._running.pid, signal.SIGKILL)
    first._running.wait()
    second.start()
    assert psutil.wait_procs([child], 5)[1] == [] or child.status() == psutil.STATUS_ZOMBIE


SLEEP = time.sleep
"""The real one, which ``serving`` replaces."""

STUBBORN = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\n"
    "time.sleep(60)"
)
"""A process that a SIGTERM does not end, as Flower's while it fetches an upload."""


def test_stopping_ends_what_it_started_in_another_session_and_is_busy(sleeper, monkeypatch):
    """As the process of the rounds, which waits for the rest of an upload and holds the run."""
    import psutil

    from flexlora.deployment.flower import processes

    monkeypatch.setattr(processes, "_STOP_SECONDS", 0.4)
    parent = sleeper()
    code = (
        "import subprocess, time\n"
        f"busy = [{sys.executable!r}, '-c', {STUBBORN!r}]\n"
        "child = subprocess.Popen(busy, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent.arguments = [sys.executable, "-c", code]
    parent.start()
    while "up" not in parent.last_lines():
        time.sleep(0.01)
    lines = parent.last_lines().split()
    child = psutil.Process(int(next(line for line in lines if line != "up")))
    parent.stop()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_server_that_ends_ends_the_process_of_the_rounds(serving, tmp_path, monkeypatch):
    """By its own file, wherever it was started; also before it starts another."""
    from flexlora.deployment.flower import processes

    monkeypatch.setattr(processes, "_STOP_SECONDS", 0.4)
    real = SimpleNamespace(sleep=SLEEP, monotonic=time.monotonic)
    monkeypatch.setattr(processes, "time", real)
    started = []

    def hangs(folder):
        busy = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        busy.stdout.readline()
        busy.stdout.close()
        started.append(busy)
        ProcessId.of(busy.pid).write(folder / server_run.PID)
        Record(folder).append("asked", client="ash")

    with contextlib.closing(serving(tmp_path, hangs)) as events:
        assert next(events)["event"] == "asked"
    assert started[0].wait(5) == -signal.SIGKILL and not (tmp_path / server_run.PID).exists()
    hangs(tmp_path)
    assert list(serving(tmp_path, ran(LONG, FINISH)))[-1]["event"] == "finish"
    assert started[1].wait(5) == -signal.SIGKILL


def test_who_runs_in_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(server_run, "_LOCK_SECONDS", 0.0)
    with (
        server_run._pid_lock(tmp_path),
        pytest.raises(ProtocolError, match=f"Process {os.getpid()} runs in .* kill {os.getpid()}"),
        server_run._pid_lock(tmp_path),
    ):
        pass


def test_who_serves_a_run_is_named(serving, tmp_path):
    with contextlib.closing(serving(tmp_path, ran(LONG))) as events:
        next(events)
        with pytest.raises(ProtocolError, match=f"served already, by process {os.getpid()} .*kill"):
            next(serving(tmp_path, ran(LONG)))
    assert list(serving(tmp_path, ran(LONG, FINISH)))[-1]["event"] == "finish"


def test_another_process_that_has_its_number_by_now_is_left_alone(sleeper):
    """After a reboot numbers are given anew: to another Python, or to another of one's own."""
    other, gone = sleeper("another.log"), sleeper()
    up(other)
    shutil.copy(other.id_file, gone.id_file)
    gone.start()
    assert other.ended is None and gone.ended is None


@pytest.mark.parametrize("seconds, ended", [(0.0, True), (60.0, False), (-86400.0, False)])
def test_where_environments_cannot_be_read_the_start_time_decides(
    sleeper, monkeypatch, seconds, ended
):
    """The number alone may be another program's."""
    from flexlora.deployment.flower import processes

    first, second = sleeper(), sleeper()
    up(first)
    real = identity(first)
    processes.ProcessId(real.pid, real.created + seconds).write(first.id_file)
    monkeypatch.setattr(processes, "_log_of", lambda process: None)
    second.start()
    time.sleep(0.2)
    assert (first.ended is not None) is ended and second.ended is None


def test_the_file_of_an_earlier_version_has_a_number_alone(sleeper, monkeypatch):
    from flexlora.deployment.flower import processes

    first, second = sleeper(), sleeper()
    up(first)
    first.id_file.write_text(str(first._running.pid))
    assert identity(first) == processes.ProcessId(first._running.pid, None)
    second.start()
    assert first._running.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("content", ["", "half", "[1]", "{}", '{"pid": 1}', '{"pid": "x"}'])
def test_a_damaged_file_identifies_no_process(sleeper, content):
    process = sleeper()
    process.id_file.write_text(content)
    assert identity(process) is None
    process.start()
    assert identity(process).pid == process._running.pid


# Nodes whose keys come while it serves


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A server's keys, and two nodes'."""
    keys = pytest.importorskip("flexlora.deployment.keys")
    certificates = pytest.importorskip("flexlora.deployment.certificates")
    folder = tmp_path_factory.mktemp("pairs")
    certificates.make_server(folder / "keys", ["localhost"])
    for name in ("ash", "birch"):
        keys.make_node(folder / name, name)
    return folder


@pytest.fixture
def held(pairs, tmp_path):
    """A folder of keys of which no node is known yet."""
    shutil.copytree(pairs / "keys", tmp_path / "keys")
    (tmp_path / "keys" / "nodes").mkdir(mode=0o700)
    return tmp_path / "keys"


def comes(pairs, held, name):
    shutil.copy(pairs / name / f"{name}.pub", held / "nodes")


def nodes(folder):
    return run_files.numbers(folder, NODES)


def test_nodes_are_let_in_by_their_keys_also_later(serving, pairs, held, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    comes(pairs, held, "ash")
    found = []
    then = [
        lambda: found.append(nodes(run)),
        lambda: comes(pairs, held, "birch"),
        lambda: ran(FINISH)(run),
    ]
    list(serving(run, ran(LONG), keys=held, then=then))
    assert [*found, nodes(run)] == [{"ash": 1001}, {"ash": 1001, "birch": 1002}]
    assert "authorised node birch" in capsys.readouterr().err


def test_nodes_are_not_registered_again(serving, pairs, held, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    comes(pairs, held, "ash")
    list(serving(run, ran(FINISH), keys=held))
    known = FakeLink.known
    (run / "metrics.jsonl").unlink()
    list(serving(run, ran(FINISH), keys=held))
    assert known == FakeLink.known and nodes(run) == {"ash": 1001}


def goes_on(serving, run, held, *then):
    """A run during which these things happen one after the other."""
    run.mkdir(exist_ok=True)
    rest = [lambda: None, lambda: None, lambda: ran(FINISH)(run)]
    list(serving(run, ran(LONG), keys=held, then=[*then, *rest]))


def test_a_node_whose_key_is_taken_out_is_put_out(serving, pairs, held, tmp_path, capsys):
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    comes(pairs, held, "birch")
    goes_on(serving, run, held, (held / "nodes" / "ash.pub").unlink)
    assert FakeLink.out == [1001] and nodes(run) == {"birch": 1002}
    assert "revoked node ash: its key was removed\n" in capsys.readouterr().err


def test_a_node_with_another_key_is_another_node(serving, pairs, held, tmp_path, capsys):
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(
        *(serving, run, held),
        lambda: shutil.copy(pairs / "birch" / "birch.pub", held / "nodes" / "ash.pub"),
    )
    assert FakeLink.out == [1001] and nodes(run) == {"ash": 1002}
    said = capsys.readouterr().err
    assert "revoked node ash: its key was replaced\nauthorised node ash\n" in said


def test_a_key_that_was_put_out_does_not_come_back_and_it_is_said_why(
    serving, pairs, held, tmp_path, capsys
):
    """Flower takes no key twice."""
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(
        *(serving, run, held),
        (held / "nodes" / "ash.pub").unlink,
        lambda: comes(pairs, held, "ash"),
        lambda: comes(pairs, held, "birch"),
    )
    assert nodes(run) == {"birch": 1002}
    said = capsys.readouterr().err
    assert "node ash is not authorised: its key SHA256:" in said
    assert "make a new one: flexlora keys DIR --node ash" in said
    assert "authorised node birch" in said


def test_keys_that_went_while_nobody_served_are_noticed(serving, pairs, held, tmp_path):
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(serving, run, held)
    (held / "nodes" / "ash.pub").unlink()
    round_(run, 1, LONG)
    list(serving(run, ran(FINISH), keys=held))
    assert FakeLink.out == [1001] and nodes(run) == {}


def test_nodes_of_a_run_that_knew_no_fingerprints_stay_in(serving, pairs, held, tmp_path):
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(serving, run, held)
    (run / admission.NUMBERS).unlink()
    round_(run, 1, LONG)
    list(serving(run, ran(FINISH), keys=held))
    assert FakeLink.out == [] and nodes(run) == {"ash": 1001}
    assert list(run_files.numbers(run, admission.NUMBERS).values()) == [1001]


def test_a_folder_of_keys_that_is_gone_puts_nobody_out(serving, pairs, held, tmp_path, capsys):
    """It may be a disk that is not there for a while."""
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(serving, run, held, lambda: (held / "nodes").rename(held / "elsewhere"))
    assert FakeLink.out == [] and nodes(run) == {"ash": 1001}
    assert "the authorised nodes are unchanged: " in capsys.readouterr().err


def test_a_fingerprint_is_the_one_that_openssh_says(pairs):
    from flexlora.deployment.keys import fingerprint

    public = pairs / "ash" / "ash.pub"
    said = subprocess.run(["ssh-keygen", "-l", "-f", public], capture_output=True, text=True)
    assert fingerprint(public) == said.stdout.split()[1]
    assert fingerprint(public) != fingerprint(pairs / "birch" / "birch.pub")


@pytest.mark.parametrize("content", [b"", b"half of a k", b"\xff"])
def test_a_key_that_is_still_being_copied_does_not_end_the_server(
    serving, pairs, held, tmp_path, content
):
    run = tmp_path / "run"
    run.mkdir()
    then = [
        lambda: (held / "nodes" / "birch.pub").write_bytes(content),
        lambda: None,
        lambda: comes(pairs, held, "birch"),
        lambda: ran(FINISH)(run),
    ]
    list(serving(run, ran(LONG), keys=held, then=then))
    assert nodes(run) == {"birch": 1001}


def test_a_server_killed_between_registering_and_writing_it_down_goes_on(
    serving, pairs, held, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    comes(pairs, held, "ash")
    list(serving(run, ran(FINISH), keys=held))
    for file in (NODES, admission.NUMBERS):
        (run / file).unlink()  # as if the kill had come before it was written
    round_(run, 1, LONG)
    assert [e["event"] for e in serving(run, ran(FINISH), keys=held)] == ["finish"]
    assert nodes(run) == {"ash": 1001}
