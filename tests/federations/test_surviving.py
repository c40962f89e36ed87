"""A real federation goes on, whatever is killed: one kill in each round, and the same adapter.

Every client's turn is asked for until it is there (quorum = cohort), so the adapter at the end
must be that of a simulation in which nothing was killed, to the bit.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

import flowering
import tiny
from flexlora import experiment, rounds
from flexlora.peft_directory import WEIGHTS
from surviving import RANKS, Site

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, rounds=len(KILLS), method="flora")
    yield made
    made.stop()


def supernode(site: Site) -> None:
    """The SuperNode with all that it started, in the middle of a turn."""
    group = int((site.folder / "state-client1" / "flower" / "supernode.pid").read_text())
    os.killpg(group, signal.SIGKILL)


def client_process(site: Site) -> None:
    """The process that Flower started for a message."""
    site.until(lambda: site.kill("flwr-clientapp", "--") > 0, 30, "a flwr-clientapp to kill")


def gate(site: Site) -> None:
    assert site.kill("flexlora.federations.flower.gate", site.address) == 1


def superlink(site: Site) -> None:
    assert site.kill("flower-superlink", str(site.run)) >= 1


def server_process(site: Site) -> None:
    """The process in which the rounds run."""
    pid = int((site.run / "serverapp.pid").read_text())
    os.kill(pid, signal.SIGKILL)


def joined(site: Site) -> None:
    """`flexlora join`, with its model in memory; its owner starts it again."""
    site.processes["client2"].kill()
    site.processes["client2"].wait()
    time.sleep(3)
    site.join("client2")


def served(site: Site) -> None:
    """`flexlora serve`; its owner resumes it."""
    site.processes["serve"].kill()
    site.processes["serve"].wait()
    site.serve(resume=True)


def network(site: Site) -> None:
    """Nothing gets through for twenty seconds."""
    assert site.kill("flexlora.federations.flower.gate", site.address, how=signal.SIGSTOP) == 1
    time.sleep(20)
    site.kill("flexlora.federations.flower.gate", site.address, how=signal.SIGCONT)


def state(site: Site) -> None:
    """A client loses what it kept to itself."""
    for path in (site.folder / "state-client0").iterdir():
        if path.name not in ("flower", "tokens"):
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


KILLS = [
    supernode,
    client_process,
    gate,
    superlink,
    server_process,
    joined,
    served,
    network,
    state,
    everything,
]


def test_ten_kills_and_the_same_adapter(site):
    site.serve()
    site.until(site.listens, 90, "the server to listen")
    for client in RANKS:
        site.join(client)
    took = {}
    for number, kill in enumerate(KILLS, start=1):
        site.until(site.asked(number, "client2"), 200, f"round {number} to be handed out")
        time.sleep(2.0)  # in the middle of the turns: a process of Flower's takes longer to start
        kill(site)
        took[kill.__name__] = site.until(site.done(number), 300, f"round {number} after {kill}")
        print(f"{kill.__name__}: round {number} done {took[kill.__name__]:.0f} s later", flush=True)
    site.until(site.finished, 60, "the run to finish")

    wanted = simulated(site)
    got = Path(site.events("finish")[-1]["adapter"]) / WEIGHTS
    assert got.read_bytes() == (Path(wanted[-1]["adapter"]) / WEIGHTS).read_bytes()
    done = [e["round"] for e in site.events("round")]
    assert done == list(range(1, len(KILLS) + 1))
    assert all(e["received"] == 3 for e in site.events("round"))


def simulated(site: Site) -> list[dict]:
    how = {
        "method": {"name": site.method},
        "federation": {"rounds": site.rounds, "cohort": 3},
    }
    corpus = tiny.corpus()
    mine = corpus.select([owner in RANKS for owner in corpus.keys("client")])
    settings = flowering.settings(site.folder, RANKS, **how)
    return list(rounds.run(experiment.prepare(settings, mine), site.folder / "simulated"))
