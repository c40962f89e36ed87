"""An averager of one's own: the means over a cohort with other weights, under unchanged methods."""

import math
import statistics
from dataclasses import dataclass, replace

import pytest
import torch

from flexlora import methods
from flexlora.errors import ConfigError
from flexlora.laws.dense import best, product, relative_error
from flexlora.laws.rounds import (
    SHAPES,
    client_turn,
    clients_of,
    context_of,
    first_state,
    noise,
)
from flexlora.lowrank import Adapter, Factors, norm
from flexlora.method import Averager, Feature, Mean, WeightedCohort, require_means
from flexlora.method.averagers.plain import Plain

READS = {
    "products": Mean.PRODUCTS,
    "product_terms": Mean.PRODUCTS,
    "products_by_component": Mean.PRODUCTS_BY_COMPONENT,
    "factors": Mean.FACTORS,
    "padded_factors": Mean.PADDED_FACTORS,
    "factors_by_component": Mean.FACTORS_BY_COMPONENT,
    "numbered_components": Mean.NUMBERED_COMPONENTS,
    "numbered_changes": Mean.NUMBERED_CHANGES,
    "aux_factors": Mean.AUX_FACTORS,
    "uploads": Mean.UPLOADS,
}
"""The mean that each attribute of a cohort is."""


def sent_norm(adapter: Adapter) -> float:
    """The norm of an upload: that of its products, or of its numbers where one factor travels."""
    squares = [
        norm(f) ** 2 if min(f.shape) else float(f.B.square().sum() + f.A.square().sum())
        for f in adapter.values()
        if f.rank
    ]
    return math.sqrt(sum(squares))


@dataclass(frozen=True)
class MedianNorm(Averager):
    """Norm clipping: an upload larger than the median counts in inverse proportion."""

    title = "norm clipping at the median"
    offers = frozenset(Mean) - {Mean.UPLOADS}

    def cohort(self, uploads, weights, context):
        norms = [sent_norm(upload.adapter) for upload in uploads]
        median = statistics.median(norms)
        clipped = [min(1.0, median / each) if each else 1.0 for each in norms]
        return WeightedCohort(
            tuple(uploads),
            tuple(u.examples * share for u, share in zip(uploads, clipped, strict=True)),
        )


class Watched:
    """A cohort that notes which means are read."""

    def __init__(self, cohort, read):
        self._cohort, self._read = cohort, read

    def __getattr__(self, name):
        if name in READS:
            self._read.add(READS[name])
        return getattr(self._cohort, name)


CLIPPING = MedianNorm()
OFFERED = [name for name in methods.shipped() if methods.make(name).needs <= CLIPPING.offers]


def turns_of(method, state, clients, number, private=None):
    """A round in which the clients learn more the later they stand in the cohort."""
    context = context_of(number, clients)
    return [
        client_turn(
            method,
            state,
            client,
            context,
            noise(method, number, size=0.5 + place),
            (private or {}).get(client.id),
        )
        for place, client in enumerate(clients)
    ]


def after(method, averager, state, uploads, context):
    return method.aggregate(state, averager.cohort(uploads, method.weights, context), context)


def third_round(method):
    """Clients, the state after two rounds under clipping, and the third round's uploads."""
    clients = clients_of(method)
    state = first_state(method, clients)
    for number in (1, 2):
        uploads = [turn.upload for turn in turns_of(method, state, clients, number)]
        state = after(method, CLIPPING, state, uploads, context_of(number, clients))
    uploads = [turn.upload for turn in turns_of(method, state, clients, 3)]
    return context_of(3, clients), state, uploads


def clipped_shares(uploads):
    """The clients' shares by dense products, and that they are not those of the examples."""
    norms = [
        math.sqrt(sum(float(product(f).square().sum()) for f in u.adapter.values()))
        for u in uploads
    ]
    median = sorted(norms)[1]
    weights = [
        u.examples * (median / n if n > median else 1) for u, n in zip(uploads, norms, strict=True)
    ]
    assert max(norms) > 1.2 * median
    return [weight / sum(weights) for weight in weights]


