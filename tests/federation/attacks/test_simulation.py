"""Malicious clients in a federation: what others see of them, and what the simulation keeps."""

import dataclasses
import shutil

import pytest

from flexlora.errors import ConfigError
from flexlora.federation import rounds, setup
from flexlora.federation.attacks import AttackSettings, plan, run
from flexlora.federation.attacks.kinds import named
from flexlora.federation.attacks.simulation import RESULT
from flexlora.federation.attacks.transport import AttackedTransport
from flexlora.federation.client_store import ClientStore
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Reply
from flexlora.method import space_of
from support import models

OFF = {"clip_factor": 0.0, "refuse_factor": 0.0, "most_share": 1.0}
ATTACKERS = frozenset({"client1", "client4"})


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.fixture
def once(monkeypatch, loaded):
    models.load_once(monkeypatch, loaded)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A transport that keeps the replies that pass."""

    inner: object
    replies: list[Reply]
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs, patience):
        for reply in self.inner.exchange(jobs, patience):
            self.replies.append(reply)
            yield reply


def small(folder, **changes):
    sections = {
        "federation": {"rounds": 2, "cohort": 6, **OFF},
        "evaluation": {"seen_clients": 0, "unseen_clients": 0, "base": False, "truncated": False},
        **changes,
    }
    return models.settings(folder, **sections)


def uploads(folder, name, attack, method="flexlora", **changes) -> dict[tuple[str, int], bytes]:
    """The bytes that every client sent in the first round, and events of the whole run."""
    ready = setup.prepare(small(folder, method={"name": method}, **changes), models.corpus())
    store = ClientStore(folder / f"{name}-private", shared=True)
    runtime = ready.with_runtime(clients=store).runtime
    honest = SimulatedTransport(runtime)
    transport = honest
    if attack:
        transport = AttackedTransport(
            honest, runtime, ATTACKERS, named(attack), space_of(ready.method), 3.0, 2, ready.ranks
        )
    replies = []
    events = list(rounds.run(ready, folder / name, Watched(transport, replies)))
    assert events[-1]["event"] == "finish"
    assert [event for event in events if event["event"] in ("lost", "stray", "kept")] == []
    return {(reply.client, n // 6): reply.data for n, reply in enumerate(replies)}


def test_only_malicious_clients_send_something_else(folder, once):
    honest = uploads(folder, "honest", None)
    attacked = uploads(folder, "attacked", "sign-flip")
    first = {id: data for (id, number), data in attacked.items() if number == 0}
    assert {id for id, data in first.items() if _weights(data) != _weights(honest[id, 0])} == (
        ATTACKERS
    )
    # In the second round all start from another model.
    assert all(_weights(honest[id, 1]) != _weights(attacked[id, 1]) for id in first)


def _weights(upload: bytes) -> bytes:
    """The tensors of an upload, without its header, which has seconds."""
    return upload[8 + int.from_bytes(upload[:8], "little") :]


@pytest.mark.slow
def test_in_a_round_that_is_not_attacked_malicious_clients_are_honest(folder, once):
    honest, attacked = uploads(folder, "h2", None), uploads(folder, "once", "scale-once")
    for client in [f"client{n}" for n in range(6)]:
        assert _weights(honest[client, 0]) == _weights(attacked[client, 0])
        changed = _weights(honest[client, 1]) != _weights(attacked[client, 1])
        assert changed == (client in ATTACKERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["fedit", "flora", "raflora", "loraa2", "ravan", "flasc", "fedtt"]
)
def test_methods_take_what_malicious_clients_send_for_honest_uploads(folder, once, method):
    ranks = {"types": None, "distribution": None, "rank": 3}
    for attack in ("collusion", "noise"):
        uploads(folder, f"{method}-{attack}", attack, method, ranks=ranks)


def simulate(folder, out, seen=None, **chosen):
    settings = small(folder, federation={"rounds": 1, "cohort": 6, "quorum": 5})
    table = {"attacks": ("sign-flip",), "defences": ("clip", "multi-krum"), **chosen}
    chosen = AttackSettings(**table)
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"path": str(folder / "rows.parquet")})}
    )
    cells = plan(chosen, settings.seed, out)

    def watch(cell, events):
        (seen if seen is not None else []).append(cell.name)
        list(events)

    return list(run(settings, chosen, cells, watch))


@pytest.fixture
def table(folder):
    import pyarrow.parquet as pq

    pq.write_table(models.corpus().table, folder / "rows.parquet")


@pytest.mark.slow
def test_a_simulation_goes_on_where_it_was_and_refuses_another_config(folder, once, table):
    out, seen = folder / "simulated", []
    first = simulate(folder, out, seen)
    assert [o.state for o in first] == ["finished"] * 5 and len(seen) == 5
    honest = first[0].scores
    assert honest.distance is None and honest.loss > 0
    assert all(o.scores.distance > 1e-3 for o in first if o.cell.attack != "none")
    lost = first[3].cell.folder
    shutil.rmtree(lost)
    (first[4].cell.folder / RESULT).write_text("{")
    seen.clear()
    again = simulate(folder, out, seen)
    assert [o.scores for o in again] == [o.scores for o in first]
    assert seen == [first[3].cell.name, first[4].cell.name]
    with pytest.raises(ConfigError, match="was run with another config, trigger or target"):
        simulate(folder, out, target="another text")


@pytest.mark.slow
def test_half_of_all_clients_cannot_be_malicious(folder, once, table):
    with pytest.raises(ConfigError, match="3 of 6 clients would be malicious"):
        simulate(folder, folder / "half", share=0.49)
