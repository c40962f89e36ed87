"""How far factors are from others, in products and in parameters, also where terms cancel."""

import math

import pytest
import torch

from flexlora.lowrank import Factors, Way, between, parameter_change, product_change

OUT, IN = 13, 11


def drawn(rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(OUT, rank, generator=draw, dtype=torch.float64)
    A = torch.randn(rank, IN, generator=draw, dtype=torch.float64)
    return Factors(B.to(dtype), A.to(dtype))


def dense(f: Factors) -> torch.Tensor:
    return f.B.double() @ f.A.double()


@pytest.mark.parametrize(("rank", "other"), [(3, 5), (5, 3), (4, 0)])
def test_changes_are_those_of_the_dense_matrices(rank, other):
    f, start = drawn(rank, 1), drawn(other, 2)
    want = float((dense(f) - dense(start)).norm())
    assert product_change(f, start).norm == pytest.approx(want, rel=1e-12)
    assert product_change(f).norm == pytest.approx(float(dense(f).norm()), rel=1e-12)
    most = max(rank, other)
    p, q = f.padded(most), start.padded(most)
    want = math.sqrt(float((p.B - q.B).square().sum() + (p.A - q.A).square().sum()))
    assert parameter_change(f, start) == pytest.approx(want, rel=1e-12)


def test_a_small_change_of_a_large_product_keeps_its_digits():
    start = drawn(4, 1)
    f = Factors(start.B + 1e-7 * drawn(4, 2).B, start.A)
    want = 1e-7 * float((drawn(4, 2).B @ start.A).norm())
    assert product_change(f, start).norm == pytest.approx(want, rel=1e-7)
    assert product_change(start, start).norm == 0


@pytest.mark.parametrize("size", [1e3, 1e6, 1e8])
def test_hostile_terms_that_cancel_are_seen(size):
    """The Gram matrices of float32 would read nothing at all."""
    rest, huge = drawn(2, 1), drawn(2, 2)
    f = Factors(
        torch.cat([rest.B, size * huge.B, -size * huge.B], 1), torch.cat([rest.A, huge.A, huge.A])
    )
    found = product_change(f)
    assert found.norm == pytest.approx(float(dense(rest).norm()), rel=1e-6)
    assert found.cancels > size / 10


def test_a_change_of_nothing_is_zero():
    nothing = Factors(torch.zeros(OUT, 3), torch.zeros(3, IN))
    assert product_change(nothing).norm == 0 and product_change(nothing).cancels == 1
    assert product_change(nothing, nothing).norm == parameter_change(nothing, nothing) == 0
    assert product_change(Factors(torch.zeros(OUT, 0), torch.zeros(0, IN))).norm == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 5), (5, 2), (3, None)])
def test_the_way_has_the_norms_of_its_points(share, ranks):
    rank, other = ranks
    f, start = drawn(rank, 1), None if other is None else drawn(other, 2)
    point = between(f, start, share, only_B=True)
    assert point.rank == max(rank, other or 0)
    want = product_change(point, start).norm
    scale = product_change(f, start).norm
    assert Way.of(f, start).norm(share) == pytest.approx(want, rel=1e-10, abs=1e-12 * scale)


def test_the_ends_of_the_way_are_the_factors():
    f, start = drawn(3, 1), drawn(3, 2)
    assert product_change(between(f, start, 1.0), f).norm < 1e-12
    assert product_change(between(f, start, 0.0), start).norm == 0
