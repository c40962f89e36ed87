import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import methods
from flexlora.laws import rounds
from flexlora.laws.dense import best, product, relative_error, weighted_sum
from flexlora.laws.rounds import SEED
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, RoundContext, State, Upload
from flexlora.methods.flexlora import FlexLoRA
from support.factors import random_factors

M = "model.q"
OUT, IN = 11, 7


def context(rank: int, number: int = 1) -> RoundContext:
    """Round ``number`` among clients of which the largest has this rank."""
    return RoundContext(number, SEED, {M: (OUT, IN)}, {M: rank})


def aggregated(method: FlexLoRA, state: State, uploads: list[Upload], rank: int) -> State:
    return rounds.aggregated(method, state, uploads, context(rank))


def handed(state: State, client: Client) -> Factors:
    """What the client starts from in the second round."""
    return FlexLoRA().handout(state, client, context(7, 2)).adapter[M]


def client(number: int, rank: int, examples: int) -> Client:
    return Client(f"c{number}", {M: rank}, f"rank{rank}", examples)


def upload(client: Client, factors: Factors) -> Upload:
    return Upload(client.id, 1, Adapter({M: factors}), client.examples)


def start(rank: int) -> State:
    return FlexLoRA().start(Adapter({M: random_factors(OUT, rank, IN, 9)}), context(rank, 0))


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    draws = np.random.default_rng(seed).normal(size=(rows, columns))
    return torch.linalg.qr(torch.tensor(draws))[0]


@pytest.mark.parametrize("split", ["left", "balanced"])
def test_without_gradients_the_tail_decays_by_the_share_that_holds_it(split):
    """From unit singular values, the block of rank h has (N_h / N)^t after t rounds."""
    clients = [client(0, 2, 13), client(1, 3, 17), client(2, 5, 29)]
    whole, method = 59, FlexLoRA(split=split)
    first = Factors(orthonormal(OUT, 5, 1), orthonormal(IN, 5, 2).T)
    state = method.start(Adapter({M: first}), context(5, 0))
    for t in range(1, 5):
        uploads = [upload(c, handed(state, c)) for c in clients]
        state = aggregated(method, state, uploads, 5)
        S = torch.linalg.svdvals(product(method.global_adapter(state, context(5, t))[M]))[:5]
        want = [1, 1, (46 / whole) ** t, (29 / whole) ** t, (29 / whole) ** t]
        torch.testing.assert_close(S, torch.tensor(want, dtype=torch.float64))


def test_ranks_large_enough_lose_nothing_round_after_round():
    clients = [client(0, 6, 13), client(1, 6, 17)]
    method, state = FlexLoRA(), start(6)
    uploads = [upload(c, random_factors(OUT, 3, IN, i)) for i, c in enumerate(clients)]
    want = weighted_sum([(u.examples / 30, u.adapter[M]) for u in uploads])
    for _ in range(3):
        state = aggregated(method, state, uploads, 6)
        assert relative_error(product(state.model[M]), want) < 1e-12
        assert state.per_module["lost_energy"][M] == pytest.approx(0, abs=1e-12)
        uploads = [upload(c, handed(state, c)) for c in clients]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_the_error_of_a_handout_is_what_the_dropped_singular_values_say(rank, seed):
    uploads = [
        upload(client(i, 7, n), random_factors(OUT, r, IN, seed + i))
        for i, (r, n) in enumerate([(2, 13), (3, 17), (5, 29)])
    ]
    state = aggregated(FlexLoRA(), start(7), uploads, 7)
    exact = weighted_sum([(u.examples / 59, u.adapter[M]) for u in uploads])
    begun = product(handed(state, client(9, rank, 1)))
    dropped = torch.linalg.svdvals(exact)[rank:]
    error = float(torch.linalg.matrix_norm(begun - exact))
    assert error == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-9, abs=1e-9)
    assert relative_error(begun, best(exact, rank)) < 1e-9


def test_the_energy_lost_at_the_server_is_recorded():
    uploads = [upload(client(i, 4, 7), random_factors(OUT, 4, IN, i)) for i in range(2)]
    state = aggregated(FlexLoRA(), start(4), uploads, 4)
    S = torch.linalg.svdvals(weighted_sum([(0.5, u.adapter[M]) for u in uploads]))
    want = float(S[4:].square().sum() / S.square().sum())
    assert 0.001 < want < 0.5
    assert state.per_module["lost_energy"][M] == pytest.approx(want, rel=1e-9)
    assert state.model.ranks == {M: 4}


