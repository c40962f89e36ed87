"""RAVAN (arXiv 2506.05568): small trained cores between frozen bases, in several heads.

``W = sum_i s_i B_i H_i A_i`` over h heads. ``B_i`` (out, q) and ``A_i`` (q, in) are frozen,
orthonormal also across heads; the core ``H_i`` (q, q), zero at the start, and its scale
``s_i`` = 1 are trained. Clients send ``s_i H_i``, whose mean over the clients that trained the
head is exact. With the parameters of a LoRA of rank r the update has rank h q, several times r.

q is the largest at which all heads take no more parameters than the largest rank, r (out + in),
and stand side by side, h q <= min(out, in). A client of rank r trains r (out + in) / q^2 heads, at
least one: those of the largest norm, ties (as in its first round) at random; the others are
frozen.

A core travels as one column of ``B`` (q^2, heads), beside an ``A`` without width;
``component_ids`` are the numbers of heads. Bases never travel: both sides make them from the run's
seed. The LoRA scale has no part.

Differs: bases are random columns of the cosine transform, with random signs of its rows, as in
fast sketches, and not the QR of a normal matrix: as orthonormal, at O(out h q) instead of
O(out (h q)^2), which at large ranks took longer than a client's training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt, pi

import numpy as np
import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, Parametrization
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
    Turn,
    UploadSpec,
    Weights,
    with_components,
)
from flexlora.seeds import rng


@dataclass(frozen=True)
class RAVAN(Method):
    """RAVAN. ``head_rank`` is q, the same for all modules; None derives it for each."""

    info = Info(
        "RAVAN: trained cores between frozen orthonormal heads",
        "arXiv 2506.05568",
        exact=True,
        by_component=True,
        up="b*c",
        down="4*c",
        server="sums of cores, 4 SVDs of rank sqrt(c)",
        exempt={"gauge": "clients train cores between frozen bases"},
    )
    features = frozenset({Feature.MIXED_RANKS, Feature.PER_MODULE})
    needs = frozenset({Mean.NUMBERED_COMPONENTS})

    heads: int = 4
    head_rank: int | None = None
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if self.heads < 1 or (self.head_rank is not None and self.head_rank < 1):
            raise ConfigError(
                f"heads and head_rank are at least 1, got {self.heads} and {self.head_rank}."
            )

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """Cores of zero. Raises ConfigError where heads do not stand side by side."""
        cores = {}
        for module, f in fresh.items():
            most = min(f.shape) // self.heads
            q = self.head_rank or min(isqrt(f.rank * sum(f.shape) // self.heads), most)
            if not 0 < q <= most:
                raise ConfigError(
                    f"{self.heads} heads of rank {q} do not stand side by side in {module!r} of "
                    f"shape {f.shape}; lower method.heads or method.head_rank."
                )
            cores[module] = _columns(f.B.new_zeros(self.heads, q * q))
        return State(Adapter(cores))

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """All cores: the client's own to train, the others frozen."""
        ids = {}
        for module, count in self._budget(state, client, context).items():
            generator = context.rng(f"{client.id} {module}")
            order = torch.from_numpy(generator.permutation(self.heads))
            norms = state.model[module].B.norm(dim=0)[order]
            best = norms.argsort(descending=True, stable=True)
            ids[module] = sorted(order[best[:count]].tolist())
        return with_components(Download(state.model), ids)

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """The cores between their bases, and those of the others frozen."""
        own, frozen, bases = {}, {}, {}
        for module, f in download.adapter.items():
            q, ids = isqrt(f.shape[0]), download.component_ids[module]
            whole = _bases(fresh.seed, module, fresh.shapes[module], self.heads * q)
            others = [head for head in range(self.heads) if head not in ids]
            bases[module] = whole.components([head * q + i for head in ids for i in range(q)])
            beside = whole.components([head * q + i for head in others for i in range(q)])
            own[module] = _between(f.B.T, bases[module])
            if download.frozen is not None:
                frozen[module] = _between(download.frozen[module].B.T, beside)
        aux = {"cores": download.adapter, "bases": Adapter(bases)}
        return replace(download, adapter=Adapter(own), frozen=Adapter(frozen), aux=aux)

    def parametrize(self, start: Download) -> Mapping[str, Parametrization]:
        """Of each head its scale, then its core."""
        parametrizations, bases = {}, start.aux["bases"]
        for module, f in start.aux["cores"].items():
            parameters = torch.cat([f.B.new_ones(1, f.rank), f.B]).T.flatten()
            frozen = bases[module].B, bases[module].A
            make = partial(_formed, f.rank)
            parametrizations[module] = Parametrization(parameters, make, frozen)
        return parametrizations

    def upload_from(self, turn: Turn) -> Adapter:
        """``s_i H_i`` of the heads trained."""
        heads = {m: len(ids) for m, ids in turn.start.component_ids.items()}
        return Adapter({m: _columns(_scaled(heads[m], f.B[:, 0])) for m, f in turn.trained.items()})

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """As many heads as the client's rank allows."""
        return UploadSpec(
            {
                m: ModuleSpec(state.model[m].shape, heads, heads, self.heads)
                for m, heads in self._budget(state, client, context).items()
            }
        )

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each head's cores over those who trained it; without any it stays."""
        cores = {
            m: cohort.numbered_components(m, last).to(last.B.dtype)
            for m, last in state.model.items()
        }
        return replace(state, model=Adapter(cores))

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """All heads, in the order of an SVD: bases being orthonormal, the cores' SVDs are it."""
        modules = {}
        for module, f in state.model.items():
            q, shape = isqrt(f.shape[0]), context.shapes[module]
            bases = _bases(context.seed, module, shape, self.heads * q).to(torch.float64)
            U, S, Vt = torch.linalg.svd(f.B.T.double().reshape(self.heads, q, q))
            left = _between((U * S[:, None]).flatten(1), bases).B
            right = (Vt @ bases.A.reshape(self.heads, q, -1)).flatten(0, 1)
            order = S.flatten().argsort(descending=True, stable=True)
            modules[module] = Factors(left[:, order], right[order]).to(f.B.dtype)
        return Adapter(modules)

    def _budget(self, state: State, client: Client, context: RoundContext) -> dict[str, int]:
        """How many heads of each module the client trains."""
        return {
            m: min(max(client.ranks[m] * sum(context.shapes[m]) // f.shape[0], 1), self.heads)
            for m, f in state.model.items()
        }


def _columns(cores: Tensor) -> Factors:
    """Cores (heads, q^2) as they travel."""
    return Factors(cores.T, cores.new_zeros(len(cores), 0))


def _bases(seed: int, module: str, shape: Sequence[int], columns: int) -> Factors:
    """Orthonormal ``B`` and ``A``, of float64, so that all make the same to single precision."""
    generator = rng(seed, "bases", module)
    B, A = (_orthonormal(size, columns, generator) for size in shape)
    return Factors(B, A.T).to(torch.float32)


def _orthonormal(size: int, columns: int, generator: np.random.Generator) -> Tensor:
    """Columns of the cosine transform (DCT-II) of ``size``, with random signs of its rows."""
    frequencies = torch.from_numpy(generator.permutation(size)[:columns]).double()
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], size=size))
    scales = torch.where(frequencies == 0, 1.0, 2.0).double().div(size).sqrt()
    angles = torch.outer(2 * torch.arange(size).double() + 1, frequencies * (pi / (2 * size)))
    return angles.cos() * signs[:, None] * scales


def _between(cores: Tensor, bases: Factors) -> Factors:
    """``[B_i H_i]`` and ``[A_i]`` of cores (heads, q^2), in single precision at least."""
    q, dtype = isqrt(cores.shape[1]), torch.promote_types(cores.dtype, bases.B.dtype)
    bases = bases.to(dtype)
    parts = [
        bases.B[:, first : first + q] @ core.reshape(q, q)
        for first, core in zip(range(0, bases.rank, q), cores.to(dtype), strict=True)
    ]
    return Factors(torch.cat([bases.B[:, :0], *parts], 1), bases.A)


def _scaled(heads: int, parameters: Tensor) -> Tensor:
    """``s_i H_i`` (heads, q^2)."""
    each = parameters.view(heads, -1)
    return each[:, :1] * each[:, 1:]


def _formed(heads: int, parameters: Tensor, B: Tensor, A: Tensor) -> Factors:
    return _between(_scaled(heads, parameters), Factors(B, A))
