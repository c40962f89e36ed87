"""Whole runs in which one of ten clients attacks, against the run in which it is honest or away."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexlora import peft_format, wire
from flexlora.federation import rounds, setup
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.population import Clients
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Lost, Reply, WaitPolicy
from flexlora.lowrank import Adapter, Factors, LowRankSum
from flexlora.method import Upload
from flexlora.model.base import Base
from support import models

ATTACKER = "0"
Attack = Callable[[Upload], Upload | None]
"""What the attacker sends instead of its upload; None: it sends nothing."""


@dataclass
class Hostile:
    """A simulation in which one client's uploads are replaced."""

    inner: SimulatedTransport
    attack: Attack
    folder: Path
    sent: list[Upload] = dataclasses.field(default_factory=list)

    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply | Lost]:
        for reply in self.inner.exchange(jobs, patience):
            if isinstance(reply, Lost):
                yield reply
                continue
            path = self.folder / "seen.safetensors"
            path.write_bytes(reply.data)
            seen = wire.open_upload(path)
            whole = dataclasses.replace(seen, adapter=seen.adapter.to(torch.float32))
            self.sent.append(whole)
            if reply.client != ATTACKER:
                yield reply
            elif (sent := self.attack(whole)) is not None:
                yield Reply(ATTACKER, wire.encode_upload(sent, torch.float32))


@dataclass(frozen=True)
class Run:
    events: list[dict]
    folder: Path

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["event"] == kind]

    def adapter(self, number: int) -> Adapter:
        return peft_format.read(rounds.adapter_folder(self.folder, number)).adapter


def norm(weighted: list[tuple[float, Adapter]]) -> float:
    """The norm of a sum of adapters, in products."""
    modules = weighted[0][1]
    squares = [LowRankSum.of((w, a[m]) for w, a in weighted).norm() ** 2 for m in modules]
    return math.sqrt(math.fsum(squares))


def distance(one: Adapter, other: Adapter) -> float:
    """How far the first is from the second, relative to the second."""
    return norm([(1.0, one), (-1.0, other)]) / norm([(1.0, other)])


def scaled(upload: Upload, factor: float) -> Upload:
    adapter = Adapter({m: Factors(f.B * factor, f.A) for m, f in upload.adapter.items()})
    return dataclasses.replace(upload, adapter=adapter)


def noise(upload: Upload, size: float) -> Upload:
    """Random factors, each of this norm."""
    draw = torch.Generator().manual_seed(8)

    def factor(x: torch.Tensor) -> torch.Tensor:
        new = torch.randn(x.shape, generator=draw)
        return new * (size / new.norm())

    adapter = Adapter({m: Factors(factor(f.B), factor(f.A)) for m, f in upload.adapter.items()})
    return dataclasses.replace(upload, adapter=adapter)


@pytest.fixture(scope="module")
def base(folder) -> Base:
    return models.settings(folder).model.load()


@pytest.fixture(scope="module")
def ready(folder, base) -> PreparedRun:
    how = {
        "data": {"partition": {"kind": "iid", "clients": 10}},
        "federation": {"rounds": 3, "cohort": 10},
        "evaluation": {"seen_clients": 0, "unseen_clients": 0, "truncated": False},
        "training": {"max_steps": 1},
    }
    return setup.prepare(models.settings(folder, **how), models.corpus(10), base=base)


def go(
    ready: PreparedRun, folder: Path, attack: Attack, sent: list[Upload] | None = None, **how
) -> Run:
    transport = Hostile(SimulatedTransport(ready.runtime), attack, folder)
    transport.sent = transport.sent if sent is None else sent
    return Run(list(rounds.run(ready, folder / "run", transport, **how)), folder / "run")


def honest_upload(upload: Upload) -> Upload:
    return upload


@pytest.fixture(scope="module")
def honest(ready, tmp_path_factory) -> Run:
    return go(ready, tmp_path_factory.mktemp("honest"), honest_upload)


def in_round(number: int, attack: Attack) -> Attack:
    return lambda upload: attack(upload) if upload.round == number else upload


def absent(upload: Upload) -> None:
    """The client does not answer."""


def same(one: Run, other: Run, number: int = 3) -> bool:
    a, b = one.adapter(number), other.adapter(number)
    return all(torch.equal(a[m].B, b[m].B) and torch.equal(a[m].A, b[m].A) for m in b)


def test_an_honest_run_is_left_alone(honest):
    assert [e["round"] for e in honest.of("round")] == [1, 2, 3]
    assert not [e for kind in ("clipped", "limited", "kept", "lost") for e in honest.of(kind)]


