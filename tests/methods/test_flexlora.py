import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import methods
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.interface import Client, State, Upload
from flexlora.methods.flexlora import FlexLoRA
from flexlora.seeds import rng
from support.factors import random_factors
from support.oracle import best, product, relative_error, weighted_sum

M = "model.q"
OUT, IN = 11, 7


def draw(module):
    return rng(5, "handout", module)


def client(number: int, rank: int, examples: int) -> Client:
    return Client(f"c{number}", {M: rank}, f"rank{rank}", examples)


def upload(client: Client, factors: Factors) -> Upload:
    return Upload(client.id, 1, Adapter({M: factors}), client.examples)


def start(rank: int) -> State:
    return FlexLoRA().start(Adapter({M: random_factors(OUT, rank, IN, 9)}))


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    draws = np.random.default_rng(seed).normal(size=(rows, columns))
    return torch.linalg.qr(torch.tensor(draws))[0]


@pytest.mark.parametrize("split", ["left", "balanced"])
def test_without_gradients_the_tail_decays_by_the_share_that_holds_it(split):
    """From unit singular values, the block of rank h has (N_h / N)^t after t rounds."""
    clients = [client(0, 2, 13), client(1, 3, 17), client(2, 5, 29)]
    whole, method = 59, FlexLoRA(split=split)
    state = method.start(Adapter({M: Factors(orthonormal(OUT, 5, 1), orthonormal(IN, 5, 2).T)}))
    for t in range(1, 5):
        uploads = [upload(c, method.handout(state, c, draw).adapter[M]) for c in clients]
        state = method.aggregate(state, uploads)
        S = torch.linalg.svdvals(product(method.update(state)[M]))[:5]
        want = [1, 1, (46 / whole) ** t, (29 / whole) ** t, (29 / whole) ** t]
        torch.testing.assert_close(S, torch.tensor(want, dtype=torch.float64))


def test_ranks_large_enough_lose_nothing_round_after_round():
    clients = [client(0, 6, 13), client(1, 6, 17)]
    method, state = FlexLoRA(), start(6)
    uploads = [upload(c, random_factors(OUT, 3, IN, i)) for i, c in enumerate(clients)]
    want = weighted_sum([(u.examples / 30, u.adapter[M]) for u in uploads])
    for _ in range(3):
        state = method.aggregate(state, uploads)
        assert relative_error(product(method.update(state)[M]), want) < 1e-12
        assert state.facts["lost_energy"][M] == pytest.approx(0, abs=1e-12)
        uploads = [upload(c, method.handout(state, c, draw).adapter[M]) for c in clients]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_the_error_of_a_handout_is_what_the_dropped_singular_values_say(rank, seed):
    uploads = [
        upload(client(i, 7, n), random_factors(OUT, r, IN, seed + i))
        for i, (r, n) in enumerate([(2, 13), (3, 17), (5, 29)])
    ]
    method = FlexLoRA()
    state = method.aggregate(start(7), uploads)
    exact = weighted_sum([(u.examples / 59, u.adapter[M]) for u in uploads])
    handed = product(method.handout(state, client(9, rank, 1), draw).adapter[M])
    dropped = torch.linalg.svdvals(exact)[rank:]
    error = float(torch.linalg.matrix_norm(handed - exact))
    assert error == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-9, abs=1e-9)
    assert relative_error(handed, best(exact, rank)) < 1e-9


def test_the_energy_lost_at_the_server_is_recorded():
    uploads = [upload(client(i, 4, 7), random_factors(OUT, 4, IN, i)) for i in range(2)]
    state = FlexLoRA().aggregate(start(4), uploads)
    S = torch.linalg.svdvals(weighted_sum([(0.5, u.adapter[M]) for u in uploads]))
    want = float(S[4:].square().sum() / S.square().sum())
    assert 0.001 < want < 0.5
    assert state.facts["lost_energy"][M] == pytest.approx(want, rel=1e-9)
    assert state.adapters["global"].ranks == {M: 4}


