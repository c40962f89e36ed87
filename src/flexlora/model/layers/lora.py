"""A frozen linear layer and the factors of several adapters, each for rows of its own.

The base product is one GEMM over all rows. The low-rank products go adapter by adapter, each
at its own rank, nothing padded. They are laid out with the rank as the *first* dimension,
``h = A x'`` (rank, rows): a thin GEMM with few columns runs at half the speed of one with few
rows (measured at rank 30: 96 against 136 GFLOP/s; the gradient of ``B``: 74 against 136).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlora.lowrank import Factors


@dataclass
class Layout:
    """Which rows belong to which adapter; one for all layers of a base model.

    ``edges`` has one entry more than there are adapters: adapter i has the rows from
    ``edges[i]`` to ``edges[i + 1]``, which may be none. Without edges every adapter has an
    equal part of the batch. It is set around each forward pass, and not kept by anything.
    """

    edges: tuple[int, ...] | None = None

    @contextmanager
    def of(self, edges: Sequence[int] | None) -> Iterator[None]:
        """These edges for the passes within."""
        before, self.edges = self.edges, None if edges is None else tuple(edges)
        try:
            yield
        finally:
            self.edges = before

    def twice(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a pass as it is now and of the same pass made again later."""
        return nullcontext(), self.of(self.edges)

    def spans(self, rows: int, adapters: int) -> tuple[tuple[int, int], ...]:
        """The rows (first, end) of each adapter.

        Raises:
            ValueError: the edges, or equal parts, do not fit rows and adapters.
        """
        edges = self.edges
        if edges is None:
            if rows % adapters:
                raise ValueError(f"{rows} rows cannot be dealt to {adapters} adapters equally.")
            edges = tuple(range(0, rows + 1, rows // adapters))
        whole = edges[0] == 0 and edges[-1] == rows and list(edges) == sorted(edges)
        if len(edges) != adapters + 1 or not whole:
            raise ValueError(f"Edges {edges} do not deal {rows} rows to {adapters} adapters.")
        return tuple(itertools.pairwise(edges))


class Part(NamedTuple):
    """One adapter's factors in one layer: ``scale * B @ A`` is its update.

    ``rest`` are factors that its rows see as well and that have no gradient. A factor that
    needs none costs none either.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    rest: Factors | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer with places for factors; without them, the layer itself."""

    def __init__(self, base: nn.Linear, layout: Layout) -> None:
        super().__init__()
        self.base = base
        self.layout = layout
        self.parts: tuple[Part, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """``x W'``, and for the rows of each adapter ``scale (x A') B'``."""
        if not self.parts:
            return cast(Tensor, self.base(x))
        linear = self.linear(x.numel() // x.shape[-1])
        if linear.W is None:
            y = _Added.apply(x, self.base(x), linear, *linear.factors)  # type: ignore[no-untyped-call]
        else:
            y = _Fused.apply(x, linear, *linear.factors)  # type: ignore[no-untyped-call]
        return cast(Tensor, y)

    def linear(self, rows: int) -> Linear:
        """The layer as it is for an input of so many rows.

        Raises:
            ValueError: the layout does not fit.
        """
        spans = self.layout.spans(rows, len(self.parts)) if self.parts else ()
        # Quantised weights and the like are multiplied by their own layer alone.
        plain = type(self.base) is nn.Linear
        weight = self.base.weight if plain else None
        return Linear(weight, self.base.bias if plain else None, spans, self.parts)


class Linear(NamedTuple):
    """A linear layer with its adapters as plain values, outside of autograd.

    All rows are two-dimensional, (rows, in) or (rows, out). ``W`` is None where somebody
    else makes the base product.
    """

    W: Tensor | None
    bias: Tensor | None
    spans: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]

    @property
    def factors(self) -> list[Tensor]:
        """A and B of each adapter in turn, as autograd functions take them."""
        return [factor for part in self.parts for factor in (part.A, part.B)]

    def forward(self, rows: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, and of each adapter ``A x'`` (rank, its rows), which backward needs."""
        if y is None:
            assert self.W is not None
            y = F.linear(rows, self.W, self.bias)
        hidden = []
        for (first, end), part in zip(self.spans, self.parts, strict=True):
            if first == end:
                hidden.append(rows.new_empty(part.A.shape[0], 0))
                continue
            h = part.A.to(rows.dtype) @ rows[first:end].t()
            y[first:end].addmm_(h.t(), part.B.to(rows.dtype).t(), alpha=part.scale)
            if part.rest is not None:
                beside = part.rest.A.to(rows.dtype) @ rows[first:end].t()
                y[first:end].addmm_(beside.t(), part.rest.B.to(rows.dtype).t())
            hidden.append(h)
        return y, hidden

    def backward(
        self,
        grad: Tensor,
        rows: Tensor,
        hidden: Sequence[Tensor],
        dx: Tensor | None,
        add: bool = False,
    ) -> list[Tensor | None]:
        """Write the input's gradient into ``dx`` (``add``: onto what is there); the factors' ones.

        Returns the gradients of A and B of each adapter in turn, in their own precision;
        None for one without rows, or that needs no gradient.
        """
        if dx is not None and self.W is not None:
            torch.addmm(dx, grad, self.W, beta=1 if add else 0, out=dx)
        found: list[Tensor | None] = []
        for (first, end), part, h in zip(self.spans, self.parts, hidden, strict=True):
            if first == end:
                found += [None, None]
                continue
            g = grad[first:end]
            through = part.B.to(g.dtype).t() @ g.t()
            if dx is not None:
                dx[first:end].addmm_(through.t(), part.A.to(g.dtype), alpha=part.scale)
                if part.rest is not None:
                    beside = part.rest.B.to(g.dtype).t() @ g.t()
                    dx[first:end].addmm_(beside.t(), part.rest.A.to(g.dtype))
            dA = (through @ rows[first:end]).mul_(part.scale) if part.A.requires_grad else None
            dB = (h @ g).mul_(part.scale) if part.B.requires_grad else None
            found.append(None if dA is None else dA.to(part.A.dtype))
            found.append(None if dB is None else dB.to(part.B.dtype).t())
        return found


class _Fused(torch.autograd.Function):
    """The layer and its factors as one node: the input is saved once, sums are in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, *factors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, hidden = linear.forward(rows)
        ctx.save_for_backward(rows, *hidden)
        ctx.linear = linear
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        found = ctx.linear.backward(g, rows, hidden, dx)
        return None if dx is None else dx.view(*grad.shape[:-1], -1), None, *found


class _Added(torch.autograd.Function):
    """The factors' products added to what another layer has made of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, linear: Linear, *factors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, hidden = linear.forward(rows, y.reshape(len(rows), -1).clone())
        ctx.save_for_backward(rows, *hidden)
        ctx.linear = linear
        return out.view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        found = ctx.linear.backward(g, rows, hidden, dx, add=True)
        return None if dx is None else dx.view(*grad.shape[:-1], -1), grad, None, *found
