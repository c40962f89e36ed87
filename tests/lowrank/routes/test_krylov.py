import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.laws.dense import product
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.routes import krylov

settings.register_profile("krylov", deadline=None, max_examples=25, derandomize=True)

OUT, IN, TERMS = 163, 211, 131


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    draws = np.random.default_rng(seed).normal(size=(rows, columns))
    return torch.linalg.qr(torch.tensor(draws))[0]


def with_spectrum(S, seed=0, dtype=torch.float64) -> Factors:
    """Factors of the shape (OUT, IN) whose product has these singular values, well mixed."""
    S = torch.as_tensor(S, dtype=torch.float64)
    turn = orthonormal(len(S), len(S), seed + 2)
    B = (orthonormal(OUT, len(S), seed) * S) @ turn
    return Factors(B, turn.T @ orthonormal(IN, len(S), seed + 1).T).to(dtype)


INDEX = np.arange(1, TERMS + 1)
SPECTRA = {
    "flat": np.ones(TERMS),
    "slow": INDEX**-0.5,
    "fast": INDEX**-2.0,
    "exponential": 0.8**INDEX,
    "steep": 0.1**INDEX,
    "step": np.where(INDEX <= 7, 1.0, 0.05),
    "repeated": 2.0 ** -((INDEX - 1) // 40),
    "pairs": 1.5 ** -((INDEX - 1) // 2),
    "no gap at the rank": np.where(INDEX <= 60, 1.0, 0.01),
    "rank one": (INDEX == 1) * 1.0,
    "rank-deficient": (INDEX <= 11) * 0.7**INDEX,
    "zero": np.zeros(TERMS),
    "tiny": 1e-30 * INDEX**-1.0,
    "noise below signal": np.where(INDEX <= 5, 3.0, 0.1 * (1 - INDEX / 200)),
}


def true_excess(matrix, svd, rank: int) -> float:
    """The error at a rank over the optimum's, minus 1; by a dense SVD in float64."""
    dense = product(matrix) if isinstance(matrix, Factors) else matrix.double()
    got = product(svd.factors(rank))
    optimum = float(torch.linalg.svdvals(dense)[rank:].square().sum().sqrt())
    error = float(torch.linalg.matrix_norm(dense - got))
    return error / optimum - 1 if optimum > 0 else math.inf if error > 0 else 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [2, 5, 29])
def test_the_error_never_exceeds_its_bound(name, rank, dtype):
    for seed in range(2):
        matrix = with_spectrum(SPECTRA[name], 7 * seed, dtype)
        svd = krylov.svd(matrix, rank, 1e-3)
        assert svd.pairs == rank and svd.excess >= 0
        if math.isfinite(svd.excess):
            for cut in {1, rank // 2 + 1, rank}:
                assert true_excess(matrix, svd, cut) <= svd.excess * (1 + 1e-6) + 1e-12


@settings(settings.get_profile("krylov"))
@given(st.data())
def test_the_error_never_exceeds_its_bound_on_drawn_spectra(data):
    steps = data.draw(st.lists(st.floats(0.2, 1), min_size=8, max_size=8))
    S = np.repeat(np.cumprod(steps), -(-TERMS // 8))[:TERMS]
    S *= np.linspace(1, data.draw(st.floats(0.5, 1)), TERMS)
    rank, seed = data.draw(st.integers(1, 23)), data.draw(st.integers(0, 999))
    matrix = with_spectrum(S, seed)
    svd = krylov.svd(matrix, rank, data.draw(st.sampled_from([1e-3, 1e-6])))
    assert math.isinf(svd.excess) or true_excess(matrix, svd, rank) <= svd.excess + 1e-12


@pytest.mark.parametrize(
    "name", ["slow", "fast", "exponential", "step", "pairs", "noise below signal"]
)
def test_a_spectrum_that_decays_is_shown_to_be_near_the_optimum(name):
    assert krylov.svd(with_spectrum(SPECTRA[name]), 5, 1e-3).excess <= 1e-3


@pytest.mark.parametrize("name", ["flat", "no gap at the rank", "rank one", "zero"])
def test_what_cannot_be_shown_is_not_claimed(name):
    assert krylov.svd(with_spectrum(SPECTRA[name]), 5, 1e-3).excess > 1e-3


def test_terms_that_cancel_widen_the_bound():
    """In float32 the small rest of two large terms is rounding, and the bound must say so."""
    small = with_spectrum(SPECTRA["exponential"])
    u, v = orthonormal(OUT, 3, 5) * 1e5, orthonormal(IN, 3, 6).T * 1e5
    hostile = Factors(torch.cat([u, -u, small.B], 1), torch.cat([v, v, small.A], 0))
    assert krylov.svd(hostile.to(torch.float32), 5, 1e-3).excess > 1
    assert krylov.svd(small.to(torch.float32), 5, 1e-3).excess <= 1e-3


@pytest.mark.parametrize("name", ["slow", "exponential"])
def test_a_dense_matrix_and_a_tall_one_have_the_same_law(name):
    factors = with_spectrum(SPECTRA[name])
    dense = product(factors)
    tall = Factors(factors.A.T, factors.B.T)
    for matrix in (dense, dense.T, tall):
        svd = krylov.svd(matrix, 5, 1e-3)
        assert true_excess(matrix, svd, 5) <= svd.excess <= 1e-3
        torch.testing.assert_close(svd.U.T @ svd.U, torch.eye(5).double())
        torch.testing.assert_close(svd.Vt @ svd.Vt.T, torch.eye(5).double())
        assert bool((svd.Vt.gather(1, svd.Vt.abs().argmax(1, keepdim=True)) > 0).all())


def test_equal_input_gives_equal_bytes_whatever_the_global_generator():
    matrix = with_spectrum(SPECTRA["slow"], dtype=torch.float32)
    torch.manual_seed(1)
    one = krylov.svd(matrix, 5, 1e-3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = krylov.svd(matrix, 5, 1e-3)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("U", "S", "Vt"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("guess", ["good", "zero", "wrong", "narrow"])
def test_a_start_changes_nothing_beyond_the_bound(guess):
    matrix = with_spectrum(SPECTRA["slow"])
    good = krylov.svd(matrix, 5, 1e-3).factors(5)
    start = {
        "good": good,
        "zero": Factors(torch.zeros_like(good.B), good.A),
        "wrong": Factors(orthonormal(OUT, 5, 77), orthonormal(IN, 5, 78).T),
        "narrow": good.first(1),
    }[guess]
    svd = krylov.svd(matrix, 5, 1e-3, start.to(torch.float32))
    assert true_excess(matrix, svd, 5) <= svd.excess <= 1e-3


def test_the_energy_beyond_the_basis_is_estimated():
    factors = with_spectrum(SPECTRA["slow"])
    svd = krylov.svd(factors, 5, 1e-3)
    want = float((SPECTRA["slow"] ** 2)[:5].sum() / (SPECTRA["slow"] ** 2).sum())
    assert svd.energy(5) == pytest.approx(want, rel=0.05)
    with pytest.raises(ValueError, match="accuracy='exact'"):
        svd.rank_for(1.0)
    assert svd.rank_for(want / 2) < 5
