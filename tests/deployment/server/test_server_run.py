"""The server's side of a real federation: laid out, hosted, watched and gone on with."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from flexlora import model
from flexlora.config.ranks import RankType
from flexlora.deployment import run_spec
from flexlora.deployment.server import server_run
from flexlora.deployment.server.registry import RankLimits
from flexlora.deployment.server.server_run import Plan
from flexlora.federation import checkpoint
from flexlora.journal.record import Record
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
    names = {Plan.new(3, bound=True).run for _ in range(50)}
    assert len(names) == 50 and all(len(name) == 32 and int(name, 16) >= 0 for name in names)


def test_what_is_laid_out_is_read_again(folder, tmp_path):
    made, plan = settings(folder), Plan.new(4, bound=False)
    server_run.lay_out(tmp_path / "run", made, plan)
    held = json.loads((tmp_path / "run" / server_run.PLAN).read_text())
    assert Plan(**held) == plan
    text = (tmp_path / "run" / server_run.CONFIG).read_text()
    assert server_run.compose.parse(json.loads(text), "-") == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ranks": {"types": None, "distribution": "uniform"}},
            r"ranks\.distribution deals ranks to clients known beforehand",
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
        server_run.lay_out(tmp_path / "run", settings(folder, **changes), Plan.new(2, bound=True))
    assert not (tmp_path / "run").exists()


def test_several_ranks_for_a_method_of_one_are_refused_before_anything_is_written(folder, tmp_path):
    """As a simulation refuses it."""
    named = {"distribution": None, "clients": {"ash": "small", "birch": "large"}}
    made = settings(folder, ranks=named, method={"name": "fedsalora"})
    with pytest.raises(ValueError, match="one rank"):
        server_run.lay_out(tmp_path / "run", made, Plan.new(2, bound=True))


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
    plan = Plan.new(2, bound=True)
    made = settings(folder, ranks=PHONES, method={"name": "hetlora"})
    with pytest.raises(ValueError, match="decides over all modules at once"):
        server_run.lay_out(tmp_path / "run", made, plan)
    assert not (tmp_path / "run").exists()
    server_run.lay_out(
        tmp_path / "fedit", settings(folder, ranks=PHONES, method={"name": "fedit"}), plan
    )
    server_run.lay_out(tmp_path / "flexlora", settings(folder, ranks=PHONES), plan)


# Whether it lives


def test_a_run_that_has_not_begun_counts_as_alive(tmp_path):
    assert server_run.is_alive(tmp_path)


def test_a_run_is_alive_as_long_as_its_process_holds_the_lock(tmp_path):
    with (tmp_path / server_run.ALIVE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert server_run.is_alive(tmp_path)
        assert server_run.is_alive(tmp_path)  # looking takes nothing away
    assert not server_run.is_alive(tmp_path)
    server_run.forget(tmp_path)
    assert server_run.is_alive(tmp_path)  # another is awaited


def test_what_a_killed_process_left_behind_is_dead_whatever_its_number(tmp_path):
    (tmp_path / server_run.ALIVE).write_text("1")  # a process that is always there
    assert not server_run.is_alive(tmp_path)


def test_forgetting_twice_is_no_fault(tmp_path):
    (tmp_path / server_run.ALIVE).write_text("7")
    server_run.forget(tmp_path)
    server_run.forget(tmp_path)
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

    def gather(self, clients):
        self.asked.append(clients)
        raise self.ends


def hosted(folder, made, plan, watched=None):
    """What the federation of a folder is made of, and whom it waits for."""
    watched = watched or Watched()
    if not (folder / server_run.PLAN).exists():
        server_run.lay_out(folder, made, plan)
    given = []

    def connect(*arguments):
        given.extend(arguments)
        return watched

    with pytest.raises(type(watched.ends)):
        server_run.host(folder, connect)
    return given, watched.asked


def test_nodes_are_told_the_terms_of_the_config(folder, tmp_path):
    how = {"federation": {"rounds": 2, "cohort": 3, "quorum": 2}, "method": {"name": "flora"}}
    plan = Plan.new(3, bound=True)
    (roll, told, quorum), _ = hosted(tmp_path / "run", settings(folder, **how), plan)
    agreed = run_spec.parse(told)
    assert agreed.run == plan.run and agreed.method["name"] == "flora"
    assert (agreed.attention, agreed.feed_forward, quorum) == (5, 5, 2)
    assert roll.folder == tmp_path / "run" and roll.limit == RankLimits(RankType(5, 5), {})
    assert len(roll.modules) == 14


def test_the_roll_knows_what_a_client_weighs_at_most(folder, tmp_path):
    how = {"federation": {"rounds": 2, "cohort": 3, "most_examples": 500}}
    plan = Plan.new(3, bound=True)
    (roll, *_), _ = hosted(tmp_path / "run", settings(folder, **how), plan)
    assert roll.most_examples == 500


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(("method", "alike"), [("flexlora", False), ("fedsalora", True)])
def test_the_plan_and_the_method_decide_who_is_let_in(folder, tmp_path, bound, method, alike):
    made = settings(folder, method={"name": method})
    (roll, _, _), _ = hosted(tmp_path / "run", made, Plan.new(2, bound=bound))
    assert (roll.bound, roll.alike) == (bound, alike)


def test_the_first_round_waits_for_all_and_a_resumed_run_for_its_quorum(folder, tmp_path):
    made = settings(folder, federation={"rounds": 2, "cohort": 3, "quorum": 2})
    plan, run = Plan.new(4, bound=True), tmp_path / "run"
    assert hosted(run, made, plan)[1] == [4]
    assert hosted(run, made, plan)[1] == [4]  # stopped before its first checkpoint
    checkpoint.save(run, 0, 0, State({}, {}))
    assert hosted(run, made, plan)[1] == [2]


def test_why_a_run_stopped_is_in_its_journal(folder, tmp_path):
    run = tmp_path / "run"
    watched = Watched(ends=ValueError("too few have come"))
    hosted(run, settings(folder), Plan.new(1, bound=True), watched)
    (event,) = Record(run).events("stopped")
    assert event["reason"] == "ValueError: too few have come"


@pytest.mark.parametrize("ends", [SystemExit(1), KeyboardInterrupt()])
def test_a_process_that_was_told_to_end_is_dead(folder, tmp_path, ends):
    """By SIGTERM, when memory is short: nothing says that it stopped."""
    run = tmp_path / "run"
    hosted(run, settings(folder), Plan.new(1, bound=True), Watched(ends=ends))
    assert list(Record(run).events("stopped", "finish")) or not server_run.is_alive(run)


def test_a_process_that_could_not_say_why_it_stopped_is_dead(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "append", full)
    hosted(run, settings(folder), Plan.new(1, bound=True), Watched(ends=OSError()))
    assert not server_run.is_alive(run)


# Watching from without


class FakeProcess:
    """Of Flower's or the gate; it lives until a test ends it."""

    def __init__(self, *arguments):
        self.ended, self.starts, self.log = None, 0, "its.log"

    def start(self):
        self.ended, self.starts = None, self.starts + 1

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

    def number(self, public, name, known):
        if public.read_bytes() in FakeLink.known:
            found = 1001 + FakeLink.known.index(public.read_bytes())
            assert found not in known
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

    def events(folder, *acts, keys=None, then=()):
        """``then`` is what happens between one look and the next."""
        FakeLink.acts = iter(acts)
        meanwhile[:] = then
        listening = supervisor.Listening("127.0.0.1", 8090, keys)
        return supervisor.serve(folder, listening)

    return events


