"""RAVAN (arXiv 2506.05568): small trained cores between frozen bases, in several heads.

``W = sum_i s_i B_i H_i A_i`` over h heads. ``B_i`` (out, q) and ``A_i`` (q, in) are frozen,
orthonormal also across heads; the core ``H_i`` (q, q), zero at the start, and its scale
``s_i`` = 1 are trained. Clients send ``s_i H_i``, whose mean over the clients that trained the
head is exact. At the numbers of a LoRA of rank r the update has rank h q, several times r.

q is the largest at which all heads take no more numbers than the largest rank, r (out + in),
and stand side by side, h q <= min(out, in). A client of rank r trains r (out + in) / q^2 heads,
at least one: those of the largest norm, ties (as in its first round) by lot; it sees the others.

A core travels as one column of ``B`` (q^2, heads), beside an ``A`` without width; ``terms`` are
the numbers of heads. Bases never travel: both sides make them from a number that the download
tells. The LoRA scale has no part.

Differs: bases are columns, by lot, of the cosine transform with its rows' signs by lot, as in
fast sketches, and not a QR of normal numbers: as orthonormal, at O(out h q) instead of
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
from flexlora.lowrank import Adapter, Factors, Form
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
    chosen_of,
    seed_of,
    weights_of,
)
from flexlora.seeds import rng


@dataclass(frozen=True)
class RAVAN(Method):
    """RAVAN. ``head_rank`` is q, the same for all modules; None derives it for each."""

    title = "RAVAN: trained cores between frozen orthonormal heads"
    paper = "arXiv 2506.05568"
    exact = True
    rank_wise = True
    mixed_ranks = True
    by_module = True
    up = "b*c"
    down = "4*c"
    server = "sums of cores, 4 SVDs of rank sqrt(c)"

    heads: int = 4
    head_rank: int | None = None
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if self.heads < 1 or (self.head_rank is not None and self.head_rank < 1):
            raise ConfigError(
                f"heads and head_rank are at least 1, got {self.heads} and {self.head_rank}."
            )

    def start(self, adapter: Adapter) -> State:
        """Cores of zero. Raises ConfigError where heads do not stand side by side."""
        cores = {}
        for module, f in adapter.items():
            most = min(f.shape) // self.heads
            q = self.head_rank or min(isqrt(f.rank * sum(f.shape) // self.heads), most)
            if not 0 < q <= most:
                raise ConfigError(
                    f"{self.heads} heads of rank {q} do not stand side by side in {module!r} of "
                    f"shape {f.shape}; lower method.heads or method.head_rank."
                )
            cores[module] = _columns(f.B.new_zeros(self.heads, q * q))
        shapes = {m: list(f.shape) for m, f in adapter.items()}
        facts = {"ranks": adapter.ranks, "shapes": shapes, "bases": seed_of(adapter)}
        return State({"global": Adapter(cores)}, facts)

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """All cores: the client's own to train, the others to see."""
        known, terms = state.adapters["global"], {}
        for module, count in self._budget(state, client).items():
            lot = torch.from_numpy(draw(f"{client.id} {module}").permutation(self.heads))
            best = known[module].B.norm(dim=0)[lot].argsort(descending=True, stable=True)
            terms[module] = sorted(lot[best[:count]].tolist())
        return chosen_of(Download(known, facts={"bases": state.facts["bases"]}), terms)

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """The cores between their bases, and those of the others as the rest."""
        own, rest, bases = {}, {}, {}
        for module, f in download.adapter.items():
            q, terms = isqrt(f.shape[0]), download.terms[module]
            whole = _bases(download.facts["bases"], module, fresh.shapes[module], self.heads * q)
            others = [head for head in range(self.heads) if head not in terms]
            bases[module] = whole.terms([head * q + i for head in terms for i in range(q)])
            beside = whole.terms([head * q + i for head in others for i in range(q)])
            own[module] = _between(f.B.T, bases[module])
            if download.rest is not None:
                rest[module] = _between(download.rest[module].B.T, beside)
        extra = {"cores": download.adapter, "bases": Adapter(bases)}
        return replace(download, adapter=Adapter(own), rest=Adapter(rest), extra=extra)

    def form(self, start: Download) -> Mapping[str, Form]:
        """Of each head its scale, then its core."""
        forms, bases = {}, start.extra["bases"]
        for module, f in start.extra["cores"].items():
            parameters = torch.cat([f.B.new_ones(1, f.rank), f.B]).T.flatten()
            frozen = bases[module].B, bases[module].A
            forms[module] = Form(parameters, partial(_formed, f.rank), frozen)
        return forms

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """``s_i H_i`` of the heads trained."""
        return Adapter(
            {m: _columns(_scaled(len(start.terms[m]), f.B[:, 0])) for m, f in trained.items()}
        )

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """As many heads as the client's rank allows."""
        known = state.adapters["global"]
        return {
            m: Expected(known[m].shape, n, n, self.heads)
            for m, n in self._budget(state, client).items()
        }

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each head's cores over those who trained it; without any it stays."""
        weights, cores = weights_of(uploads, self.weights), {}
        for module, last in state.adapters["global"].items():
            held, total = torch.zeros(last.rank, dtype=torch.float64), 0 * last.B.double()
            for weight, upload in zip(weights, uploads, strict=True):
                at = list(upload.terms[module])
                held[at] += weight
                total[:, at] += weight * upload.adapter[module].B.double()
            means = torch.where(held > 0, total / held.clamp_min(1e-300), last.B.double())
            cores[module] = _columns(means.T.to(last.B.dtype))
        return State({"global": Adapter(cores)}, state.facts)

    def update(self, state: State) -> Adapter:
        """All heads, in the order of an SVD: bases being orthonormal, the cores' SVDs are it."""
        found = {}
        for module, f in state.adapters["global"].items():
            q, shape = isqrt(f.shape[0]), state.facts["shapes"][module]
            bases = _bases(state.facts["bases"], module, shape, self.heads * q).to(torch.float64)
            U, S, Vt = torch.linalg.svd(f.B.T.double().reshape(self.heads, q, q))
            left = _between((U * S[:, None]).flatten(1), bases).B
            right = (Vt @ bases.A.reshape(self.heads, q, -1)).flatten(0, 1)
            order = S.flatten().argsort(descending=True, stable=True)
            found[module] = Factors(left[:, order], right[order]).to(f.B.dtype)
        return Adapter(found)

    def _budget(self, state: State, client: Client) -> dict[str, int]:
        """How many heads of each module the client trains."""
        shapes = state.facts["shapes"]
        return {
            m: min(max(client.ranks[m] * sum(shapes[m]) // f.shape[0], 1), self.heads)
            for m, f in state.adapters["global"].items()
        }


def _columns(cores: Tensor) -> Factors:
    """Cores (heads, q^2) as they travel."""
    return Factors(cores.T, cores.new_zeros(len(cores), 0))


def _bases(seed: int, module: str, shape: Sequence[int], columns: int) -> Factors:
    """Orthonormal ``B`` and ``A``, of float64, so that all make the same to single precision."""
    draw = rng(seed, "bases", module)
    B, A = (_orthonormal(size, columns, draw) for size in shape)
    return Factors(B, A.T).to(torch.float32)


def _orthonormal(size: int, columns: int, draw: np.random.Generator) -> Tensor:
    """So many columns of the cosine transform (DCT-II) of ``size``, its rows' signs by lot."""
    chosen = torch.from_numpy(draw.permutation(size)[:columns]).double()
    signs = torch.from_numpy(draw.choice([-1.0, 1.0], size=size))
    scales = torch.where(chosen == 0, 1.0, 2.0).div(size).sqrt()
    angles = torch.outer(2 * torch.arange(size).double() + 1, chosen * (pi / (2 * size)))
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