def test_both_splits_hold_the_same_update():
    uploads = [upload(client(i, 5, 7 + i), random_factors(OUT, 3, IN, i)) for i in range(2)]
    left, balanced = (
        aggregated(FlexLoRA(split=split), start(5), uploads, 5).model[M]
        for split in ("left", "balanced")
    )
    assert relative_error(product(left), product(balanced)) < 1e-12
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(left.A @ left.A.T, eye)
    torch.testing.assert_close(balanced.B.norm(dim=0), balanced.A.norm(dim=1))
    torch.testing.assert_close(left.B.norm(dim=0), balanced.B.norm(dim=0).square())


def test_weights_may_be_uniform():
    uploads = [upload(client(i, 7, 3**i), random_factors(OUT, 3, IN, i)) for i in range(3)]
    got = aggregated(FlexLoRA(weights="uniform"), start(7), uploads, 7).model[M]
    assert (
        relative_error(product(got), weighted_sum([(1 / 3, u.adapter[M]) for u in uploads])) < 1e-12
    )


def test_single_precision_is_that_and_not_less():
    uploads = [upload(client(i, 7, 5 + i), random_factors(OUT, 3, IN, i)) for i in range(2)]
    exact = weighted_sum([(u.examples / 11, u.adapter[M]) for u in uploads])
    got = aggregated(FlexLoRA(precision="float32"), start(7), uploads, 7).model[M]
    assert 1e-9 < relative_error(product(got), exact) < 1e-5


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16])
def test_what_the_wire_rounds_is_not_rounded_again_by_the_server(first):
    """The aggregate is stored in float32 whatever number format the uploads came in."""
    uploads = [
        upload(client(0, 7, 5), random_factors(OUT, 3, IN, 0).to(first)),
        upload(client(1, 7, 6), random_factors(OUT, 3, IN, 1).to(torch.float32)),
    ]
    exact = weighted_sum([(u.examples / 11, u.adapter[M]) for u in uploads])
    got = aggregated(FlexLoRA(), start(7), uploads, 7).model[M]
    assert relative_error(product(got), exact) < 1e-5


def test_more_rank_than_the_aggregate_has_is_fresh_and_trainable():
    uploads = [upload(client(0, 2, 5), random_factors(OUT, 2, IN, 1))]
    state = aggregated(FlexLoRA(), start(5), uploads, 5)
    assert state.model.ranks == {M: 2}
    starts = [handed(state, client(i, rank, 1)) for i, rank in ((1, 4), (2, 5))]
    for factors, rank in zip(starts, (4, 5), strict=True):
        assert factors.rank == rank
        assert relative_error(product(factors), product(uploads[0].adapter[M])) < 1e-12
        assert not factors.B[:, 2:].any()
        assert factors.A[2:].any(1).all()
    assert torch.equal(starts[0].A, starts[1].A[:4])


def test_the_aggregate_replaces_the_last_one():
    uploads = [upload(client(0, 3, 5), random_factors(OUT, 3, IN, 1))]
    one, other = (aggregated(FlexLoRA(), start(rank), uploads, rank).model[M] for rank in (3, 5))
    assert relative_error(product(one), product(other)) < 1e-12


def test_the_server_keeps_the_largest_rank_and_forgets_none():
    state = start(5)
    for seed in range(3):
        uploads = [upload(client(0, 2, 5), random_factors(OUT, 2, IN, seed))]
        state = aggregated(FlexLoRA(), state, uploads, 5)
        assert state.model.ranks == {M: 2}
    wide = [upload(client(i, 5, 5), random_factors(OUT, 5, IN, i)) for i in range(2)]
    assert aggregated(FlexLoRA(), state, wide, 5).model.ranks == {M: 5}


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
        aggregated(FlexLoRA(), start(2), [upload(client(0, 2, 1), bad)], 2)


class Lazy(Mapping):
    """An adapter's modules that note when one of them is read."""

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
CONTEXT = RoundContext(1, SEED, SHAPES, dict.fromkeys(SHAPES, 5))