@pytest.fixture(scope="module")
def away(ready, tmp_path_factory) -> Run:
    return go(ready, tmp_path_factory.mktemp("away"), in_round(2, absent))


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        lambda upload: noise(upload, 9.9e5),
        pytest.param(lambda upload: scaled(upload, 1000.0), marks=pytest.mark.slow),
        lambda upload: scaled(upload, 1e5),
        pytest.param(lambda upload: scaled(upload, -1e4), marks=pytest.mark.slow),
    ],
    ids=["largest norms", "a thousand times", "1e5 times", "back 1e4 times"],
)
def test_one_enormous_upload_does_what_an_absent_client_does(attack, ready, honest, away, tmp_path):
    """And the round after it goes on with all."""
    run = go(ready, tmp_path, in_round(2, attack))
    assert distance(run.adapter(3), honest.adapter(3)) < 1
    assert [(e["client"], e["kind"]) for e in run.of("lost")] == [(ATTACKER, "too_large_change")]
    assert same(run, away)


@pytest.mark.slow
def test_one_who_scales_every_upload_never_counts(ready, tmp_path):
    run = go(ready, tmp_path, lambda upload: scaled(upload, 1000.0))
    (tmp_path / "absent").mkdir()
    away = go(ready, tmp_path / "absent", absent)
    assert distance(run.adapter(3), away.adapter(3)) < 1
    assert same(run, away) and len(run.of("lost")) == 3


@pytest.mark.slow
def test_a_sign_flip_is_scaled_down(ready, honest, tmp_path):
    """One client moves the first round by twice its share of the largest change at most."""
    sent: list[Upload] = []
    run = go(ready, tmp_path, lambda upload: scaled(upload, -10.0), sent=sent)
    first = [upload for upload in sent if upload.round == 1]
    # Everybody starts from a product of zero: the change is the upload.
    median = sorted(norm([(1.0, upload.adapter)]) for upload in first)[4]
    share = max(u.examples for u in first) / sum(u.examples for u in first)
    moved = norm([(1.0, run.adapter(1)), (-1.0, honest.adapter(1))])
    assert moved <= 2 * 3 * median * share * (1 + 1e-3)
    assert {e["client"] for e in run.of("clipped")} == {ATTACKER}
    assert all(e["ratio"] > 3 and 0 < e["share"] < 1 for e in run.of("clipped"))


def test_a_claim_of_a_billion_examples_counts_a_fifth(ready, tmp_path):
    clients = ready.clients
    assert isinstance(clients, Clients)
    claims = {**clients.rows, ATTACKER: range(10**9)}
    lying = dataclasses.replace(ready, clients=dataclasses.replace(clients, rows=claims))
    own: list[Adapter] = []

    def attack(upload: Upload) -> Upload:
        own.append(upload.adapter)
        return dataclasses.replace(upload, examples=10**9)

    run = go(lying, tmp_path, attack)
    for number in (1, 2, 3):
        assert distance(run.adapter(number), own[number - 1]) > 0.3
    (limited, *_) = run.of("limited")
    assert limited["most_share"] == 0.2 and limited["shares"] == {ATTACKER: pytest.approx(1, 1e-6)}


def test_a_round_that_ends_out_of_bounds_leaves_the_model(ready, tmp_path):
    """Of a single client in the first round nothing can be compared but the result."""
    settings = ready.experiment.federation.model_copy(update={"cohort": 1})
    one = dataclasses.replace(
        ready, experiment=ready.experiment.model_copy(update={"federation": settings})
    )
    transport = Hostile(SimulatedTransport(one.runtime), honest_upload, tmp_path)
    transport.attack = in_round(1, lambda upload: noise(upload, 9.9e5))
    transport.present = lambda clients: [ATTACKER]
    events = list(rounds.run(one, tmp_path / "run", transport))
    run = Run(events, tmp_path / "run")
    assert [e["round"] for e in run.of("round")] == [1, 2, 3] and not run.of("lost")
    assert norm([(1.0, run.adapter(1))]) == 0 < norm([(1.0, run.adapter(2))]) < 100
    (kept,) = run.of("kept")
    assert kept["round"] == 1 and "must be at most" in kept["reason"]


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_same_rounds(ready, tmp_path):
    """What uploads are compared with is in the checkpoint."""

    def attack(upload: Upload) -> Upload:
        return scaled(upload, -10.0)

    whole = go(ready, tmp_path, attack)
    (tmp_path / "parts").mkdir()
    two = ready.experiment.federation.model_copy(update={"rounds": 2})
    short = dataclasses.replace(
        ready, experiment=ready.experiment.model_copy(update={"federation": two})
    )
    go(short, tmp_path / "parts", attack)
    resumed = go(ready, tmp_path / "parts", attack, resume=True)
    assert same(whole, resumed)
    ends = [[(e["ratio"], e["share"]) for e in run.of("clipped")][-1:] for run in (whole, resumed)]
    assert ends[0] == ends[1] != []
