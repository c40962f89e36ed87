"""FedTT and FedTT+ (arXiv 2410.13097): clients train and average the cores of tensor trains.

``B`` (out, r) and ``A`` (r, in) are tensor-train matrices each: with out = m_1 .. m_d and
r = n_1 .. n_d, the entry of ``B`` at row (i_1 .. i_d) and column (j_1 .. j_d) is the product
of the matrices G_k[:, i_k, j_k, :], and the same for ``A``. The cores G_k (t, m_k, n_k, t) are
some tens of times fewer parameters than the factors. The server takes the mean of each core.

``plus`` (FedTT+) freezes all of a module's cores but the first, the last and one of those
between, which takes turns from round to round, so that the mean is nearer to that of products.

From the abstract and reading notes (unverified: FedTT+'s turns). Differs: the paper puts a
bottleneck adapter behind each block; here LoRA's factors are trains. The core that starts at
zero is the first of ``B``, which is always trained. FedTT+ sends all cores down, as clients
may have missed rounds, and three up.

Cores travel as one ``B`` (parameters, 1) beside an ``A`` without width. A size is split into d
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
from flexlora.lowrank import Adapter, Factors, Parametrization, as_vector
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    FreshAdapters,
    Info,
    Mean,
    Method,
    ModuleSpec,
    RoundContext,
    State,
    UploadSpec,
    Weights,
)
from flexlora.seeds import rng

Shape = tuple[int, int, int, int]
"""A core's: the rank before it, its rows, its columns, the rank after it."""


@dataclass(frozen=True)
class FedTT(Method):
    """FedTT. ``cores`` is d, of each factor; ``train_rank`` is t. Unequal ranks are refused."""

    info = Info(
        "FedTT: factors as tensor trains, averaged cores",
        "arXiv 2410.13097",
        up="c",
        down="c",
        server="sums of cores",
        exempt={"gauge": "clients train the cores of a tensor train"},
    )
    features = frozenset({Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

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

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """Random cores: ``A`` has the standard deviation of LoRA's start, ``B`` is zero."""
        generator, modules = rng(context.seed, "cores"), {}
        for module, f in fresh.items():
            B, A = self._shapes(*f.shape, f.rank)
            cores = torch.cat(
                [_random(B, 1.0, generator), _random(A, 1 / (3 * f.shape[1]), generator)]
            )
            cores[: prod(B[0])] = 0
            modules[module] = as_vector(cores.to(f.B.dtype))
        return State(Adapter(modules))

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """All cores; with ``plus`` the round decides which of them are trained."""
        ints = {"round": context.round} if self.plus else {}
        return Download(state.model, ranks=client.ranks, ints=ints)

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """The factors that the cores are; the cores beside them."""
        adapter = {}
        for module, f in download.adapter.items():
            shapes = self._shapes(*fresh.shapes[module], download.ranks[module])
            adapter[module] = _factors(shapes, f.B[:, 0])
        return replace(download, adapter=Adapter(adapter), aux={"cores": download.adapter})

    def parametrize(self, start: Download) -> Mapping[str, Parametrization]:
        """The cores to be trained, among the others."""
        parametrizations = {}
        for module, f in start.adapter.items():
            shapes, cores = self._shapes(*f.shape, f.rank), start.aux["cores"][module].B[:, 0]
            at = self._trained(shapes, start.ints.get("round", 1))
            parametrizations[module] = Parametrization(
                cores[at], partial(_formed, shapes), (cores, at)
            )
        return parametrizations

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """The trained cores as one vector."""
        places = self._places(context)
        return UploadSpec({m: ModuleSpec((len(at), 0), 1, 1) for m, at in places.items()})

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """The cores that are trained, as they were."""
        places = self._places(context)
        return Adapter({m: as_vector(f.B[places[m], 0]) for m, f in download.adapter.items()})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each core that was trained; the others stay."""
        places, model = self._places(context), {}
        for module, last in state.model.items():
            cores = last.B[:, 0].clone()
            cores[places[module]] = cohort.factors(module).B[:, 0].to(cores.dtype)
            model[module] = as_vector(cores)
        return replace(state, model=Adapter(model))

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """The factors that the cores are."""
        return Adapter(
            {
                m: _factors(self._shapes(*context.shapes[m], context.ranks[m]), f.B[:, 0])
                for m, f in state.model.items()
            }
        )

    def _places(self, context: RoundContext) -> dict[str, Tensor]:
        """Which of each module's parameters are trained in this round."""
        return {
            m: self._trained(self._shapes(*context.shapes[m], rank), context.round)
            for m, rank in context.ranks.items()
        }

    def _trained(self, shapes: Sequence[Sequence[Shape]], round: int) -> Tensor:
        """The places of the cores that are trained in this round."""
        sizes = torch.tensor([prod(shape) for train in shapes for shape in train])
        last = len(sizes) - 1
        turn = (round - 1) % (last - 1) if last > 1 else 0
        trained = [0, 1 + turn, last] if self.plus else list(range(last + 1))
        core_of = torch.arange(last + 1).repeat_interleave(sizes)
        return torch.isin(core_of, torch.tensor(trained)).nonzero()[:, 0]

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
    factors, prime, primes = [1] * parts, 2, []
    while size > 1:
        while size % prime == 0:
            primes.append(prime)
            size //= prime
        prime += 1
    for each in reversed(primes):
        factors[factors.index(min(factors))] *= each
    return sorted(factors)


def _random(shapes: Sequence[Shape], variance: float, generator: np.random.Generator) -> Tensor:
    """Cores with normal entries, whose matrix has entries of this variance."""
    paths = prod(shape[3] for shape in shapes)
    deviation = float((variance / paths) ** (0.5 / len(shapes)))
    return deviation * torch.from_numpy(generator.normal(size=sum(prod(shape) for shape in shapes)))


def _factors(shapes: Sequence[Sequence[Shape]], cores: Tensor) -> Factors:
    """Both factors from all cores, in single precision at least."""
    cores = cores.to(torch.promote_types(cores.dtype, torch.float32))
    sizes = [sum(prod(shape) for shape in train) for train in shapes]
    B, A = (_matrix(s, c) for s, c in zip(shapes, torch.split(cores, sizes), strict=True))
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
