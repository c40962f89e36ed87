"""FedTT and FedTT+ (arXiv 2410.13097): clients train and average the cores of tensor trains.

``B`` (out, r) and ``A`` (r, in) are tensor-train matrices each: with out = m_1 .. m_d and
r = n_1 .. n_d, the entry of ``B`` at row (i_1 .. i_d) and column (j_1 .. j_d) is the product
of the matrices G_k[:, i_k, j_k, :], and the same for ``A``. The cores G_k (t, m_k, n_k, t) are
some tens of times fewer numbers than the factors. The server takes the mean of each core.

``plus`` (FedTT+) freezes all of a module's cores but the first, the last and one of those
between, which takes turns from round to round, so that the mean is nearer to that of products.

From the abstract and reading notes (unverified: FedTT+'s turns). Differs: the paper puts a
bottleneck adapter behind each block; here LoRA's factors are trains. The core that starts at
zero is the first of ``B``, which is always trained. FedTT+ sends all cores down, as clients
may have missed rounds, and three up.

Cores travel as one ``B`` (numbers, 1) beside an ``A`` without width. A size is split into d
factors as alike as its primes allow, so that a prime one saves little. The LoRA scale has no
part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, Form, column
from flexlora.method import (
    Client,
    Download,
    Draw,
    Expected,
    Fresh,
    Method,
    State,
    Upload,
    Weights,
    factor_means,
    hollow,
    seed_of,
    weighted,
)
from flexlora.seeds import rng

Shape = tuple[int, int, int, int]
"""A core's: the rank before it, its rows, its columns, the rank after it."""


@dataclass(frozen=True)
class FedTT(Method):
    """FedTT. ``cores`` is d, of each factor; ``train_rank`` is t. Unequal ranks are refused."""

    title = "FedTT: factors as tensor trains, means of their cores"
    paper = "arXiv 2410.13097"
    exact = False
    mixed_ranks = False
    by_module = True
    up = "c"
    down = "c"
    server = "sums of cores"

    cores: int = 3
    train_rank: int = 5
    plus: bool = False
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if self.cores < 2 or self.train_rank < 1:
            raise ConfigError(
                f"cores is at least 2 and train_rank at least 1, got {self.cores} and "
                f"{self.train_rank}."
            )

    def start(self, adapter: Adapter) -> State:
        """Cores by lot, so that ``A`` has the spread of LoRA's start; ``B`` is zero."""
        draw, modules = rng(seed_of(adapter), "cores"), {}
        for module, f in adapter.items():
            B, A = self._shapes(*f.shape, f.rank)
            drawn = torch.cat([_drawn(B, 1.0, draw), _drawn(A, 1 / (3 * f.shape[1]), draw)])
            drawn[: prod(B[0])] = 0
            modules[module] = column(drawn.to(f.B.dtype))
        sizes = {m: [*f.shape, f.rank] for m, f in adapter.items()}
        facts = {"ranks": adapter.ranks, "sizes": sizes, "rounds": 0}
        return State({"global": Adapter(modules)}, facts)

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """All cores, and with ``plus`` whose turn it is."""
        facts = {"turn": state.facts["rounds"]} if self.plus else {}
        extra = {"ranks": hollow(client.ranks)}
        return Download(state.adapters["global"], extra=extra, facts=facts)

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """The factors that the cores are; the cores beside them."""
        ranks, whole = download.extra["ranks"].ranks, {}
        for module, f in download.adapter.items():
            whole[module] = _factors(self._shapes(*fresh.shapes[module], ranks[module]), f.B[:, 0])
        return replace(download, adapter=Adapter(whole), extra={"cores": download.adapter})

    def form(self, start: Download) -> Mapping[str, Form]:
        """The cores to be trained, among the others."""
        forms = {}
        for module, f in start.adapter.items():
            shapes, cores = self._shapes(*f.shape, f.rank), start.extra["cores"][module].B[:, 0]
            at = self._trained(shapes, start.facts.get("turn", 0))
            forms[module] = Form(cores[at], partial(_formed, shapes), (cores, at))
        return forms

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """The trained cores as one column."""
        return {m: Expected((len(at), 0), 1, 1) for m, at in self._places(state).items()}

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each core that was trained; the others stay."""
        held, places, modules = weighted(uploads, self.weights), self._places(state), {}
        for module, last in state.adapters["global"].items():
            cores = last.B[:, 0].clone()
            cores[places[module]] = factor_means(held(module)).B[:, 0].to(cores.dtype)
            modules[module] = column(cores)
        facts = {**state.facts, "rounds": state.facts["rounds"] + 1}
        return State({"global": Adapter(modules)}, facts)

    def update(self, state: State) -> Adapter:
        """The factors that the cores are."""
        known, sizes = state.adapters["global"], state.facts["sizes"]
        return Adapter({m: _factors(self._shapes(*sizes[m]), f.B[:, 0]) for m, f in known.items()})

    def _places(self, state: State) -> dict[str, Tensor]:
        """Which of each module's numbers are trained in this round."""
        sizes, turn = state.facts["sizes"], state.facts["rounds"]
        return {m: self._trained(self._shapes(*size), turn) for m, size in sizes.items()}

    def _trained(self, shapes: Sequence[Sequence[Shape]], turn: int) -> Tensor:
        """The places of the cores that train in this turn."""
        numbers = torch.tensor([prod(shape) for train in shapes for shape in train])
        last = len(numbers) - 1
        own = [0, 1 + turn % (last - 1), last] if self.plus else list(range(last + 1))
        owner = torch.arange(last + 1).repeat_interleave(numbers)
        return torch.isin(owner, torch.tensor(own)).nonzero()[:, 0]

    def _shapes(self, out: int, in_: int, rank: int) -> tuple[list[Shape], list[Shape]]:
        """The shapes of the cores of ``B`` and of those of ``A``."""
        return self._train(out, rank), self._train(rank, in_)

    def _train(self, rows: int, columns: int) -> list[Shape]:
        """Cores of a matrix, large factors of one side beside small ones of the other."""
        m, n = _split(rows, self.cores), _split(columns, self.cores)[::-1]
        cells = [i * j for i, j in zip(m, n, strict=True)]
        # A train's rank is never more than what stands on either side of it can have.
        inner = [
            min(self.train_rank, prod(cells[:k]), prod(cells[k:])) for k in range(1, self.cores)
        ]
        return list(zip([1, *inner], m, n, [*inner, 1], strict=True))


