"""What several methods hand out and expect back: truncations, single factors, components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from flexlora.lowrank import Adapter, FactorNames, Factors
from flexlora.method.interface import (
    Client,
    Download,
    ModuleSpec,
    RoundContext,
    State,
    UploadSpec,
    at_ranks,
)


def truncated(state: State, client: Client, context: RoundContext) -> Download:
    """The model's first components, at the client's rank: what ``Method.handout`` does."""
    return Download(at_ranks(state.model, client.ranks, context))


def only_updates(state: State, client: Client) -> Download:
    """The base updates that the client has not merged yet; of an adapter only its ranks."""
    updates = state.merge_log.pending(client.id)
    return Download(Adapter({}), base_updates=updates, ranks=client.ranks)


def factor_shape(shape: tuple[int, int], factors: FactorNames) -> tuple[int, int]:
    """The shape (out, in) of an update of which only these factors travel."""
    return (shape[0] if "B" in factors else 0, shape[1] if "A" in factors else 0)


def factor_spec(client: Client, context: RoundContext, factors: FactorNames) -> UploadSpec:
    """What is expected where only these factors travel, at the client's ranks."""
    return UploadSpec(
        {
            module: ModuleSpec(factor_shape(context.shapes[module], factors), rank, rank)
            for module, rank in client.ranks.items()
        }
    )


def numbered_spec(client: Client, context: RoundContext) -> UploadSpec:
    """What is expected where a client sends as many numbered components as its rank."""
    return UploadSpec(
        {
            m: ModuleSpec(shape, client.ranks[m], client.ranks[m], context.ranks[m])
            for m, shape in context.shapes.items()
        }
    )


def random_components(
    model: Adapter, client: Client, context: RoundContext
) -> dict[str, tuple[int, ...]]:
    """As many components of each module as the client's rank, drawn for it in this round."""
    ids = {}
    for module, factors in model.items():
        order = context.rng(f"{client.id} {module}").permutation(factors.rank)
        ids[module] = tuple(sorted(order[: client.ranks[module]].tolist()))
    return ids


def with_components(download: Download, ids: Mapping[str, Sequence[int]]) -> Download:
    """The download that trains only these components and has the others frozen beside them."""
    others = {
        module: [number for number in range(f.rank) if number not in set(ids[module])]
        for module, f in download.adapter.items()
    }
    frozen = Adapter({m: f.components(others[m]) for m, f in download.adapter.items()})
    return replace(
        download,
        adapter=Adapter({m: f.components(ids[m]) for m, f in download.adapter.items()}),
        frozen=frozen if download.frozen is None else stacked([frozen, download.frozen]),
        component_ids=ids,
    )


def stacked(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with the sum of the products, its ranks added up; modules may be missing."""
    modules: dict[str, Factors] = {}
    for adapter in adapters:
        for module, f in adapter.items():
            if module in modules:
                before = modules[module]
                f = f.to(before.B.dtype)
                f = Factors(torch.cat([before.B, f.B], 1), torch.cat([before.A, f.A], 0))
            modules[module] = f
    return Adapter(modules)


def changes(start: Adapter, trained: Adapter) -> Adapter:
    """What training changed in each factor."""
    return Adapter({m: Factors(f.B - start[m].B, f.A - start[m].A) for m, f in trained.items()})
