"""The basic values: the LoRA factors of one linear layer, and an adapter of many layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flexlora.errors import AdapterError

FactorNames = Literal["BA", "B", "A"]
"""Which of the two factors, the same for every module."""


@runtime_checkable
class KnownRanks(Protocol):
    """Modules in a file, whose ranks are available without reading them."""

    def rank(self, module: str) -> int:
        """The rank of a module."""
        ...


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank matrix ``B @ A``: the effective update of one linear layer.

    ``B`` is (out, rank) and ``A`` is (rank, in). The LoRA scale is already folded into
    ``B``, so the product needs no further scaling.

    Raises:
        AdapterError: a factor is not a matrix, the ranks differ, or dtypes differ.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        B, A = self.B, self.A
        if B.ndim != 2 or A.ndim != 2:
            raise AdapterError(
                f"Factors need two matrices, got B of shape {tuple(B.shape)} and A of "
                f"shape {tuple(A.shape)}."
            )
        if B.shape[1] != A.shape[0]:
            raise AdapterError(
                f"B is {tuple(B.shape)} (out, rank) and A is {tuple(A.shape)} (rank, in): "
                f"their ranks, {B.shape[1]} and {A.shape[0]}, differ."
            )
        if B.dtype != A.dtype:
            raise AdapterError(f"B is {B.dtype} and A is {A.dtype}; give both one dtype.")

    @property
    def rank(self) -> int:
        """The number of rank-one terms, which bounds the rank of the product."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the product."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, target: torch.dtype | torch.device | str) -> Factors:
        """The same factors in another dtype or on another device."""
        return Factors(self.B.to(target), self.A.to(target))

    def restricted(self, factors: FactorNames) -> Factors:
        """Only the given factors; the other is replaced by an empty tensor of the same rank.

        A missing ``B`` is (0, rank), a missing ``A`` is (rank, 0).
        """
        B = self.B if "B" in factors else self.B[:0]
        return Factors(B, self.A if "A" in factors else self.A[:, :0])

    def components(self, numbers: Sequence[int]) -> Factors:
        """The rank-one components with these indices, in this order; a copy."""
        indices = torch.tensor(list(numbers), dtype=torch.int64, device=self.B.device)
        return Factors(self.B[:, indices], self.A[indices])

    def first(self, rank: int) -> Factors:
        """The first ``rank`` terms, as views.

        For factors from an SVD this is the best approximation of that rank.

        Raises:
            AdapterError: ``rank`` is negative or larger than the rank of the factors.
        """
        if not 0 <= rank <= self.rank:
            raise AdapterError(
                f"Cannot take {rank} terms of factors of rank {self.rank}; give a rank from 0 "
                f"to {self.rank}."
            )
        return Factors(self.B[:, :rank], self.A[:rank])

    def padded(self, rank: int) -> Factors:
        """The same product with zero terms appended up to ``rank``.

        Raises:
            AdapterError: the factors have a higher rank.
        """
        missing = rank - self.rank
        if missing < 0:
            raise AdapterError(
                f"Cannot pad factors of rank {self.rank} to rank {rank}; give a rank of at least "
                f"{self.rank}."
            )
        return Factors(
            torch.nn.functional.pad(self.B, (0, missing)),
            torch.nn.functional.pad(self.A, (0, 0, 0, missing)),
        )

    def widened(self, rank: int, draw: np.random.Generator) -> Factors:
        """The same product with *trainable* terms appended up to ``rank``.

        New columns of ``B`` are zero and new rows of ``A`` have LoRA's standard initialisation,
        uniform in +-1/sqrt(in). Zeros in both factors would never receive a gradient. The
        rows come from ``draw`` in order, so that fewer rows are a prefix of more rows.
        """
        B, bound = self.padded(rank).B, self.A.shape[1] ** -0.5
        rows = draw.uniform(-bound, bound, size=(rank - self.rank, self.A.shape[1]))
        return Factors(B, torch.cat([self.A, torch.from_numpy(rows).to(self.A)]))


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, Factors]):
    """Low-rank updates by module path, such as ``model.layers.0.self_attn.q_proj``.

    Iteration is in the order of ``modules``. Ranks may differ from module to module.
    ``modules`` may be any mapping: one that reads each module from a file on access keeps a
    large adapter out of memory.
    """

    modules: Mapping[str, Factors]

    def __getitem__(self, module: str) -> Factors:
        return self.modules[module]

    def __contains__(self, module: object) -> bool:
        return module in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def rank(self, module: str) -> int:
        """The rank of a module; one that lies in a file is not read for it."""
        if isinstance(self.modules, KnownRanks):
            return self.modules.rank(module)
        return self.modules[module].rank

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {module: self.rank(module) for module in self.modules}

    @property
    def parameters(self) -> int:
        """The number of parameters in all factors."""
        return sum(f.B.numel() + f.A.numel() for f in self.values())

    def to(self, target: torch.dtype | torch.device | str) -> Adapter:
        """The same adapter in another dtype or on another device."""
        return Adapter({module: factors.to(target) for module, factors in self.items()})

    def first(self, ranks: Mapping[str, int]) -> Adapter:
        """Each module truncated to its first ``ranks[module]`` terms, or all if it has fewer."""
        return Adapter({m: f.first(min(ranks[m], f.rank)) for m, f in self.items()})

    def restricted(self, factors: FactorNames) -> Adapter:
        """``Factors.restricted`` of each module."""
        return Adapter({module: f.restricted(factors) for module, f in self.items()})

    def only(self, modules: Collection[str]) -> Adapter:
        """The adapter restricted to ``modules``, in its own order, without reading any.

        Modules that the adapter does not have are ignored.
        """
        wanted = set(modules)
        return Adapter(_Subset(self.modules, tuple(m for m in self.modules if m in wanted)))


@dataclass(frozen=True, eq=False)
class _Subset(Mapping[str, Factors]):
    """A view of some modules of a mapping that may read each module from a file."""

    whole: Mapping[str, Factors]
    names: tuple[str, ...]

    def __getitem__(self, module: str) -> Factors:
        if module not in self.names:
            raise KeyError(module)
        return self.whole[module]

    def __contains__(self, module: object) -> bool:
        return module in self.names

    def rank(self, module: str) -> int:
        """The rank of a module, without reading it where the whole can tell."""
        return Adapter(self.whole).rank(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
