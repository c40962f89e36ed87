import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.errors import AdapterError
from flexlora.laws.dense import best, product, relative_error, weighted_sum
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.sums import Accumulator, LowRankSum, norm, normalized
from flexlora.lowrank.svd import SVD
from support.factors import random_factors

settings.register_profile("flexlora", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("flexlora")


@st.composite
def sums(draw, least_terms=1):
    """Weighted sums whose summed rank lies on either side of min(out, in)."""
    out, in_ = draw(st.sampled_from([(11, 7), (7, 11), (29, 23), (5, 17), (2, 3), (1, 4)]))
    ranks = draw(st.lists(st.integers(1, 9), min_size=least_terms, max_size=4))
    weights = draw(st.lists(st.floats(0.05, 7), min_size=len(ranks), max_size=len(ranks)))
    seed = draw(st.integers(0, 2**32 - 1))
    terms = [random_factors(out, r, in_, seed + i) for i, r in enumerate(ranks)]
    return LowRankSum.of(zip(weights, terms, strict=True))


@given(sums())
def test_stack_is_the_weighted_sum_of_products(total):
    assert relative_error(product(total.stacked()), weighted_sum(total.terms)) < 1e-13


@given(sums(), st.integers(1, 12))
def test_truncation_is_eckart_young_optimal(total, rank):
    want = best(weighted_sum(total.terms), rank)
    got = product(total.svd(rank).factors(rank))
    assert float((got - want).abs().max()) < 1e-9 * float(want.abs().max())


@given(sums())
def test_singular_values_are_those_of_the_dense_matrix(total):
    dense = torch.linalg.svdvals(weighted_sum(total.terms))
    S = total.svd().S
    assert torch.allclose(S, dense[: len(S)], atol=1e-12 * float(dense[0]))
    assert float(dense[len(S) :].abs().sum()) < 1e-9 * float(dense[0])


@given(sums(), st.sampled_from(["left", "balanced"]))
def test_both_splits_give_the_same_product(total, split):
    factors = total.svd().factors(99, split)
    assert relative_error(product(factors), weighted_sum(total.terms)) < 1e-12
    if split == "left":
        gram = factors.A @ factors.A.T
        assert torch.allclose(gram, torch.eye(factors.rank, dtype=gram.dtype), atol=1e-10)


@given(sums())
def test_the_norm_is_that_of_the_dense_matrix(total):
    dense = weighted_sum(total.terms)
    assert total.norm() == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-12)


@given(sums(least_terms=2), st.randoms(use_true_random=False))
def test_order_of_terms_is_irrelevant(total, random):
    shuffled = list(total.terms)
    random.shuffle(shuffled)
    got = product(LowRankSum.of(shuffled).svd().factors(5))
    assert relative_error(got, product(total.svd().factors(5))) < 1e-9


@given(sums(), st.floats(-3, 3).filter(lambda x: abs(x) > 0.01))
def test_the_norm_is_homogeneous_and_a_sum_minus_itself_is_zero(total, factor):
    scaled = LowRankSum.of((factor * weight, f) for weight, f in total.terms)
    assert scaled.norm() == pytest.approx(abs(factor) * total.norm(), rel=1e-12)
    difference = LowRankSum.of([*total.terms, *((-weight, f) for weight, f in total.terms)])
    assert difference.norm() < 1e-12 * total.norm()


@given(sums(), st.integers(1, 10), st.floats(0.1, 1.0))
def test_energy_is_the_share_of_the_squared_norm(total, rank, share):
    svd = total.svd()
    dense = weighted_sum(total.terms)
    lost = relative_error(best(dense, rank), dense) ** 2
    assert svd.energy(rank) == pytest.approx(1 - lost, abs=1e-10)
    needed = svd.rank_for(share)
    assert svd.energy(needed) >= share - 1e-12
    assert needed == 1 or svd.energy(needed - 1) < share


@given(sums(), st.integers(0, 5))
def test_gauge_does_not_matter(total, seed):
    """(B R, R^-1 A) is the same update, so it must give the same truncation."""

    def turned(f):
        R = torch.linalg.qr(random_factors(f.rank, f.rank, f.rank, seed).B)[0] + 0
        return Factors(3 * f.B @ R, R.T @ f.A / 3)

    other = LowRankSum.of((w, turned(f)) for w, f in total.terms)
    assert relative_error(product(other.svd().factors(2)), product(total.svd().factors(2))) < 1e-8


def test_norm_survives_cancelling_terms():
    """Two large rank-one parts that cancel: the Gram route in float32 reads zero here."""
    small = random_factors(11, 1, 7, seed=3)
    u, v = torch.ones(11, 1).double() * 1e8, torch.ones(1, 7).double()
    hostile = Factors(torch.cat([u, -u, small.B], 1), torch.cat([v, v, small.A], 0))
    assert norm(hostile) == pytest.approx(norm(small), rel=1e-6)


