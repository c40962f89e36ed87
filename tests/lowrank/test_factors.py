import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.laws.dense import product
from flexlora.lowrank.factors import Adapter, Factors
from support.factors import random_factors


def test_shape_and_rank():
    factors = random_factors(11, 3, 7)
    assert factors.shape == (11, 7)
    assert factors.rank == 3


@pytest.mark.parametrize(
    ("B", "A", "message"),
    [
        (torch.zeros(11), torch.zeros(3, 7), "two matrices"),
        (torch.zeros(11, 3), torch.zeros(2, 3, 7), r"two matrices.*\(2, 3, 7\)"),
        (torch.zeros(11, 3), torch.zeros(5, 7), "ranks, 3 and 5, differ"),
        (torch.zeros(11, 3), torch.zeros(3, 7).double(), "float32 and A is torch.float64"),
    ],
)
def test_what_is_no_pair_of_factors_is_refused(B, A, message):
    with pytest.raises(ValueError, match=message):
        Factors(B, A)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 9))
def test_first_padded_and_widened_keep_what_they_say(size, more, seed):
    factors = random_factors(11, 5, 7, seed)
    first = factors.first(size)
    assert first.rank == size
    assert torch.equal(first.B, factors.B[:, :size])
    assert torch.equal(first.A, factors.A[:size])
    for wider in (factors.padded(5 + more), factors.widened(5 + more, np.random.default_rng(2))):
        assert wider.rank == 5 + more
        assert torch.equal(product(wider), product(factors))
        assert torch.equal(wider.B[:, 5:], torch.zeros(11, more, dtype=torch.float64))
    assert not factors.padded(5 + more).A[5:].any()


def test_widened_terms_are_trainable_within_lora_s_bound_and_nested():
    factors = random_factors(11, 2, 7, dtype=torch.float32)
    six = factors.widened(6, np.random.default_rng(3))
    four = factors.widened(4, np.random.default_rng(3))
    assert torch.equal(six.A[:4], four.A)
    new = six.A[2:]
    assert six.A.dtype == torch.float32
    assert float(new.abs().max()) <= 7**-0.5
    assert float(new.abs().max()) > 0.7 * 7**-0.5
    assert bool((new != 0).any(1).all())


def test_widened_from_nothing_is_a_fresh_start():
    empty = Factors(torch.zeros(11, 0), torch.zeros(0, 7))
    fresh = empty.widened(3, np.random.default_rng(0))
    assert fresh.shape == (11, 7)
    assert not fresh.B.any()
    assert fresh.A.any(1).all()


@pytest.mark.parametrize("rank", [-1, 4])
def test_more_terms_than_there_are_is_refused(rank):
    with pytest.raises(ValueError, match=f"Cannot take {rank} terms of factors of rank 3"):
        random_factors(11, 3, 7).first(rank)


@pytest.mark.parametrize("widen", [lambda f: f.padded(2), lambda f: f.widened(2, None)])
def test_padding_never_cuts(widen):
    with pytest.raises(ValueError, match="Cannot pad factors of rank 3 to rank 2"):
        widen(random_factors(11, 3, 7))


def test_an_adapter_is_a_mapping_in_its_order():
    modules = {"b.up": random_factors(13, 2, 5), "a.q": random_factors(11, 3, 7)}
    adapter = Adapter(modules)
    assert list(adapter) == ["b.up", "a.q"]
    assert adapter["a.q"] is modules["a.q"]
    assert adapter.ranks == {"b.up": 2, "a.q": 3}
    assert adapter.parameters == 2 * (13 + 5) + 3 * (11 + 7)
    assert len(adapter) == 2
    assert {f.B.dtype for f in adapter.to(torch.float32).values()} == {torch.float32}


def test_first_of_an_adapter_takes_at_most_what_is_there():
    adapter = Adapter({"b.up": random_factors(13, 2, 5), "a.q": random_factors(11, 3, 7)})
    assert adapter.first({"b.up": 9, "a.q": 1}).ranks == {"b.up": 2, "a.q": 1}
