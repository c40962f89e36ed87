"""How far products are from others, in every precision, also where terms cancel or underflow."""

import math

import numpy as np
import pytest
import torch

from flexlora.lowrank import Factors, distance, parameter_change, product_change
from flexlora.lowrank.distance import ERROR

OUT, IN = 61, 47
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def drawn(rank: int, seed: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    B = size * torch.randn(OUT, rank, generator=draw, dtype=torch.float64)
    A = torch.randn(rank, IN, generator=draw, dtype=torch.float64)
    return Factors(B.to(dtype), A.to(dtype))


def exact(f: Factors, start: Factors | None = None) -> float:
    """The norm from dense matrices, in long doubles where the machine has them."""
    B, A = (x.double().numpy().astype(np.longdouble) for x in (f.B, f.A))
    W = B @ A
    if start is not None:
        B, A = (x.double().numpy().astype(np.longdouble) for x in (start.B, start.A))
        W = W - B @ A
    return float(np.sqrt((W**2).sum()))


def moved(start: Factors, size: float, seed: int) -> Factors:
    """The start after small steps of all its numbers."""
    step = drawn(start.rank, seed)
    return Factors(start.B + (size * step.B).to(start.B), start.A + (size * step.A).to(start.A))


def cancelling(size: float, dtype: torch.dtype = torch.float32) -> Factors:
    """Factors of rank 5 of which two components are ``size`` times as large and cancel."""
    rest, huge = drawn(3, 1), drawn(1, 2)
    B = torch.cat([rest.B, size * huge.B, -size * huge.B], 1)
    return Factors(B.to(dtype), torch.cat([rest.A, huge.A, huge.A]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "other"), [(7, 11), (11, 7), (5, 0), (0, 5), (53, 13), (6, None)])
def test_the_change_is_that_of_the_dense_matrices(rank, other, dtype):
    f = drawn(rank, 1, dtype=dtype)
    start = None if other is None else drawn(other, 2, dtype=dtype)
    found = product_change(f, start)
    assert found.norm == pytest.approx(exact(f, start), rel=ERROR)
    assert found.parameters == pytest.approx(parameter_change(f, start), rel=ERROR)
    if rank:
        sizes = float(f.B.double().norm() * f.A.double().norm())
        assert found.cancels == pytest.approx(sizes / exact(f), rel=ERROR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5])
def test_small_steps_keep_their_digits(step, dtype):
    start = drawn(9, 1, dtype=dtype)
    f = moved(start, step, 2)
    found = product_change(f, start)
    assert found.norm == pytest.approx(exact(f, start), rel=ERROR)
    assert found.parameters == pytest.approx(parameter_change(f, start), rel=ERROR)


def test_float32_suffices_for_what_clients_send(monkeypatch):
    """Else the cost would be a different one: neither float64 nor QR is used."""
    start = drawn(9, 1)
    wanted = [exact(moved(start, 1e-3, 2), start), exact(start), exact(drawn(4, 3), start)]
    monkeypatch.setattr(distance, "_PRECISIONS", (torch.float32,))
    monkeypatch.setattr(distance.LowRankSum, "norm", None)
    for f, base, want in (
        (moved(start, 1e-3, 2), start, wanted[0]),
        (start, None, wanted[1]),
        (drawn(4, 3), start, wanted[2]),
    ):
        assert product_change(f, base).norm == pytest.approx(want, rel=1e-5)


def test_what_has_not_moved_has_moved_by_zero():
    start = drawn(9, 1)
    assert product_change(start, start).norm == product_change(start, start).parameters == 0
    assert product_change(start, start).cancels == pytest.approx(
        product_change(start).cancels, rel=ERROR
    )
    again = drawn(9, 1).components([8, 0, 3, 1, 2, 7, 6, 5, 4])
    assert product_change(again, start).norm == 0, "the same components in another order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 1e3, 1e5, 1e7])
