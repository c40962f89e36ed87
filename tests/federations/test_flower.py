"""Real clients over Flower: the same numbers as in process, and whom it leaves out."""

import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

import flowering as flower
import tiny
from flexlora import experiment, hosting, rounds
from flexlora.federations.flower.grid import Flower
from flexlora.peft_directory import WEIGHTS
from flexlora.record import Record

RANKS = {"client0": 2, "client1": 5, "client2": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    tiny.save(folder / "model")
    flower.identified()
    return folder


@pytest.fixture
def sockets():
    # A test's own folder is too deep for a socket.
    path = Path(tempfile.mkdtemp(prefix="flexlora-"))
    yield path
    shutil.rmtree(path)


def serve(folder: Path, grid, settings, clients=3, bound=True) -> list[dict]:
    """A run of real clients; its journal."""
    if not (folder / hosting.PLAN).exists():
        hosting.lay_out(folder, settings, hosting.Plan.new(clients, bound))
    hosting.host(folder, lambda roll, terms, quorum: Flower(grid, roll, terms, quorum, 0.01))
    return list(Record(folder).events())


def simulate(folder: Path, settings) -> list[dict]:
    """The same run in process."""
    corpus = tiny.corpus()
    mine = corpus.select([owner in RANKS for owner in corpus.keys("client")])
    return list(rounds.run(experiment.prepare(settings, mine), folder))


def remote(folder: Path, ranks=RANKS, **changes):
    data = {"format": "remote", "path": None, "prompt": "plain", "max_tokens": 32}
    return flower.settings(folder, ranks, **{"data": data, **changes})


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedsalora", "flexfold"])
def test_three_rounds_give_the_numbers_of_the_simulation(folder, sockets, tmp_path, method):
    how = {"method": {"name": method}, "federation": {"rounds": 3, "cohort": 3}}
    ranks = RANKS if method != "fedsalora" else dict.fromkeys(RANKS, 3)
    wanted = simulate(tmp_path / "simulated", flower.settings(folder, ranks, **how))
    (tmp_path / "model").symlink_to(folder / "model")
    grid = flower.start(tmp_path / "nodes", sockets, ranks)
    try:
        got = serve(tmp_path / "served", grid, remote(folder, ranks, **how))
    finally:
        flower.stop(grid)
    assert got[-1]["event"] == "finish"
    weights = [Path(events[-1]["adapter"]) / WEIGHTS for events in (wanted, got)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [e["client"] for e in got if e["event"] == "joined"] == list(RANKS)
    for mine, theirs in zip(
        *([e for e in events if e["event"] == "round"] for events in (got, wanted)), strict=True
    ):
        for key in ("cohort", "bytes_up", "bytes_down", "loss_total", "update_norm"):
            assert mine[key] == theirs[key]