def test_float32_reaches_the_optimum_to_1e_5():
    terms = [(0.3, random_factors(61, 8, 53, 4)), (0.7, random_factors(61, 13, 53, 5))]
    dense = weighted_sum(terms)
    f32 = [(w, f.to(torch.float32)) for w, f in terms]
    got = product(LowRankSum.of(f32).svd(6, dtype=torch.float32).factors(6))
    lost, optimum = relative_error(got, dense), relative_error(best(dense, 6), dense)
    assert lost == pytest.approx(optimum, rel=1e-5)


def test_dense_matrix_is_never_made(monkeypatch):
    """With a summed rank below min(out, in) no tensor of out x in elements appears."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else [result]:
                if isinstance(item, torch.Tensor):
                    sizes.append(item.numel())
            return result

    total = LowRankSum.of(
        [(0.4, random_factors(211, 5, 307, 1)), (0.6, random_factors(211, 3, 307, 2))]
    )
    with Watch():
        total.svd(4).factors(4)
        total.norm()
    assert sizes and max(sizes) <= 16 * 307


def test_zero_sum_truncates_to_zero():
    zero = Factors(torch.zeros(11, 3), torch.ones(3, 7))
    svd = LowRankSum.of([(1.0, zero)]).svd(2)
    assert svd.energy(1) == 1.0 and svd.rank_for(0.5) == 1
    assert float(product(svd.factors(2)).abs().max()) == 0


def test_signs_are_fixed():
    f = random_factors(seed=8)
    svd, flipped = (LowRankSum.of([(w, f)]).svd() for w in (1.0, -1.0))
    for s in (svd, flipped):
        peaks = s.Vt.gather(1, s.Vt.abs().argmax(1, keepdim=True))
        assert bool((peaks > 0).all())
    assert torch.allclose(svd.Vt, flipped.Vt) and torch.allclose(svd.U, -flipped.U)


def test_refusals():
    with pytest.raises(ValueError, match="at least one term"):
        LowRankSum.of([])
    with pytest.raises(ValueError, match="different shapes"):
        LowRankSum.of([(1.0, random_factors(11, 2, 7)), (1.0, random_factors(7, 2, 11))])
    with pytest.raises(ValueError, match=r"energy share is 1.5; give a number in \(0, 1\]"):
        SVD(torch.eye(2), torch.ones(2), torch.eye(2)).rank_for(1.5)
    broken = Factors(torch.full((11, 2), torch.nan), torch.ones(2, 7))
    with pytest.raises(ValueError, match="NaN"):
        LowRankSum.of([(1.0, broken)]).svd()


@st.composite
def many_terms(draw):
    """The terms of one sum; some sums become dense, some do not."""
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    return [(0.1 + 0.3 * i, random_factors(29, r, 23, i)) for i, r in enumerate(ranks)]


def accumulated(terms, shape=(29, 23), dtype=torch.float64):
    total = Accumulator(shape, dtype)
    for weight, factors in terms:
        total.absorb(weight, factors)
    return total


def as_dense(matrix):
    return product(matrix) if isinstance(matrix, Factors) else matrix


@given(many_terms())
def test_accumulated_is_the_weighted_sum(terms):
    assert relative_error(as_dense(accumulated(terms).finalize()), weighted_sum(terms)) < 1e-13


def test_a_sum_becomes_dense_where_that_is_smaller_and_not_before(monkeypatch):
    monkeypatch.setattr("flexlora.lowrank.sums.BATCH_RANK", 4)
    terms = [(0.5, random_factors(29, 3, 23, i)) for i in range(7)]
    few, many = accumulated(terms[:4]), accumulated(terms[:5])
    assert few.finalize().rank == 12
    assert isinstance(many.finalize(), torch.Tensor)
    many.absorb(*terms[5])
    many.absorb(*terms[6])
    assert relative_error(many.finalize(), weighted_sum(terms)) < 1e-13


def test_a_dense_sum_forgets_its_terms():
    """What waits is bounded by the size of the matrix, whatever the number of terms."""
    total = Accumulator((29, 23), torch.float32)
    for i in range(300):
        total.absorb(1 / 300, random_factors(29, 5, 23, i % 7, torch.float32))
        assert total._waiting_rank * (29 + 23) < 29 * 23
    assert total.finalize().dtype == torch.float32


def test_the_same_terms_give_the_same_bytes():
    terms = [(0.5 + i, random_factors(29, 3, 23, i, torch.bfloat16)) for i in range(11)]
    one, other = (accumulated(terms, dtype=torch.float32).finalize() for _ in range(2))
    assert torch.equal(one, other)


def test_accumulators_refuse_what_does_not_fit():
    total = Accumulator((29, 23))
    with pytest.raises(ValueError, match="at least one term"):
        total.finalize()
    with pytest.raises(ValueError, match=r"shape \(11, 7\)"):
        total.absorb(1.0, random_factors(11, 2, 7))


@pytest.mark.parametrize("weights", [(1e308, 1e308), (math.inf, 1.0), (math.nan, 1.0), (2.0, -1.0)])
def test_weights_without_a_sum_are_refused(weights):
    with pytest.raises(AdapterError, match="finite sum"):
        normalized(weights)


def test_weights_of_zero_are_equal():
    assert normalized((0.0, 0.0)) == [0.5, 0.5] and normalized((3.0, 1.0)) == [0.75, 0.25]