def test_both_splits_hold_the_same_update():
    uploads = [upload(client(i, 5, 7 + i), random_factors(OUT, 3, IN, i)) for i in range(2)]
    left, balanced = (
        FlexLoRA(split=split).aggregate(start(5), uploads).adapters["global"][M]
        for split in ("left", "balanced")
    )
    assert relative_error(product(left), product(balanced)) < 1e-12
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(left.A @ left.A.T, eye)
    torch.testing.assert_close(balanced.B.norm(dim=0), balanced.A.norm(dim=1))
    torch.testing.assert_close(left.B.norm(dim=0), balanced.B.norm(dim=0).square())


def test_weights_may_be_uniform():
    uploads = [upload(client(i, 7, 3**i), random_factors(OUT, 3, IN, i)) for i in range(3)]
    got = FlexLoRA(weights="uniform").aggregate(start(7), uploads).adapters["global"][M]
    assert (
        relative_error(product(got), weighted_sum([(1 / 3, u.adapter[M]) for u in uploads])) < 1e-12
    )


def test_single_precision_is_that_and_not_less():
    uploads = [upload(client(i, 7, 5 + i), random_factors(OUT, 3, IN, i)) for i in range(2)]
    exact = weighted_sum([(u.examples / 11, u.adapter[M]) for u in uploads])
    got = FlexLoRA(precision="float32").aggregate(start(7), uploads).adapters["global"][M]
    assert 1e-9 < relative_error(product(got), exact) < 1e-5


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16])
def test_what_the_wire_rounds_is_not_rounded_again_by_the_server(first):
    """The aggregate is stored in float32 whatever number format the uploads came in."""
    uploads = [
        upload(client(0, 7, 5), random_factors(OUT, 3, IN, 0).to(first)),
        upload(client(1, 7, 6), random_factors(OUT, 3, IN, 1).to(torch.float32)),
    ]
    exact = weighted_sum([(u.examples / 11, u.adapter[M]) for u in uploads])
    got = FlexLoRA().aggregate(start(7), uploads).adapters["global"][M]
    assert relative_error(product(got), exact) < 1e-5


def test_more_rank_than_the_aggregate_has_is_fresh_and_trainable():
    method = FlexLoRA()
    uploads = [upload(client(0, 2, 5), random_factors(OUT, 2, IN, 1))]
    state = method.aggregate(start(5), uploads)
    assert state.adapters["global"].ranks == {M: 2}
    handed = [method.handout(state, client(i, r, 1), draw).adapter[M] for i, r in ((1, 4), (2, 5))]
    for factors, rank in zip(handed, (4, 5), strict=True):
        assert factors.rank == rank
        assert relative_error(product(factors), product(uploads[0].adapter[M])) < 1e-12
        assert not factors.B[:, 2:].any()
        assert factors.A[2:].any(1).all()
    assert torch.equal(handed[0].A, handed[1].A[:4])


def test_the_aggregate_replaces_the_last_one():
    method = FlexLoRA()
    uploads = [upload(client(0, 3, 5), random_factors(OUT, 3, IN, 1))]
    one, other = (method.aggregate(start_, uploads) for start_ in (start(3), start(5)))
    assert relative_error(product(method.update(one)[M]), product(method.update(other)[M])) < 1e-12


def test_the_server_keeps_the_largest_rank_and_forgets_none(tmp_path):
    state = start(5)
    for seed in range(3):
        uploads = [upload(client(0, 2, 5), random_factors(OUT, 2, IN, seed))]
        state = FlexLoRA().aggregate(state, uploads)
    wide = [upload(client(i, 5, 5), random_factors(OUT, 5, IN, i)) for i in range(2)]
    assert FlexLoRA().aggregate(state, wide).adapters["global"].ranks == {M: 5}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("split", "centre"),
        ("weights", "exmples"),
        ("precision", "float16"),
        ("precision", "load"),
        ("split", 3),
    ],
)
def test_values_that_no_option_has_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        methods.make("flexlora", {option: value})


