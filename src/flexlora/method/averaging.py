"""Weighted means over the uploads of a cohort: plain averaging, and what averagers build on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter, Factors, LowRankSum, norm, normalized
from flexlora.method.averager import Cohort, Weights
from flexlora.method.interface import Upload
from flexlora.method.truncation import Weighted


@dataclass(frozen=True)
class WeightedCohort(Cohort):
    """Uploads in memory or on the disk, each with its weight; offers every mean.

    ``members`` are in cohort order; ``raw_weights`` are not negative, and need not add up to 1.
    ``client_scores`` are what an averager gave the weights by; of clients left out too.
    ``most_share`` holds again for the trainers of some of the modules: see ``limited``.
    """

    members: tuple[Upload, ...]
    raw_weights: tuple[float, ...]
    client_scores: Mapping[str, float] = field(default_factory=dict)
    most_share: float = 1.0

    @property
    def weights(self) -> Mapping[str, float]:
        """Every client's weight, before they are divided by their sum."""
        ids = [upload.client for upload in self.members]
        return dict(zip(ids, self.raw_weights, strict=True))

    @property
    def scores(self) -> Mapping[str, float]:
        """What every client was judged by."""
        return self.client_scores

    @property
    def uploads(self) -> Sequence[Upload]:
        """The uploads themselves."""
        return self.members

    def ranks(self, module: str) -> dict[str, int]:
        """The rank of every client's upload of this module; reads no factor from the disk."""
        return {
            upload.client: upload.adapter.rank(module)
            for upload in self.members
            if module in upload.adapter
        }

    def weighted(self, module: str) -> Iterator[Weighted]:
        """Each client's share of the weights, with its factors of this module, one at a time."""
        shares = normalized(self.raw_weights)
        return ((p, u.adapter[module]) for p, u in zip(shares, self.members, strict=True))

    def products(self, module: str, rank: int | None = None) -> LowRankSum:
        """The mean of products, exact whatever the ``rank``: a term for each client."""
        return LowRankSum.of(self.weighted(module))

    def product_terms(self, module: str, rank: int | None = None) -> Iterator[Weighted]:
        """The terms of ``products``, each read when it is its turn."""
        return self.weighted(module)

    def products_by_component(self, module: str) -> LowRankSum:
        """The mean of products by component, exact: a term for each client."""
        shares = self._component_shares(module)
        return LowRankSum.of(
            (1.0, Factors(f.B.double() * share, f.A.double()))
            for share, (_, f) in zip(shares, self.weighted(module), strict=True)
        )

    def factors(self, module: str) -> Factors:
        """The mean of ``B`` and of ``A``; O(K rank (out + in)) for K uploads."""
        return factor_means(self.weighted(module))

    def padded_factors(self, module: str, last: Factors) -> Factors:
        """The mean of ``B`` and of ``A``, padded with zeros to the rank of ``last``."""
        B, A = _emptied(last, max(self.ranks(module).values()))
        for weight, f in self.weighted(module):
            B[:, : f.rank] += weight * f.B.double()
            A[: f.rank] += weight * f.A.double()
        return Factors(B, A)

    def factors_by_component(self, module: str, last: Factors) -> Factors:
        """The mean of each column of ``B`` and row of ``A`` over the clients that have it."""
        B, A = _emptied(last, max(self.ranks(module).values()))
        shares = self._component_shares(module)
        for share, (_, f) in zip(shares, self.weighted(module), strict=True):
            B[:, : f.rank] += f.B.double() * share
            A[: f.rank] += f.A.double() * share[:, None]
        return Factors(B, A)

    def numbered_components(self, module: str, last: Factors) -> Factors:
        """The mean of each numbered component over the clients that trained it."""
        B, A = last.B.double().clone(), last.A.double().clone()
        totals = B.new_zeros(last.rank)
        for weight, upload in zip(normalized(self.raw_weights), self.members, strict=True):
            totals[list(upload.component_ids[module])] += weight
        trained = totals > 0
        B[:, trained], A[trained] = 0, 0
        for weight, at, f in self._numbered(module):
            share = weight / totals[at]
            B[:, at] += f.B.double() * share
            A[at] += f.A.double() * share[:, None]
        return Factors(B, A)

    def numbered_changes(self, module: str, last: Factors, sketched: bool = False) -> Factors:
        """``last`` plus the mean change of each numbered component."""
        B, A = last.B.double().clone(), last.A.double().clone()
        for weight, at, change in self._numbered(module):
            if change.B.shape[0]:
                scale = change.rank / last.rank if sketched else 1.0
                B[:, at] += weight * change.B.double() * scale
            if change.A.shape[1]:
                A[at] += weight * change.A.double()
        return Factors(B, A)

    def aux_factors(self, name: str, module: str) -> Factors:
        """The mean of ``B`` and of ``A`` of the adapters of this name beside the uploads."""
        shares = normalized(self.raw_weights)
        return factor_means(
            (p, u.aux[name][module]) for p, u in zip(shares, self.members, strict=True)
        )

    def only(self, modules: Collection[str]) -> WeightedCohort | None:
        """The clients that train one of these modules, at the weights that they have."""
        wanted = set(modules)
        trainers = [
            (_part(upload, wanted), weight)
            for upload, weight in zip(self.members, self.raw_weights, strict=True)
            if not wanted.isdisjoint(upload.adapter)
        ]
        if not trainers:
            return None
        uploads, weights = zip(*trainers, strict=True)
        return WeightedCohort(uploads, weights).limited(self.most_share)

    def limited(self, most_share: float) -> WeightedCohort:
        """The same uploads with no client above this share of the weights."""
        weights = limited_weights(self.raw_weights, most_share)
        return replace(self, raw_weights=weights, most_share=most_share)

    def _component_shares(self, module: str) -> list[Tensor]:
        ranks = [upload.adapter.rank(module) for upload in self.members]
        return component_shares(normalized(self.raw_weights), ranks)

    def _numbered(self, module: str) -> Iterator[tuple[float, list[int], Factors]]:
        shares = normalized(self.raw_weights)
        return (
            (p, list(u.component_ids[module]), u.adapter[module])
            for p, u in zip(shares, self.members, strict=True)
        )