def _split(size: int, parts: int) -> list[int]:
    """Factors of a size, the smallest first, each prime given to the smallest so far."""
    found, prime, primes = [1] * parts, 2, []
    while size > 1:
        while size % prime == 0:
            primes.append(prime)
            size //= prime
        prime += 1
    for each in reversed(primes):
        found[found.index(min(found))] *= each
    return sorted(found)


def _drawn(shapes: Sequence[Shape], variance: float, draw: np.random.Generator) -> Tensor:
    """Cores of normal numbers, whose matrix has entries of this variance."""
    paths = prod(shape[3] for shape in shapes)
    spread = float((variance / paths) ** (0.5 / len(shapes)))
    return spread * torch.from_numpy(draw.normal(size=sum(prod(shape) for shape in shapes)))


def _factors(shapes: Sequence[Sequence[Shape]], cores: Tensor) -> Factors:
    """Both factors from all cores, in single precision at least."""
    cores = cores.to(torch.promote_types(cores.dtype, torch.float32))
    numbers = [sum(prod(shape) for shape in train) for train in shapes]
    B, A = (_matrix(s, c) for s, c in zip(shapes, torch.split(cores, numbers), strict=True))
    return Factors(B, A)


def _matrix(shapes: Sequence[Shape], cores: Tensor) -> Tensor:
    """The matrix of a train."""
    whole = cores.new_ones(1, 1, 1, 1)
    for shape, core in zip(shapes, torch.split(cores, [*map(prod, shapes)]), strict=True):
        whole = torch.einsum("amns,spqt->ampnqt", whole, core.view(shape))
        whole = whole.flatten(1, 2).flatten(2, 3)
    return whole[0, :, :, 0]


def _formed(
    shapes: Sequence[Sequence[Shape]], parameters: Tensor, cores: Tensor, at: Tensor
) -> Factors:
    return _factors(shapes, cores.scatter(0, at, parameters))
