"""A real federation goes on, whatever is killed: one kill in each round, and the same adapter.

Every client's turn is asked for until it is there (quorum = cohort), so the adapter at the end
must be that of a simulation in which nothing was killed, to the bit.
"""

import os
import shutil
import signal
import time

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora.deployment.certificates import renew_server
from flexlora.deployment.flower.processes import ProcessId
from support.certificates import dated
from support.processes import RANKS, SOONER, Site

pytestmark = pytest.mark.slow


@pytest.fixture
def sites(tmp_path):
    """Makes a site with a round for each kill."""
    made = []

    def make(kills, **how):
        made.append(Site(tmp_path, rounds=len(kills), method="flora", **how))
        return made[-1]

    yield make
    for site in made:
        site.stop()


def supernode(site: Site) -> None:
    """The SuperNode with all that it started, in the middle of a turn."""
    leader = ProcessId.read(site.state("client1") / "flower" / "supernode.pid")
    os.killpg(leader.pid, signal.SIGKILL)


def client_process(site: Site) -> None:
    """The process that Flower started for a message."""
    # What the program `flwr-clientapp` of a node becomes.
    module = "flexlora.deployment.flower.node_processes message"
    site.until(lambda: site.kill(module) > 0, 30, "a process of a client to kill")


def gate(site: Site) -> None:
    assert site.kill("flexlora.deployment.flower.gate", site.address) == 1


def superlink(site: Site) -> None:
    assert site.kill("flower.superlink_program", str(site.run)) >= 1


def server_process(site: Site) -> None:
    """The process in which the rounds run."""
    pid = ProcessId.read(site.run / "serverapp.pid").pid
    os.kill(pid, signal.SIGKILL)


def joined(site: Site) -> None:
    """`flexlora join`, with its model in memory; its owner starts it again."""
    site.processes["client2"].kill()
    site.processes["client2"].wait()
    time.sleep(3)
    site.join("client2")


def served(site: Site) -> None:
    """`flexlora serve`; its owner resumes it."""
    file = site.run / "serverapp.pid"
    orphan = ProcessId.read(file)
    site.processes["serve"].kill()
    site.processes["serve"].wait()
    site.serve(resume=True)
    # What was left behind goes on with rounds until the new server has ended it.
    site.until(lambda: ProcessId.read(file) not in (None, orphan), 120, "the rounds to be resumed")


def interrupted(site: Site) -> None:
    """Ctrl-C while the process of the rounds is busy, as with a large upload; then a resume.

    A process that is stopped acts on no SIGTERM, as Flower's while it waits for an upload.
    """
    busy = ProcessId.read(site.run / "serverapp.pid")
    os.kill(busy.pid, signal.SIGSTOP)
    site.processes["serve"].send_signal(signal.SIGINT)
    site.processes["serve"].wait(60)
    assert busy.running is None and not (site.run / "serverapp.pid").exists()
    assert site.pids(str(site.run)) == []
    site.serve(resume=True)


def network(site: Site) -> None:
    """Nothing gets through for twenty seconds."""
    # A server that has been resumed may not be up yet: its nodes had the round before.
    site.until(site.listens, 60, "the server to listen")
    assert site.kill("flexlora.deployment.flower.gate", site.address, how=signal.SIGSTOP) == 1
    time.sleep(20)
    site.kill("flexlora.deployment.flower.gate", site.address, how=signal.SIGCONT)


def state(site: Site) -> None:
    """A client loses what it kept to itself."""
    for path in site.state("client0").iterdir():
        if path.is_dir() and path.name not in ("flower", "tokens"):
            shutil.rmtree(path)


def everything(site: Site) -> None:
    """All machines lose their power at once."""
    for process in site.processes.values():
        process.kill()
        process.wait()
    for pid in site.pids(str(site.folder)):
        site.kill(str(pid))
    site.serve(resume=True)
    site.until(site.listens, 60, "the server to listen again")
    for client in RANKS:
        site.join(client)


def clients(site: Site) -> None:
    """A SuperNode in the middle of a turn, `flexlora join`, and the network, all in one round.

    Flower counts both nodes as online for a minute, which is waited for once.
    """
    supernode(site)
    site.processes["client2"].kill()
    site.processes["client2"].wait()
    network(site)
    site.join("client2")


KILLS = [
    supernode,
    client_process,
    gate,
    superlink,
    server_process,
    joined,
    served,
    interrupted,
    network,
    state,
    everything,
]
SHORT = [clients, superlink, interrupted]


def test_eleven_kills_and_the_same_adapter(sites):
    survives(sites(KILLS), KILLS)


def test_the_most_telling_kills_in_three_rounds(sites):
    survives(sites(SHORT, env=SOONER), SHORT)


def survives(site: Site, kills: list) -> None:
    """One kill in each round, and the adapter is that of a run without any."""
    started = time.monotonic()
    site.begin()
    took = {}
    for number, kill in enumerate(kills, start=1):
        site.until(site.asked(number, "client2"), 200, f"round {number} to be handed out")
        print(f"round {number} handed out after {time.monotonic() - started:.0f} s")
        if kill is not client_process:  # which waits for a process that lives for seconds only
            time.sleep(2.0)  # in the middle of local training
        kill(site)
        took[kill.__name__] = site.until(site.done(number), 300, f"round {number} after {kill}")
        print(f"{kill.__name__}: round {number} done {took[kill.__name__]:.0f} s later", flush=True)
    site.until(site.finished, 60, "the run to finish")
    site.assert_as_if_nothing_happened()


@pytest.mark.trust
def test_a_run_outlives_the_servers_certificate(sites):
    """It expires in a round, clients connect anew and are refused, and it is renewed."""
    site = sites([None, None], env=SOONER)
    keys = site.folder / "keys"

    def expired() -> bool:
        return "server.crt expired on" in site.said("serve")

    site.begin()
    site.until(site.asked(1, "client2"), 200, "round 1")
    dated(keys / "server.crt", -99, 3)
    site.until(expired, 60, "the end of the certificate to be said")
    supernode(site)
    said = "The server's certificate has expired: its owner renews it, while the server runs"
    site.until(lambda: said in site.said("client1"), 90, "a client to be told")
    renew_server(keys)
    site.until(site.finished, 300, "the run to finish")
    site.assert_as_if_nothing_happened()


def test_a_key_that_is_taken_out_ends_a_right_and_a_new_one_gives_it_back(tmp_path):
    """While the server runs, and to a client that is at work."""
    site = Site(tmp_path, rounds=40, ranks={"client0": 2, "client1": 5}, quorum=1)
    try:
        site.begin()
        site.until(site.done(1), 120, "round 1")
        site.let_in("client1").unlink()
        site.until(lambda: "revoked node client1" in site.said("serve"), 30, "to be put out")
        number = len(site.events("round"))
        site.until(site.done(number + 3), 120, "rounds without it")
        assert site.events("round")[-1]["cohort"] == ["client0"]
        site.until(lambda: "Trying again in" in site.said("client1"), 60, "to be told")

        site.processes["client1"].terminate()
        site.processes["client1"].wait(30)
        site.give_key("client1")
        site.join("client1")
        both = ["client0", "client1"]
        site.until(lambda: site.events("round")[-1]["cohort"] == both, 120, "it to be back")
        assert not site.finished()
    finally:
        site.stop()
