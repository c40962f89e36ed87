import math

import numpy as np
import pytest
import torch

from flexlora.laws.dense import product
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.routes import probe

OUT, IN, TERMS = 163, 211, 131
INDEX = np.arange(1, TERMS + 1)
SPECTRA = {
    "flat": np.ones(TERMS),
    "slow": INDEX**-0.5,
    "fast": INDEX**-2.0,
    "step": np.where(INDEX <= 7, 1.0, 0.05),
    "alone": (INDEX == TERMS) * 1.0,
    "zero": np.zeros(TERMS),
}


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    draws = np.random.default_rng(seed).normal(size=(rows, columns))
    return torch.linalg.qr(torch.tensor(draws))[0]


@pytest.mark.parametrize("name", SPECTRA)
def test_the_probe_bounds_what_the_basis_misses(name):
    S = torch.from_numpy(SPECTRA[name])
    factors = Factors(orthonormal(OUT, TERMS, 1) * S, orthonormal(IN, TERMS, 2).T)
    Q = orthonormal(OUT, 37, 3)
    rest = product(factors) - Q @ (Q.T @ product(factors))
    want, trace = torch.linalg.matrix_norm(rest, 2) ** 2, rest.square().sum()
    for target in (0.0, 1e9 * float(want)):
        norm, estimate = probe.probe(factors, Q, target, torch.Generator().manual_seed(4))
        assert norm >= float(want)
        assert estimate == pytest.approx(float(trace), rel=0.5)


def test_the_overshoot_is_the_root_of_its_equation():
    for degree in range(5):
        eta = probe._overshoot(1250.0, degree)
        chebyshev = math.cosh(degree * math.acosh(1 + 2 * eta))
        assert eta * chebyshev**2 == pytest.approx(1250.0)


def test_the_ratio_fails_as_rarely_as_it_says():
    """With a large failure probability, counted over many draws."""
    draws = np.random.default_rng(5)
    ratios = draws.chisquare(OUT - 1, 100_000) / draws.chisquare(probe.PROBES, 100_000)
    assert float((ratios > probe._ratio(OUT)).mean()) == 0
    assert probe._ratio(OUT) < 100 * float(np.median(ratios))