def test_the_methods_that_it_serves():
    assert set(methods.shipped()) - set(OFFERED) == {"florana"}


@pytest.mark.parametrize("name", OFFERED)
def test_a_method_runs_under_it_and_reads_the_means_that_it_needs(name):
    method = methods.make(name)
    require_means(CLIPPING, method)
    clients = clients_of(method)
    state, read, private = first_state(method, clients), set(), {}
    for number in (1, 2, 3, 4):
        context = context_of(number, clients)
        turns = turns_of(method, state, clients, number, private)
        private = {turn.client.id: turn.private for turn in turns}
        cohort = CLIPPING.cohort([turn.upload for turn in turns], method.weights, context)
        before, state = state, method.aggregate(state, Watched(cohort, read), context)
        update = method.global_adapter(state, context)
        assert all(bool(f.B.isfinite().all() and f.A.isfinite().all()) for f in update.values())
        if Feature.PERSONAL not in method.features:
            last = method.global_adapter(before, context_of(number - 1, clients))
            for module, shape in SHAPES.items():
                assert update[module].shape == shape
                assert relative_error(product(update[module]), product(last[module])) > 1e-3
    assert read and read <= method.needs


def test_flexlora_under_it_is_the_best_rank_of_the_clipped_mean_of_products():
    method = methods.make("flexlora", {"accuracy": "exact"})
    context, state, uploads = third_round(method)
    shares = clipped_shares(uploads)
    model = after(method, CLIPPING, state, uploads, context).model
    for module in SHAPES:
        mean = sum(p * product(u.adapter[module]) for p, u in zip(shares, uploads, strict=True))
        assert relative_error(product(model[module]), best(mean, context.ranks[module])) < 1e-9


def test_fedit_under_it_is_the_clipped_mean_of_each_factor():
    method = methods.make("fedit")
    context, state, uploads = third_round(method)
    shares = clipped_shares(uploads)
    model = after(method, CLIPPING, state, uploads, context).model
    for module in SHAPES:
        for name in ("B", "A"):
            factors = [getattr(u.adapter[module], name).double() for u in uploads]
            mean = sum(p * x for p, x in zip(shares, factors, strict=True))
            assert relative_error(getattr(model[module], name), mean) < 1e-12


def test_replication_under_it_is_the_clipped_mean_over_those_that_have_a_component():
    method = methods.make("replication")
    context, state, uploads = third_round(method)
    shares = clipped_shares(uploads)
    model = after(method, CLIPPING, state, uploads, context).model
    for module in SHAPES:
        for component in range(context.ranks[module]):
            trainers = [
                (p, u.adapter[module])
                for p, u in zip(shares, uploads, strict=True)
                if u.adapter[module].rank > component
            ]
            total = sum(p for p, _ in trainers)
            B = sum(p / total * f.B[:, component].double() for p, f in trainers)
            A = sum(p / total * f.A[component].double() for p, f in trainers)
            torch.testing.assert_close(model[module].B[:, component], B, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(model[module].A[component], A, rtol=1e-12, atol=1e-12)


def test_a_method_that_reads_single_uploads_is_refused():
    florana = methods.make("florana")
    with pytest.raises(ConfigError, match=r"'norm clipping at the median'.*single uploads.*FLoRA"):
        require_means(CLIPPING, florana)
    require_means(Plain(), florana)


@pytest.mark.parametrize("name", ["flexlora", "fedit", "replication", "ffalora", "raflora"])
def test_an_upload_a_thousand_times_too_large_does_no_harm_under_it(name):
    """The smallest client's, all of whose components others have too."""
    method = methods.make(name)
    context, state, honest = third_round(method)
    large = {m: Factors(1000 * f.B, f.A) for m, f in honest[0].adapter.items()}
    poisoned = [replace(honest[0], adapter=Adapter(large)), *honest[1:]]

    def size(averager, uploads):
        new = after(method, averager, state, uploads, context)
        return sent_norm(method.global_adapter(new, context))

    assert 1 / 3 < size(CLIPPING, poisoned) / size(CLIPPING, honest) < 3
    assert size(Plain(), poisoned) / size(Plain(), honest) > 10