def ran(*events, dies=False):
    """A process that writes these events, and is killed or ends."""

    def act(folder):
        for event, fields in events:
            Record(folder).append(event, **fields)
        if dies:
            (folder / server_run.ALIVE).write_text("7")

    return act


LONG = ("start", {"config": "x" * 3000})
FINISH = ("finish", {"rounds": 1})


def round_(folder, number, *events):
    """A round's events and the checkpoint after it."""
    ran(*events)(folder)
    checkpoint.save(folder, number, Record(folder).bytes, State({}, {}))


def test_events_are_told_as_they_come_until_the_run_has_finished(serving, tmp_path):
    found = list(serving(tmp_path, ran(LONG, ("asked", {"client": "ash"}), FINISH)))
    assert [event["event"] for event in found] == ["start", "asked", "finish"]
    assert FakeLink.last.process.ended == -15 and FakeLink.last.submitted == 1


def test_a_run_that_stopped_says_why_and_how_to_go_on(serving, tmp_path):
    stopped = ("stopped", {"reason": "ValueError: too few."})
    with pytest.raises(ValueError, match=r"stopped: ValueError: too few\. Go on with: flexlora se"):
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
    superlink = pytest.importorskip("flexlora.deployment.flower.superlink")
    made = []

    def make(log="its.log"):
        command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
        made.append(superlink.Process(command, tmp_path / log, dict(os.environ)))
        return made[-1]

    yield make
    for process in made:
        process.stop()


