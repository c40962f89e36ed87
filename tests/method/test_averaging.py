"""What several methods do with uploads, against dense float64."""

import pytest
import torch

from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import averaging
from flexlora.method.interface import Client, State, Upload
from support.factors import random_factors
from support.oracle import best, product, relative_error, weighted_sum

SHARES = [13 / 59, 17 / 59, 29 / 59]


def test_means_of_factors_miss_the_mean_of_products_by_the_covariance():
    terms = [(p, random_factors(seed=i)) for i, p in enumerate(SHARES)]
    averaged = averaging.factor_means(terms)
    covariance = sum(w * (f.B - averaged.B) @ (f.A - averaged.A) for w, f in terms)
    assert torch.allclose(weighted_sum(terms) - product(averaged), covariance, atol=1e-12)
    assert float(covariance.abs().max()) > 0.1


def test_rank_wise_means_are_over_holders_and_keep_the_rest():
    held = [(p, random_factors(rank=r, seed=r)) for p, r in zip(SHARES, (2, 3, 5), strict=True)]
    last = random_factors(rank=6, seed=9)
    got = averaging.rank_wise_means(held, last)
    assert got.rank == 6
    share = SHARES[1] / (SHARES[1] + SHARES[2])
    want = share * held[1][1].B[:, 2] + (1 - share) * held[2][1].B[:, 2]
    assert torch.allclose(got.B[:, 2], want)
    assert torch.equal(got.A[3], held[2][1].A[3])
    assert torch.equal(got.B[:, 5], last.B[:, 5]) and torch.equal(got.A[5], last.A[5])


@pytest.mark.parametrize("rank", [0, 3])
def test_the_best_of_sums_by_module(rank):
    terms = [(p, random_factors(seed=i)) for i, p in enumerate(SHARES)]
    known = Adapter({"q": random_factors(rank=1).to(torch.float32)})
    got, facts = averaging.Decomposing().best(lambda module: terms, known, {"q": rank})
    assert got["q"].rank == rank and got["q"].B.dtype == torch.float32
    if rank:
        assert relative_error(product(got["q"]), best(weighted_sum(terms), rank)) < 1e-6
        S = torch.linalg.svdvals(weighted_sum(terms)).square()
        assert facts["lost_energy"]["q"] == pytest.approx(float(S[rank:].sum() / S.sum()))


def test_the_log_remembers_who_has_merged_what():
    entries = [Adapter({"q": random_factors(seed=i)}) for i in range(3)]
    anna, bo = (Client(name, {"q": 2}, "small", 13) for name in ("anna", "bo"))
    state = State({"global": Adapter({})})
    for number, (client, entry) in enumerate(zip((anna, bo, anna), entries, strict=True), 1):
        upload = Upload(client.id, number, entry, 13)
        state = averaging.logged(state, entry, [upload], {"global": Adapter({})})
    assert list(averaging.log(state)) == [1, 2, 3]
    # anna sent hers in round 3, so she had merged the entries of rounds 1 and 2.
    assert list(averaging.unmerged(state, anna)) == [3]
    assert list(averaging.unmerged(state, bo)) == [2, 3]
    whole = averaging.summed(state, {"q": Factors(torch.zeros(11, 0), torch.zeros(0, 7))})
    want = sum(product(entry["q"]) for entry in entries)
    assert relative_error(product(whole["q"]), want) < 1e-6
