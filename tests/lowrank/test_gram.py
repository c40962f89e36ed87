"""Inner products from factors against dense matrices, also where terms cancel."""

import os
import subprocess
import sys

import pytest
import torch

from flexlora.errors import AdapterError
from flexlora.laws.dense import product
from flexlora.lowrank import (
    Factors,
    cosines,
    norms,
    parameter_gram,
    product_gram,
    squared_distances,
)
from support.factors import random_factors

OUT, IN = 23, 17
RANKS = (1, 2, 3, 5, 7, 11, 19, 29)
"""The last two exceed one size and both."""


def cohort(dtype=torch.float64):
    return [random_factors(OUT, rank, IN, seed, dtype) for seed, rank in enumerate(RANKS)]


def dense_gram(factors):
    flat = torch.stack([product(f).flatten() for f in factors])
    return flat @ flat.T


def error(gram, dense):
    """The largest error relative to the two norms."""
    sizes = dense.diagonal().sqrt()
    return float(((gram - dense).abs() / (sizes * sizes[:, None])).max())


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_inner_products_are_those_of_the_dense_matrices(shape):
    factors = [random_factors(shape[0], r, shape[1], r, torch.float64) for r in RANKS]
    gram = product_gram(factors)
    assert torch.equal(gram, gram.T)
    assert error(gram, dense_gram(factors)) < 1e-13


def test_norms_cosines_and_distances_are_the_dense_ones():
    factors = cohort()
    gram, dense = product_gram(factors), torch.stack([product(f).flatten() for f in factors])
    torch.testing.assert_close(norms(gram), dense.norm(dim=1), rtol=1e-10, atol=0)
    unit = dense / dense.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines(gram), unit @ unit.T, rtol=0, atol=1e-10)
    apart = (dense[:, None] - dense).square().sum(-1)
    torch.testing.assert_close(squared_distances(gram), apart, rtol=1e-10, atol=0)


def test_the_scale_may_lie_in_either_factor_and_span_many_orders():
    factors = [
        Factors(f.B * 10.0 ** (4 * n - 16), f.A * 10.0 ** (12 - 3 * n))
        for n, f in enumerate(cohort())
    ]
    assert error(product_gram(factors), dense_gram(factors)) < 1e-12


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_terms_that_cancel_leave_the_digits_that_double_precision_has(ratio):
    """Two terms ``ratio`` times as large as their sum; a plain sum would square the ratio."""
    small, large = (random_factors(OUT, 2, IN, seed, torch.float64) for seed in (1, 2))
    other = random_factors(OUT, 3, IN, 4, torch.float64)
    hostile = Factors(
        torch.cat([ratio * large.B, -ratio * large.B, small.B], 1),
        torch.cat([large.A, large.A, small.A]),
    )
    gram = product_gram([hostile, other])
    assert error(gram, dense_gram([small, other])) < 1e-14 * ratio


def test_single_precision_uploads_are_multiplied_in_double_precision():
    factors = cohort(torch.float32)
    exact = [Factors(f.B.double(), f.A.double()) for f in factors]
    assert error(product_gram(factors), dense_gram(exact)) < 1e-13


def test_empty_and_zero_products_have_no_norm_and_no_direction():
    empty = Factors(torch.zeros(OUT, 0), torch.zeros(0, IN))
    zero = Factors(torch.zeros(OUT, 4), torch.ones(4, IN))
    gram = product_gram([empty, zero, random_factors(OUT, 3, IN, 0)])
    assert (gram[:2] == 0).all() and gram[2, 2] > 0
    assert (cosines(gram)[:2] == 0).all()


def test_factors_of_different_shapes_and_none_at_all_are_refused():
    with pytest.raises(AdapterError, match="one shape"):
        product_gram([random_factors(OUT, 2, IN, 0), random_factors(IN, 2, OUT, 0)])
    with pytest.raises(AdapterError, match="one shape"):
        product_gram([])


def test_parameters_are_compared_at_the_places_of_their_components():
    ids = [[0, 2, 5], [2], [], [5, 0, 1, 4]]
    factors = [random_factors(OUT, len(each), IN, n) for n, each in enumerate(ids)]
    vectors = []
    for f, numbers in zip(factors, ids, strict=True):
        B, A = torch.zeros(OUT, 6, dtype=torch.float64), torch.zeros(6, IN, dtype=torch.float64)
        B[:, numbers], A[numbers] = f.B.double(), f.A.double()
        vectors.append(torch.cat([B.flatten(), A.flatten()]))
    dense = torch.stack(vectors)
    torch.testing.assert_close(parameter_gram(factors, ids), dense @ dense.T, rtol=1e-12, atol=1e-9)


def test_a_factor_that_does_not_travel_counts_for_nothing():
    factors = [random_factors(OUT, 3, IN, n) for n in range(3)]
    only = [f.restricted("B") for f in factors]
    flat = torch.stack([f.B.double().flatten() for f in factors])
    gram = parameter_gram(only, [range(3)] * 3)
    torch.testing.assert_close(gram, flat @ flat.T, rtol=1e-12, atol=1e-9)


MEASURED = """
import resource, time, torch
from flexlora.lowrank import Factors, product_gram
torch.set_num_threads(1)
ranks = [4 + 8 * (n % 3) for n in range(50)]
ranks[-1] += 600 - sum(ranks)
draw = torch.Generator().manual_seed(0)
factors = [
    Factors(torch.randn(4096, r, generator=draw), torch.randn(r, 4096, generator=draw))
    for r in ranks
]
product_gram(factors[:2])
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
product_gram(factors)
seconds = time.process_time() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_cohort_of_fifty_needs_neither_the_dense_matrices_nor_a_second():
    """Row B7 of docs/trust.md: 50 clients of summed rank 600, 4096 x 4096, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, mebibytes = map(float, done.stdout.split())
    assert mebibytes < 200
    assert seconds < 1