def number(process) -> int:
    return int(process.log.with_suffix(".pid").read_text())


def test_what_a_crash_left_behind_is_ended_before_it_is_started_again(sleeper):
    first, second = sleeper(), sleeper()
    first.start()
    while not first.last_lines():  # it has its environment
        time.sleep(0.01)
    second.start()
    assert first._held.wait(5) == -signal.SIGKILL
    assert number(second) == second._held.pid and second.ended is None


def test_another_process_that_has_its_number_by_now_is_left_alone(sleeper):
    """After a reboot numbers are given anew: to another Python, or to another of one's own."""
    other, gone = sleeper("another.log"), sleeper()
    other.start()
    while not other.last_lines():
        time.sleep(0.01)
    gone.log.with_suffix(".pid").write_text(str(number(other)))
    gone.start()
    assert other.ended is None and gone.ended is None


# Nodes whose keys come while it serves


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A server's keys, and two nodes'."""
    keys = pytest.importorskip("flexlora.deployment.keys")
    folder = tmp_path_factory.mktemp("pairs")
    keys.make_server(folder / "keys", ["localhost"])
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
    return json.loads((folder / server_run.NODES).read_text())


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
    assert "node birch may join" in capsys.readouterr().err


def test_nodes_are_not_registered_again(serving, pairs, held, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    comes(pairs, held, "ash")
    list(serving(run, ran(FINISH), keys=held))
    known = FakeLink.known
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
    assert "node ash is put out: it has no key here any more\n" in capsys.readouterr().err


def test_a_node_with_another_key_is_another_node(serving, pairs, held, tmp_path, capsys):
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(
        *(serving, run, held),
        lambda: shutil.copy(pairs / "birch" / "birch.pub", held / "nodes" / "ash.pub"),
    )
    assert FakeLink.out == [1001] and nodes(run) == {"ash": 1002}
    said = capsys.readouterr().err
    assert "node ash is put out: it has another key\nnode ash may join\n" in said


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
    assert "node ash is not let in: its key SHA256:" in said
    assert "make a new one: flexlora keys DIR --node ash" in said
    assert "node birch may join" in said


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
    (run / server_run.NUMBERS).unlink()
    round_(run, 1, LONG)
    list(serving(run, ran(FINISH), keys=held))
    assert FakeLink.out == [] and nodes(run) == {"ash": 1001}
    assert list(json.loads((run / server_run.NUMBERS).read_text()).values()) == [1001]


def test_a_folder_of_keys_that_is_gone_puts_nobody_out(serving, pairs, held, tmp_path, capsys):
    """It may be a disk that is not there for a while."""
    run = tmp_path / "run"
    comes(pairs, held, "ash")
    goes_on(serving, run, held, lambda: (held / "nodes").rename(held / "elsewhere"))
    assert FakeLink.out == [] and nodes(run) == {"ash": 1001}
    assert "no node is let in or put out: " in capsys.readouterr().err


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
    for file in (server_run.NODES, server_run.NUMBERS):
        (run / file).unlink()  # as if the kill had come before it was written
    round_(run, 1, LONG)
    assert [e["event"] for e in serving(run, ran(FINISH), keys=held)] == ["finish"]
    assert nodes(run) == {"ash": 1001}
