import pytest
import torch

from flexlora.laws.dense import best, product, relative_error
from flexlora.lowrank import decomposition
from flexlora.lowrank.decomposition import decompose
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.routes import dense, krylov, qr
from support.factors import random_factors


def shaped(out: int, rank: int, in_: int) -> Factors:
    """Factors that have a shape and no numbers."""
    return Factors(torch.empty(out, rank, device="meta"), torch.empty(rank, in_, device="meta"))


def decaying(out=211, terms=137, in_=307) -> Factors:
    factors = random_factors(out, terms, in_)
    scale = torch.arange(1, terms + 1, dtype=torch.float64) ** -1.0
    return Factors(factors.B * scale, factors.A)


@pytest.mark.parametrize("rank", [0, 3, 7, 99, None])
@pytest.mark.parametrize("terms", [5, 7, 13])
def test_qr_and_dense_agree_with_the_oracle(rank, terms):
    factors = random_factors(11, terms, 7)
    limit = 7 if rank is None else min(rank, 7)
    for svd in (decompose(factors, rank), decompose(product(factors), rank)):
        assert svd.excess == 0 and svd.refused is None and svd.beyond == 0
        assert relative_error(product(svd.factors(7)), best(product(factors), limit)) < 1e-12
        assert svd.route == ("qr" if terms < 7 and svd.pairs <= terms else "dense") or terms < 7
    if terms < 7:
        assert decompose(factors).route == "qr"
    assert decompose(product(factors)).route == "dense"


def test_what_is_cheapest():
    """At a 7B model's shapes; ``price`` counts matrix-product flops."""
    few, many, most = (shaped(4096, s, 11008) for s in (640, 1340, 4000))
    assert krylov.cost(few, 8) < qr.cost(few, 8) < dense.cost(few, 8)
    assert krylov.cost(many, 200) < qr.cost(many, 200) < dense.cost(many, 200)
    assert dense.cost(shaped(576, 575, 577), 200) < qr.cost(shaped(576, 575, 577), 200)
    assert krylov.cost(most, 200) < dense.cost(most, 200)
    # Too small, or all of it wanted: there is nothing to save.
    assert krylov.cost(shaped(111, 53, 127), 8) == float("inf")
    assert krylov.cost(many, 1340) == float("inf")
    assert krylov.cost(few, 0) == float("inf")


def test_bounded_takes_krylov_where_it_pays_and_exact_never(monkeypatch):
    monkeypatch.setattr(decomposition, "RISK", 0.0)
    factors = decaying()
    bounded, exact = (decompose(factors, 5, accuracy) for accuracy in ("bounded", "exact"))
    assert bounded.route == "krylov" and 0 < bounded.excess <= decomposition.TOLERANCE
    assert exact.route == "qr" and exact.excess == 0 and exact.refused is None
    assert relative_error(product(bounded.factors(5)), product(exact.factors(5))) < 0.05


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_a_bound_that_is_not_met_gives_way_to_the_exact_route(monkeypatch, form):
    monkeypatch.setattr(decomposition, "RISK", 0.0)
    flat = Factors(torch.eye(211, 137).double(), torch.eye(137, 307).double())
    matrix = flat if form == "factors" else product(flat)
    svd = decompose(matrix, 5, "bounded")
    assert svd.route == ("qr" if form == "factors" else "dense")
    assert svd.excess == 0 and svd.refused > decomposition.TOLERANCE
    assert relative_error(product(svd.factors(5)), product(flat)) == pytest.approx(
        (132 / 137) ** 0.5
    )


def test_small_matrices_are_exact_even_if_a_bound_would_do():
    assert decompose(random_factors(11, 5, 7), 3, "bounded").route == "qr"


def test_infinity_is_refused_and_huge_numbers_are_not():
    factors = random_factors(11, 5, 7, dtype=torch.float32)
    huge = Factors(factors.B * 1e30, factors.A * 1e-30)
    assert relative_error(product(decompose(huge).factors(5)), product(factors)) < 1e-5
    factors.B[3, 1] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        decompose(factors)
