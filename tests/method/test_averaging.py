"""What several methods do with uploads, against dense float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from flexlora.laws.dense import best, product, relative_error, weighted_sum
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import averaging
from flexlora.method.averaging import WeightedCohort, limited_weights, most_of
from flexlora.method.interface import Upload
from flexlora.method.merge_log import MergeLog
from flexlora.method.truncation import Truncation, total
from support.factors import random_factors

SHARES = [13 / 59, 17 / 59, 29 / 59]


def test_means_of_factors_miss_the_mean_of_products_by_the_covariance():
    terms = [(p, random_factors(seed=i)) for i, p in enumerate(SHARES)]
    averaged = averaging.factor_means(terms)
    covariance = sum(w * (f.B - averaged.B) @ (f.A - averaged.A) for w, f in terms)
    assert torch.allclose(weighted_sum(terms) - product(averaged), covariance, atol=1e-12)
    assert float(covariance.abs().max()) > 0.1


def test_means_by_component_are_over_holders_and_keep_the_rest():
    sent = [random_factors(rank=r, seed=r) for r in (2, 3, 5)]
    uploads = [Upload(f"c{n}", 1, Adapter({"q": f}), 13) for n, f in enumerate(sent)]
    last = random_factors(rank=6, seed=9)
    got = WeightedCohort(tuple(uploads), tuple(SHARES)).factors_by_component("q", last)
    assert got.rank == 6
    share = SHARES[1] / (SHARES[1] + SHARES[2])
    want = share * sent[1].B[:, 2] + (1 - share) * sent[2].B[:, 2]
    assert torch.allclose(got.B[:, 2], want)
    assert torch.equal(got.A[3], sent[2].A[3])
    assert torch.equal(got.B[:, 5], last.B[:, 5]) and torch.equal(got.A[5], last.A[5])


@pytest.mark.parametrize("rank", [0, 3])
def test_the_best_of_sums_by_module(rank):
    terms = [(p, random_factors(seed=i)) for i, p in enumerate(SHARES)]
    start = Adapter({"q": random_factors(rank=1).to(torch.float32)})
    truncated = Truncation().best(lambda module: terms, start, {"q": rank})
    got = truncated.adapter
    assert got["q"].rank == rank and got["q"].B.dtype == torch.float32
    if rank:
        assert relative_error(product(got["q"]), best(weighted_sum(terms), rank)) < 1e-6
        S = torch.linalg.svdvals(weighted_sum(terms)).square()
        assert truncated.lost_energy["q"] == pytest.approx(float(S[rank:].sum() / S.sum()))


def test_the_log_remembers_who_has_merged_what():
    entries = [Adapter({"q": random_factors(seed=i)}) for i in range(3)]
    log = MergeLog()
    for number, (client, entry) in enumerate(zip(("anna", "bo", "anna"), entries, strict=True), 1):
        log = log.after(number, [client], entry)
    assert list(log.updates) == [1, 2, 3]
    # anna sent hers in round 3, so she had merged the entries of rounds 1 and 2.
    assert list(log.pending("anna")) == [3] and log.merged("anna") == [1, 2]
    assert list(log.pending("bo")) == [2, 3] and log.merged("bo") == [1]
    start = {"q": Factors(torch.zeros(11, 0), torch.zeros(0, 7))}
    whole = total(log.updates.values(), start)
    want = sum(product(entry["q"]) for entry in entries)
    assert relative_error(product(whole["q"]), want) < 1e-6


@pytest.mark.parametrize(
    ("weights", "most", "want"),
    [
        ((1.0, 2.0, 3.0), 0.2, (1.0, 2.0, 3.0)),
        ((1.0, 1.0, 1e9), 0.2, (1.0, 1.0, 2.0)),
        ((1.0, 1e9), 0.2, (1.0, 3.0)),
        ((5.0,), 0.2, (5.0,)),
        ((0.0, 7.0, 0.0), 0.2, (0.0, 7.0, 0.0)),
        ((1.0,) * 8 + (1e6, 1e9), 0.2, (1.0,) * 8 + (8 / 3, 8 / 3)),
        ((1.0, 1.0, 1e9), 1.0, (1.0, 1.0, 1e9)),
        ((), 0.2, ()),
    ],
)
def test_no_weight_is_above_the_largest_share(weights, most, want):
    limited = limited_weights(weights, most)
    assert limited == pytest.approx(want)
    assert limited_weights(limited, most) == limited
    if weights and any(weights):
        bound = most_of(sum(weight > 0 for weight in weights), most)
        assert max(limited) <= bound * sum(limited) * (1 + 1e-9)
    kept = [(a, b) for a, b in zip(weights, limited, strict=True) if b != a]
    assert all(b < a for a, b in kept)


@pytest.mark.parametrize("seed", range(20))
def test_limited_weights_keep_their_order_and_the_small_ones(seed):
    draw = np.random.default_rng(seed)
    weights = tuple((10 ** draw.uniform(-3, 6, size=int(draw.integers(2, 40)))).tolist())
    limited = limited_weights(weights, 0.2)
    most = most_of(len(weights), 0.2)
    assert max(limited) <= most * math.fsum(limited) * (1 + 1e-9)
    order = sorted(range(len(weights)), key=lambda n: weights[n])
    assert all(limited[a] <= limited[b] for a, b in itertools.pairwise(order))
    below = [n for n in order if weights[n] < max(limited)]
    assert all(limited[n] == weights[n] for n in below)