def test_terms_that_cancel_neither_hide_a_change_nor_make_one(size, dtype):
    f, start = cancelling(size, dtype), drawn(4, 3, dtype=dtype)
    assert product_change(f).norm == pytest.approx(exact(f), rel=ERROR)
    assert product_change(f, start).norm == pytest.approx(exact(f, start), rel=ERROR)
    found = product_change(f).cancels
    assert found == pytest.approx(float(f.B.norm() * f.A.norm()) / exact(f), rel=ERROR)
    assert product_change(f, start).cancels == pytest.approx(found, rel=ERROR)
    # Against a start with the same large terms in other places.
    moved_start = f.components([3, 4, 0, 1, 2])
    other = Factors(f.B + 0.01 * drawn(5, 4, dtype=dtype).B, f.A)
    assert product_change(other, moved_start).norm == pytest.approx(
        exact(other, moved_start), rel=ERROR
    )


def test_an_upload_that_gives_its_start_up_is_measured_by_itself():
    """``dB`` is then as large as the start, and what is left of both tells nothing."""
    start = drawn(9, 1, size=1e4)
    left = drawn(9, 2, size=1e-5)
    found = product_change(left, start)
    assert found.norm == pytest.approx(exact(left, start), rel=ERROR)
    sizes = float(left.B.double().norm() * left.A.double().norm())
    assert found.cancels == pytest.approx(sizes / exact(left), rel=ERROR)


@pytest.mark.parametrize("left", [1e25, 1e18, 1e6, 1e-12, 1e-30])
@pytest.mark.parametrize("right", [1e20, 1.0, 1e-6, 1e-25])
def test_no_size_is_lost_in_squares(left, right):
    """1e25 squared is infinite in float32, and 1e-30 squared nothing."""
    f = drawn(4, 1)
    f = Factors(f.B * left, f.A * right)
    start = Factors(drawn(3, 2).B * left, drawn(3, 2).A * right)
    for base in (None, start):
        found = product_change(f, base)
        assert found.norm == pytest.approx(exact(f, base), rel=ERROR)
        assert found.parameters == pytest.approx(parameter_change(f, base), rel=ERROR)
        assert found.cancels == pytest.approx(product_change(drawn(4, 1)).cancels, rel=1e-3)


@pytest.mark.parametrize("gauge", [1e10, 1e18, 1e25])
def test_a_component_with_all_its_size_in_one_factor_counts(gauge):
    """Beside ordinary ones: its square is nothing in one factor, and huge in the other."""
    plain, skewed = drawn(3, 1), drawn(1, 2)
    for scale in (gauge, 1 / gauge):
        f = Factors(
            torch.cat([plain.B, skewed.B * scale], 1), torch.cat([plain.A, skewed.A / scale])
        )
        for base in (None, drawn(4, 3), drawn(2, 5)):
            found = product_change(f, base)
            assert found.norm == pytest.approx(exact(f, base), rel=ERROR)
            assert found.parameters == pytest.approx(parameter_change(f, base), rel=ERROR)


def test_sums_of_many_rows_are_added_in_parts(monkeypatch):
    f, start = drawn(7, 1), drawn(5, 2)
    whole = product_change(f, start)
    monkeypatch.setattr(distance, "SUMMED_ROWS", 8)
    parts = product_change(f, start)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-6)
    assert parts.cancels == pytest.approx(whole.cancels, rel=1e-6)


def test_no_finite_norm_is_found_of_what_is_not_finite():
    for bad in (math.nan, math.inf):
        f = drawn(3, 1)
        f.B[4, 1] = bad
        assert not math.isfinite(product_change(f).norm)
        assert not math.isfinite(product_change(f, drawn(3, 2)).norm)


@pytest.mark.parametrize("excess", [1e-3, 1e-2, 1e-1])
def test_rounding_in_one_direction_does_not_hide_a_change(excess):
    """All numbers equal, so that every sum is rounded the same way, and half of them negative."""
    B = torch.full((509, 6), 0.1)
    signs = torch.tensor([1.0, -1.0 - excess] * 3)[:, None]
    f = Factors(B, 0.3 * signs.expand(6, 307).contiguous())
    assert product_change(f).norm == pytest.approx(exact(f), rel=2e-3)