def reweighted(
    uploads: Sequence[Upload], weights: Sequence[float], scores: Sequence[float]
) -> WeightedCohort:
    """The cohort of the uploads whose weight is not zero; the ``scores`` are of all.

    Raises:
        ProtocolError: none is left, or a weight is not a number.
    """
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ProtocolError(
            "The averager gives no client of the round a weight; set averager.name to 'plain', or "
            "look at the clients' changes in the journal."
        )
    counted = [(u, float(w)) for u, w in zip(uploads, weights, strict=True) if w]
    members, raw_weights = zip(*counted, strict=True)
    judged = {u.client: float(score) for u, score in zip(uploads, scores, strict=True)}
    return WeightedCohort(members, raw_weights, judged)


def client_weights(uploads: Sequence[Upload], weights: Weights) -> tuple[float, ...]:
    """Every upload's weight, before they are divided by their sum.

    "norms" are Frobenius norms of whole updates, and read every tensor once.
    """
    if weights == "examples":
        return tuple(float(upload.examples) for upload in uploads)
    if weights == "uniform":
        return (1.0,) * len(uploads)
    return tuple(update_norm(upload.adapter) for upload in uploads)


def most_of(count: int, most_share: float) -> float:
    """The largest share of one of ``count`` clients: ``most_share``, or 1.5 times an equal one.

    A cohort of two or three could not keep to a fifth each.
    """
    return min(max(most_share, 1.5 / count), 1.0) if most_share < 1 else 1.0


def limited_weights(weights: Sequence[float], most_share: float) -> tuple[float, ...]:
    """The weights with the largest lowered until none is above its share of their sum.

    Lowering one raises the shares of the others, so that these may be lowered too. Weights that
    stay are the same to the bit, and limited ones are not limited again. A weight of zero does
    not count as a client.
    """
    positive = sorted((weight for weight in weights if weight > 0), reverse=True)
    most = most_of(len(positive), most_share) if positive else 1.0
    if most >= 1 or positive[0] <= most * (1 + 1e-9) * math.fsum(positive):
        return tuple(weights)
    for lowered in range(1, len(positive)):
        limit = most * math.fsum(positive[lowered:]) / (1 - most * lowered)
        if positive[lowered] <= limit:
            break
    return tuple(min(weight, limit) for weight in weights)


def update_norm(adapter: Adapter) -> float:
    """The Frobenius norm of the whole update, all modules together.

    Zero where only one factor travels, as there is no product: see ``parameter_norm``.
    """
    return math.sqrt(sum(norm(factors) ** 2 for factors in adapter.values()))


def parameter_norm(adapter: Adapter) -> float:
    """The norm of all parameters of ``B`` and ``A`` as one vector, whichever of them travel."""
    squares = [x.double().square().sum() for f in adapter.values() for x in (f.B, f.A)]
    return math.sqrt(sum(map(float, squares)))


def factor_means(weighted: Iterable[Weighted]) -> Factors:
    """The weighted sum of ``B`` and that of ``A``, in float64; all of one rank.

    Its product is *not* the weighted sum of the products; the difference is the covariance
    of the factors.
    """
    terms = iter(weighted)
    first = next(terms)
    B, A = (torch.zeros_like(x, dtype=torch.float64) for x in (first[1].B, first[1].A))
    for weight, f in chain([first], terms):
        B += weight * f.B.double()
        A += weight * f.A.double()
    return Factors(B, A)


def component_shares(weights: Sequence[float], ranks: Sequence[int]) -> list[Tensor]:
    """Each client's share in each of its components, among the clients that have it.

    ``p_kj = p_k / sum_{i: r_i > j} p_i`` for j < r_k (methods of raFLoRA, arXiv 2602.13486,
    and RB-LoRA alike).
    """
    totals = torch.zeros(max(ranks), dtype=torch.float64)
    for weight, rank in zip(weights, ranks, strict=True):
        totals[:rank] += weight
    return [w / totals[:rank].clamp_min(1e-300) for w, rank in zip(weights, ranks, strict=True)]


def _emptied(last: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of ``last`` in float64, with zeros in the first ``rank`` components."""
    B, A = last.B.double().clone(), last.A.double().clone()
    B[:, :rank], A[:rank] = 0, 0
    return B, A


def _part(upload: Upload, modules: set[str]) -> Upload:
    """What an upload holds of these modules."""
    ids = {m: numbers for m, numbers in upload.component_ids.items() if m in modules}
    aux = {name: adapter.only(modules) for name, adapter in upload.aux.items()}
    return replace(upload, adapter=upload.adapter.only(modules), component_ids=ids, aux=aux)