def test_infinite_factors_are_refused():
    bad = random_factors(OUT, 2, IN)
    bad.B[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        FlexLoRA().aggregate(start(2), [upload(client(0, 2, 1), bad)])


class Lazy(Mapping):
    """An adapter's modules that count how many of them are held at once."""

    def __init__(self, modules):
        self.modules, self.read = modules, []

    def __getitem__(self, module):
        self.read.append(module)
        return self.modules[module]

    def __iter__(self):
        return iter(self.modules)

    def __len__(self):
        return len(self.modules)


SHAPES = {"model.q": (211, 307), "model.k": (13, 17), "model.v": (307, 211)}


def federation_of(clients: int) -> tuple[State, list[Upload]]:
    """Three modules, two of them large enough for the bounded route, of decaying spectrum."""
    scale = torch.arange(1, 30, dtype=torch.float64) ** -1.0

    def modules(seed):
        drawn = {m: random_factors(out, 29, in_, seed) for m, (out, in_) in SHAPES.items()}
        return {m: Factors(f.B * scale, f.A) for m, f in drawn.items()}

    uploads = [Upload(f"c{i}", 1, Adapter(Lazy(modules(i))), 13 + i) for i in range(clients)]
    first = {m: random_factors(out, 5, in_, 99) for m, (out, in_) in SHAPES.items()}
    return FlexLoRA().start(Adapter(first)), uploads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_modules_side_by_side_give_what_one_by_one_gives(threads):
    """The same bytes, in the state's order; every factor is read once; threads are put back."""
    state, uploads = federation_of(5)
    want = FlexLoRA().aggregate(state, uploads)
    before = torch.get_num_threads()
    for upload in uploads:
        upload.adapter.modules.read.clear()
    try:
        torch.set_num_threads(threads)
        got = FlexLoRA().aggregate(state, uploads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert list(got.adapters["global"]) == list(SHAPES)
    assert got.facts == want.facts
    for module in SHAPES:
        one, other = (s.adapters["global"][module] for s in (want, got))
        assert torch.equal(one.B, other.B) and torch.equal(one.A, other.A)
    assert all(sorted(u.adapter.modules.read) == sorted(SHAPES) for u in uploads)


def test_how_each_module_was_decomposed_is_recorded(monkeypatch):
    monkeypatch.setattr("flexlora.lowrank.decomposition.RISK", 0.0)
    state, uploads = federation_of(5)
    bounded, exact = (
        FlexLoRA(accuracy=accuracy).aggregate(state, uploads) for accuracy in ("bounded", "exact")
    )
    how = bounded.facts["decomposition"]
    assert [how[m]["route"] for m in SHAPES] == ["krylov", "dense", "krylov"]
    assert 0 < how["model.q"]["excess"] <= 1e-3 and how["model.k"]["excess"] == 0
    assert all(h["route"] in ("qr", "dense") for h in exact.facts["decomposition"].values())
    weights = np.array([u.examples for u in uploads]) / sum(u.examples for u in uploads)
    for m in SHAPES:
        want = weighted_sum(list(zip(weights, [u.adapter[m] for u in uploads], strict=True)))
        optimum = relative_error(best(want, 5), want)
        for state, limit in ((bounded, how[m]["excess"] + 1e-9), (exact, 1e-9)):
            got = relative_error(product(state.adapters["global"][m]), want)
            assert optimum * (1 - 1e-9) <= got <= optimum * (1 + limit)
        assert bounded.facts["lost_energy"][m] == pytest.approx(optimum**2, rel=0.1)
    assert json.loads(json.dumps(bounded.facts, allow_nan=False))["decomposition"] == how


def test_a_refused_bound_is_recorded(monkeypatch):
    monkeypatch.setattr("flexlora.lowrank.decomposition.RISK", 0.0)
    flat = Factors(torch.eye(211, 113).double(), torch.eye(113, 307).double())
    method = FlexLoRA()
    state = method.start(Adapter({M: random_factors(211, 5, 307)}))
    how = method.aggregate(state, [Upload("c0", 1, Adapter({M: flat}), 7)]).facts["decomposition"]
    assert how[M]["route"] == "qr" and how[M]["excess"] == 0
    assert how[M]["refused"] is None or how[M]["refused"] > 1e-3


def test_many_clients_end_in_one_dense_sum():
    state, uploads = federation_of(11)
    module = "model.k"
    weights = [u.examples / sum(v.examples for v in uploads) for u in uploads]
    want = weighted_sum(list(zip(weights, [u.adapter[module] for u in uploads], strict=True)))
    got = FlexLoRA().aggregate(state, uploads)
    assert got.facts["decomposition"][module]["route"] == "dense"
    assert relative_error(product(got.adapters["global"][module]), best(want, 5)) < 1e-9
