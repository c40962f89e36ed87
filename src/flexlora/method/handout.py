"""What several methods hand out and expect back: parts of adapters, halves, numbered terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256

import torch

from flexlora.lowrank import Adapter, Factors, Halves
from flexlora.method.interface import Client, Download, Draw, Expected, State


def hollow(ranks: Mapping[str, int]) -> Adapter:
    """An adapter of these ranks without a single number, which tells a client its ranks."""
    return Adapter(
        {m: Factors(torch.zeros(0, rank), torch.zeros(rank, 0)) for m, rank in ranks.items()}
    )


def seed_of(adapter: Adapter) -> int:
    """A number of this run's own, from the fresh adapter that its seed has drawn.

    With it a server that has no seed tells clients, in 8 bytes, which bases or masks are the
    run's. It is the same for float32 numbers held in another precision.
    """
    first = next(iter(adapter.values())).A.to(torch.float32).contiguous()
    return int.from_bytes(sha256(first.numpy().tobytes()).digest()[:6], "little")


def half_expected(
    client: Client, shapes: Mapping[str, tuple[int, int]], halves: Halves
) -> dict[str, Expected]:
    """What is expected where these halves travel alone, at the client's ranks."""
    found = {}
    for module, rank in client.ranks.items():
        shape = half_shape(shapes[module], halves)
        found[module] = Expected(shape, rank, rank)
    return found


def half_shape(shape: tuple[int, int], halves: Halves) -> tuple[int, int]:
    """The shape (out, in) of an update of which only these halves travel."""
    return (shape[0] if "B" in halves else 0, shape[1] if "A" in halves else 0)


def chosen_of(download: Download, terms: Mapping[str, Sequence[int]]) -> Download:
    """The download that trains these terms alone and sees the others beside them."""
    others = {
        module: [term for term in range(f.rank) if term not in set(terms[module])]
        for module, f in download.adapter.items()
    }
    rest = Adapter({m: f.terms(others[m]) for m, f in download.adapter.items()})
    return replace(
        download,
        adapter=Adapter({m: f.terms(terms[m]) for m, f in download.adapter.items()}),
        rest=rest if download.rest is None else stacked([rest, download.rest]),
        terms=terms,
    )


def stacked(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with the sum of the products, its ranks added up; modules may be missing."""
    modules: dict[str, Factors] = {}
    for adapter in adapters:
        for module, f in adapter.items():
            if module in modules:
                held = modules[module]
                f = f.to(held.B.dtype)
                f = Factors(torch.cat([held.B, f.B], 1), torch.cat([held.A, f.A], 0))
            modules[module] = f
    return Adapter(modules)


def drawn_terms(known: Adapter, client: Client, draw: Draw) -> dict[str, tuple[int, ...]]:
    """As many terms of each module as the client's rank, drawn for it in this round alone."""
    terms = {}
    for module, f in known.items():
        drawn = draw(f"{client.id} {module}").permutation(f.rank)
        terms[module] = tuple(sorted(drawn[: client.ranks[module]].tolist()))
    return terms


def numbered(
    state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Expected]:
    """What is expected where a client sends as many numbered terms as its rank."""
    ranks = state.facts["ranks"]
    return {
        m: Expected(shape, client.ranks[m], client.ranks[m], ranks[m])
        for m, shape in shapes.items()
    }