def federation_of(clients: int) -> tuple[State, list[Upload]]:
    """Three modules, two of them large enough for the bounded route, of decaying spectrum."""
    scale = torch.arange(1, 30, dtype=torch.float64) ** -1.0

    def modules(seed):
        drawn = {m: random_factors(out, 29, in_, seed) for m, (out, in_) in SHAPES.items()}
        return {m: Factors(f.B * scale, f.A) for m, f in drawn.items()}

    uploads = [Upload(f"c{i}", 1, Adapter(Lazy(modules(i))), 13 + i) for i in range(clients)]
    first = {m: random_factors(out, 5, in_, 99) for m, (out, in_) in SHAPES.items()}
    return FlexLoRA().start(Adapter(first), CONTEXT), uploads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_modules_side_by_side_give_what_one_by_one_gives(threads):
    """The same bytes, in the state's order; every factor is read once; threads are put back."""
    state, uploads = federation_of(5)
    want = rounds.aggregated(FlexLoRA(), state, uploads, CONTEXT)
    before = torch.get_num_threads()
    for upload in uploads:
        upload.adapter.modules.read.clear()
    try:
        torch.set_num_threads(threads)
        got = rounds.aggregated(FlexLoRA(), state, uploads, CONTEXT)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert list(got.model) == list(SHAPES)
    assert got.per_module == want.per_module
    for module in SHAPES:
        one, other = (s.model[module] for s in (want, got))
        assert torch.equal(one.B, other.B) and torch.equal(one.A, other.A)
    assert all(sorted(u.adapter.modules.read) == sorted(SHAPES) for u in uploads)


def test_how_each_module_was_decomposed_is_recorded(monkeypatch):
    monkeypatch.setattr("flexlora.lowrank.decomposition.RISK", 0.0)
    state, uploads = federation_of(5)
    bounded, exact = (
        rounds.aggregated(FlexLoRA(accuracy=accuracy), state, uploads, CONTEXT)
        for accuracy in ("bounded", "exact")
    )
    routes = bounded.per_module["decomposition"]
    assert [routes[m]["route"] for m in SHAPES] == ["krylov", "dense", "krylov"]
    assert 0 < routes["model.q"]["excess"] <= 1e-3 and routes["model.k"]["excess"] == 0
    assert all(r["route"] in ("qr", "dense") for r in exact.per_module["decomposition"].values())
    weights = np.array([u.examples for u in uploads]) / sum(u.examples for u in uploads)
    for m in SHAPES:
        want = weighted_sum(list(zip(weights, [u.adapter[m] for u in uploads], strict=True)))
        optimum = relative_error(best(want, 5), want)
        for state, limit in ((bounded, routes[m]["excess"] + 1e-9), (exact, 1e-9)):
            got = relative_error(product(state.model[m]), want)
            assert optimum * (1 - 1e-9) <= got <= optimum * (1 + limit)
        assert bounded.per_module["lost_energy"][m] == pytest.approx(optimum**2, rel=0.1)
    assert json.loads(json.dumps(bounded.per_module, allow_nan=False))["decomposition"] == routes


def test_a_refused_bound_is_recorded(monkeypatch):
    monkeypatch.setattr("flexlora.lowrank.decomposition.RISK", 0.0)
    flat = Factors(torch.eye(211, 113).double(), torch.eye(113, 307).double())
    large = RoundContext(1, SEED, {M: (211, 307)}, {M: 5})
    state = FlexLoRA().start(Adapter({M: random_factors(211, 5, 307)}), large)
    uploads = [Upload("c0", 1, Adapter({M: flat}), 7)]
    after = rounds.aggregated(FlexLoRA(), state, uploads, large)
    route = after.per_module["decomposition"][M]
    assert route["route"] == "qr" and route["excess"] == 0
    assert route["refused"] is None or route["refused"] > 1e-3


def test_many_clients_end_in_one_dense_sum():
    state, uploads = federation_of(11)
    module = "model.k"
    weights = [u.examples / sum(v.examples for v in uploads) for u in uploads]
    want = weighted_sum(list(zip(weights, [u.adapter[module] for u in uploads], strict=True)))
    got = rounds.aggregated(FlexLoRA(), state, uploads, CONTEXT)
    assert got.per_module["decomposition"][module]["route"] == "dense"
    assert relative_error(product(got.model[module]), best(want, 5)) < 1e-9
