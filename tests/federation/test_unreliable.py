"""A federation whose clients drop out, answer twice, late, for others, and in any order."""

import hashlib
import random
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flexlora.errors import ProtocolError
from flexlora.federation import checkpoint, collect, rounds, setup
from flexlora.federation.transport import Reply
from flexlora.journal.record import Record
from flexlora.laws.dense import best, product, relative_error, weighted_sum
from flexlora.lowrank.factors import Adapter
from flexlora.method import Upload
from flexlora.peft_format import WEIGHTS
from support import models, sizes
from support.unreliable import Unreliable, data, upload

Uploads = dict[int, dict[str, Upload]]
"""By round and client."""

ROUNDS, COHORT, QUORUM = 2, 4, 2

WITHIN = ("client", "lost", "stray", "short")
"""Events of a round that is not aggregated yet."""

JOURNALS = ("metrics.jsonl", "answers.jsonl", ".lock", ".lock.holder")


@pytest.fixture(scope="module")
def ready(folder):
    """A federation of six clients; every client weighs the same, so that no share is capped."""
    return setup.prepare(
        models.settings(
            folder,
            model={"targets": ["q_proj", "down_proj"]},
            method={"name": "flexlora", "weights": "uniform"},
            federation={"rounds": ROUNDS, "cohort": COHORT, "quorum": QUORUM, "attempts": 2},
            evaluation={"seen_clients": 0, "unseen_clients": 0, "base": False},
        ),
        models.corpus(),
    )


def adapters(folder: Path, number: int) -> bytes:
    return (rounds.adapter_folder(folder, number) / WEIGHTS).read_bytes()


def committed(folder: Path) -> dict[str, str]:
    """A digest of each file of the state and the adapters that a run has committed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in JOURNALS and not path.relative_to(folder).parts[0].startswith("upl")
    }


def check_mean(ready, model: Adapter, uploads: list[Adapter]) -> None:
    """The new state is the best approximation of the plain mean of what was received."""
    for module, factors in model.items():
        mean = weighted_sum([(1 / len(uploads), sent[module]) for sent in uploads])
        assert relative_error(product(factors), best(mean, ready.ranks[module])) < 1e-4


def drive(ready, folder: Path, transport: Unreliable, left: Uploads | None = None) -> str:
    """Run to the end or until a round is abandoned, checking what must hold; how it ended.

    ``left`` are the uploads that an abandoned round has left on the disk: they count if their
    clients are invited again.
    """
    number, before = -1, {}
    try:
        for event in rounds.run(ready, folder, transport, resume=folder.exists()):
            point = checkpoint.load(folder)
            if point.round > number:
                sent = counted(folder, point.round, transport, left or {})
                if number >= 0:
                    assert point.round == number + 1 and len(sent) >= QUORUM
                    check_mean(ready, point.state.model, [u.adapter for u in sent.values()])
                number, before = point.round, committed(folder)
            elif event["event"] in WITHIN:
                assert committed(folder) == before  # nothing changes before the quorum is there
    except ProtocolError as error:
        assert f"of round {number + 1} returned" in str(error)
        assert committed(folder) == before
        assert len(transport.received.get(number + 1, {})) < QUORUM
        return "abandoned"
    return "finished"


def counted(folder: Path, number: int, transport: Unreliable, left: Uploads) -> dict[str, Upload]:
    """A round's uploads by the clients that the journal names: all that came, and some left."""
    came = transport.received.get(number, {})
    events = Record(folder).events()
    names = [e["client"] for e in events if e["event"] == "client" and e["round"] == number]
    assert set(came) <= set(names) <= {*came, *left.get(number, {})}
    return {name: {**left.get(number, {}), **came}[name] for name in names}


def check_journal(folder: Path) -> None:
    """Every round has its quorum, and each client once."""
    events = list(Record(folder).events())
    for done in (event for event in events if event["event"] == "round"):
        number = done["round"]
        clients = [e for e in events if e["event"] == "client" and e["round"] == number]
        names = [event["client"] for event in clients]
        assert len(set(names)) == len(names) == done["received"] >= QUORUM
        assert set(names) <= set(done["cohort"])
        assert done["examples"] == sum(event["examples"] for event in clients)


@sizes.trials(4, 500)
def test_a_round_counts_each_client_once_and_is_committed_only_with_its_quorum(
    ready, tmp_path, unsynced, trials
):
    ends = Counter(end_of(ready, tmp_path / "run", trial) for trial in range(trials))
    print(dict(ends))
    assert trials < 100 or {*ends} == {"abandoned", "finished"}


def end_of(ready, folder: Path, trial: int) -> str:
    """How a federation on the network of this number ends, and that it goes on afterwards."""
    draw = random.Random(trial)
    shutil.rmtree(folder, ignore_errors=True)
    transport = Unreliable(ready, draw, dropout=draw.choice((0.0, 0.1, 0.3, 0.5, 0.8)))
    end = drive(ready, folder, transport)
    check_journal(folder)
    if end == "abandoned":
        # A network that has recovered goes on from the state before the abandoned round.
        recovered = Unreliable(ready, draw, dropout=0.0)
        assert drive(ready, folder, recovered, transport.received) == "finished"
        check_journal(folder)
    return end


@dataclass(frozen=True)
class InOrder:
    """A transport whose answers come in an order of their own."""

    replies: dict[str, bytes]
    order: list[str]
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs, patience):
        asked = {job.client for job in jobs}
        yield from (Reply(id, self.replies[id]) for id in self.order if id in asked)


@sizes.trials(4, 1000)
def test_the_order_in_which_uploads_arrive_changes_no_bit(ready, tmp_path, unsynced, trials):
    one_round = ready.experiment.federation.model_copy(update={"rounds": 1, "cohort": None})
    everybody = one_round.model_copy(update={"fraction": 1.0})
    ready = replace(ready, experiment=ready.experiment.model_copy(update={"federation": everybody}))
    state = ready.method.start(ready.fresh(), ready.context(0))
    requests = collect.turn_requests(ready, 1, state, tuple(ready.clients), tmp_path / "downloads")
    replies = {job.client: data(ready, upload(ready, job)) for job in requests}
    draw, results = random.Random(5), set()
    for _ in range(trials):
        order = draw.sample([*replies], len(replies))
        events = list(rounds.run(ready, tmp_path / "run", InOrder(replies, order)))
        arrived = [event["client"] for event in events if event["event"] == "client"]
        assert arrived == order and len(order) == 6
        saved = committed(tmp_path / "run").items()
        # Beside the adapters there are facts of the journal, which keeps the order of arrival.
        results.add(tuple(item for item in saved if item[0].endswith(".safetensors")))
        shutil.rmtree(tmp_path / "run")
    assert len(results) == 1 and len(results.pop()) >= 2
