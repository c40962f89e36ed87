"""What clients changed in a round, seen from the server: for averagers that compare clients.

Uploads are whole adapters in most methods, and have what was handed out in common. A change that
is turned around would be hidden behind it, so that clients are compared by their changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from flexlora.lowrank import Adapter, Factors, normalized, parameter_gram, product_gram
from flexlora.method.averager import Mean, Weights
from flexlora.method.averaging import client_weights, limited_weights
from flexlora.method.interface import Client, Feature, Method, RoundContext, State, Upload

Space = Literal["products", "parameters"]
"""In which vectors changes are compared: products ``B @ A``, or the entries of what travels."""

_OF_PRODUCTS = frozenset({Mean.PRODUCTS, Mean.PRODUCTS_BY_COMPONENT})


@dataclass(frozen=True)
class Changes:
    """The changes of a round's uploads; factors are read one module at a time.

    ``weights`` are the method's, of which no client may have more than ``most_share``.
    """

    uploads: Sequence[Upload]
    untrained: Untrained
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

    def change(self, upload: Upload, module: str) -> Factors:
        """What an upload changed of one module that it has."""
        now = upload.adapter[module]
        before = comparable(now, self.untrained.of(upload.client, module), module)
        return change_between(now, before, self.space)

    def _gram(self, module: str, uploads: Sequence[Upload]) -> Tensor:
        changes = [self.change(upload, module) for upload in uploads]
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
class Untrained:
    """What clients of a round would upload if they had trained nothing: ``Method.untrained``.

    Of methods that aggregate by module, one module at a time is made, when it is asked for; of
    others each client's whole adapter, once.
    """

    method: Method
    state: State
    context: RoundContext
    clients: Mapping[str, Client]
    wire_dtype: torch.dtype

    def of(self, client: str, module: str) -> Adapter:
        """A client's upload, of which at least this module is there, if it has it at all."""
        if Feature.PER_MODULE not in self.method.features:
            return self._whole[client]
        known = self.clients[client]
        return self._upload(
            replace(known, ranks={module: known.ranks[module]}),
            self.state.only([module]),
            self.context.only([module]),
        )

    @cached_property
    def _whole(self) -> Mapping[str, Adapter]:
        return {
            id: self._upload(client, self.state, self.context)
            for id, client in self.clients.items()
        }

    def _upload(self, client: Client, state: State, context: RoundContext) -> Adapter:
        download = self.method.handout(state, client, context)
        travelled = replace(download, adapter=download.adapter.to(self.wire_dtype))
        return self.method.untrained(travelled, context)


def comparable(factors: Factors, untrained: Adapter, module: str) -> Factors | None:
    """The factors of an untrained upload that stand against these; None: zero does."""
    if module not in untrained:
        return None
    f = untrained[module]
    B, A = (mine == other for mine, other in zip(factors.shape, f.shape, strict=True))
    if B and A:
        return f
    if B and factors.shape[1] == 0:
        return f.restricted("B")
    if A and factors.shape[0] == 0:
        return f.restricted("A")
    return None


def change_between(now: Factors, before: Factors | None, space: Space) -> Factors:
    """What one module of an upload changed, in float64: factors of the difference of products,
    of their summed rank, or the difference of the factors. Without ``before``, all of it.
    """
    before = now.first(0) if before is None else before
    return (_product_change if space == "products" else _parameter_change)(now, before)


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
