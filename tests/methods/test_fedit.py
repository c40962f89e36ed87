import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.laws.dense import product, relative_error, weighted_sum
from flexlora.laws.rounds import SEED, aggregated
from flexlora.lowrank import Adapter, Factors
from flexlora.method import RoundContext, Upload
from flexlora.methods.fedit import FedIT
from support.factors import random_factors

M = "model.q"
EXAMPLES = (13, 17, 29)
CONTEXT = RoundContext(1, SEED, {M: (11, 7)}, {M: 3})


def uploads(seed: int, rank: int = 3) -> list[Upload]:
    return [
        Upload(f"c{i}", 1, Adapter({M: random_factors(11, rank, 7, seed + i)}), n)
        for i, n in enumerate(EXAMPLES)
    ]


def aggregate(uploads: list[Upload]) -> Factors:
    state = FedIT().start(Adapter({M: random_factors(11, 3, 7, 99)}), CONTEXT)
    return aggregated(FedIT(), state, uploads, CONTEXT).model[M]


def test_the_factors_are_the_means_of_the_factors():
    found = uploads(1)
    got = aggregate(found)
    shares = [n / sum(EXAMPLES) for n in EXAMPLES]
    B = sum(p * u.adapter[M].B for p, u in zip(shares, found, strict=True))
    A = sum(p * u.adapter[M].A for p, u in zip(shares, found, strict=True))
    torch.testing.assert_close(got.B, B)
    torch.testing.assert_close(got.A, A)


@settings(deadline=None)
@given(st.integers(0, 99))
def test_what_it_misses_is_the_covariance_of_the_factors(seed):
    """sum p_k B_k A_k - B A = sum p_k (B_k - B)(A_k - A)."""
    found = uploads(seed)
    got = aggregate(found)
    shares = [n / sum(EXAMPLES) for n in EXAMPLES]
    exact = weighted_sum([(p, u.adapter[M]) for p, u in zip(shares, found, strict=True)])
    covariance = sum(
        p * (u.adapter[M].B - got.B) @ (u.adapter[M].A - got.A)
        for p, u in zip(shares, found, strict=True)
    )
    assert relative_error(exact - product(got), covariance) < 1e-9
    assert relative_error(product(got), exact) > 0.05


def test_clients_that_agree_on_one_factor_lose_nothing():
    """Then the covariance is zero."""
    shared = random_factors(11, 3, 7, 50).A
    found = [
        Upload(u.client, 1, Adapter({M: Factors(u.adapter[M].B, shared)}), u.examples)
        for u in uploads(1)
    ]
    exact = weighted_sum([(u.examples / sum(EXAMPLES), u.adapter[M]) for u in found])
    assert relative_error(product(aggregate(found)), exact) < 1e-12


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_what_the_wire_rounds_is_not_rounded_again_by_the_server(coarse):
    """The mean is stored in float32 whatever number format the uploads came in."""
    found = [Upload(u.client, 1, u.adapter.to(coarse), u.examples) for u in uploads(1)]
    B = sum(u.examples / sum(EXAMPLES) * u.adapter[M].B.double() for u in found)
    assert relative_error(aggregate(found).B, B) < 1e-6
