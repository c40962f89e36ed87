"""What clients changed in a round, seen from the server: for averagers that compare clients.

Uploads are whole adapters in most methods, and have what was handed out in common. A change that
is turned around would be hidden behind it, so that clients are compared by their changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flexlora.lowrank import (
    Adapter,
    Factors,
    as_vector,
    normalized,
    parameter_gram,
    product_gram,
)
from flexlora.method.averager import Mean, Weights
from flexlora.method.averaging import client_weights, limited_weights
from flexlora.method.handout import with_components
from flexlora.method.interface import (
    Client,
    Download,
    Feature,
    FreshAdapters,
    Method,
    RoundContext,
    State,
    Turn,
    Upload,
)

Space = Literal["products", "parameters"]
"""In which vectors changes are compared: products ``B @ A``, or the entries of what travels."""

_OF_PRODUCTS = frozenset({Mean.PRODUCTS, Mean.PRODUCTS_BY_COMPONENT})


@dataclass(frozen=True)
class Changes:
    """The changes of a round's uploads; factors are read one module at a time.

    ``untrained`` has by client what its upload would be if it had trained nothing. ``weights`` are
    the method's, of which no client may have more than ``most_share``.
    """

    uploads: Sequence[Upload]
    untrained: Mapping[str, Adapter]
    space: Space
    weights: Weights = "examples"
    most_share: float = 1.0

    @property
    def declared(self) -> Tensor:
        """The clients' shares (n,) before they are compared, the largest of them limited.

        A robust rule bears less than half of all weight in the hands of attackers, so that what
        they report themselves must not give it to them.
        """
        weights = limited_weights(client_weights(self.uploads, self.weights), self.most_share)
        return torch.tensor(normalized(weights), dtype=torch.float64)

    def gram(self, modules: Sequence[str]) -> Tensor:
        """The inner products (n, n) of the changes of all these modules, in cohort order."""
        total = torch.zeros(len(self.uploads), len(self.uploads), dtype=torch.float64)
        for module in modules:
            total += self.module_gram(module)
        return total

    def module_gram(self, module: str) -> Tensor:
        """The same of one module; a client that does not train it has not changed it."""
        gram = torch.zeros(len(self.uploads), len(self.uploads), dtype=torch.float64)
        trainers = [n for n, upload in enumerate(self.uploads) if module in upload.adapter]
        if trainers:
            at = torch.tensor(trainers)
            gram[at[:, None], at] = self._gram(module, [self.uploads[n] for n in trainers])
        return gram

    def _gram(self, module: str, uploads: Sequence[Upload]) -> Tensor:
        pairs = [(u.adapter[module], self.untrained[u.client][module]) for u in uploads]
        changes = [change_between(now, before, self.space) for now, before in pairs]
        if self.space == "products":
            return product_gram(changes)
        ids = [
            u.component_ids.get(module, range(change.rank))
            for u, change in zip(uploads, changes, strict=True)
        ]
        return parameter_gram(changes, ids)


def space_of(method: Method) -> Space:
    """Products where a method averages only them; else the parameters that travel.

    Where factors are averaged, other factors of the same product are another upload.
    """
    return "products" if method.needs <= _OF_PRODUCTS else "parameters"


@dataclass(frozen=True)
class Untrained(Mapping[str, Adapter]):
    """By client: what its upload would be if it had trained nothing, by the method's own hooks.

    Of methods that aggregate by module, one module at a time is made, when it is read; of others
    each client's whole adapter, once.
    """

    method: Method
    state: State
    context: RoundContext
    clients: Mapping[str, Client]
    uploads: Mapping[str, Upload]
    wire_dtype: torch.dtype

    def __getitem__(self, client: str) -> Adapter:
        if client not in self.uploads:
            raise KeyError(client)
        if Feature.PER_MODULE in self.method.features:
            return Adapter(_ByModule(self, client))
        return self.of(client, list(self.uploads[client].adapter))

    def __iter__(self) -> Iterator[str]:
        return iter(self.uploads)

    def __len__(self) -> int:
        return len(self.uploads)

    def of(self, client: str, modules: Sequence[str]) -> Adapter:
        """What a client's upload would have of these modules."""
        method, sent = self.method, self.uploads[client]
        state, context, known = self.state, self.context, self.clients[client]
        if Feature.PER_MODULE in method.features:
            state, context = state.only(modules), context.only(modules)
            known = replace(known, ranks={m: known.ranks[m] for m in modules})
        download = method.handout(state, known, context)
        travelled = download.adapter.to(self.wire_dtype).to(torch.float32)
        fresh = FreshAdapters(context.shapes, context.seed, client, context.round)
        start = method.prepare(replace(download, adapter=travelled), {}, fresh)
        if Feature.PROBES in method.features:
            start = with_components(start, {m: sent.component_ids[m] for m in start.adapter})
        return without_training(method, start, context.round)


def without_training(method: Method, start: Download, round: int) -> Adapter:
    """What a client uploads that starts from a completed download and trains nothing."""
    trained, parameters = start.adapter, method.parametrize(start)
    if parameters is not None:
        trained = Adapter({m: as_vector(p.parameters) for m, p in parameters.items()})
    return method.upload_from(Turn(start, trained, 0, round))


def change_between(now: Factors, before: Factors, space: Space) -> Factors:
    """What one module of an upload changed, in float64: factors of the difference of products,
    of their summed rank, or the difference of the factors.
    """
    return (_product_change if space == "products" else _parameter_change)(now, before)


@dataclass(frozen=True)
class _ByModule(Mapping[str, Factors]):
    whole: Untrained
    client: str

    def __getitem__(self, module: str) -> Factors:
        return self.whole.of(self.client, [module])[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole.uploads[self.client].adapter)

    def __len__(self) -> int:
        return len(self.whole.uploads[self.client].adapter)


def _product_change(now: Factors, before: Factors) -> Factors:
    """The difference of two products, of their summed rank; components of zero are left out."""
    begun = before.B.abs().amax(0) > 0 if before.B.numel() else before.B.new_zeros(0).bool()
    B, A = before.B[:, begun], before.A[begun]
    return Factors(
        torch.cat([now.B.double(), -B.double()], 1), torch.cat([now.A.double(), A.double()], 0)
    )


def _parameter_change(now: Factors, before: Factors) -> Factors:
    """The difference of two factor pairs, entry by entry; a missing component counts as zero."""
    rank = max(now.rank, before.rank)
    now, before = now.padded(rank).to(torch.float64), before.padded(rank).to(torch.float64)
    return Factors(now.B - before.B, now.A - before.A)
