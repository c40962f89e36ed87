"""A frozen linear layer with the factors of several adapters, each applied to its own rows.

The base product is one matrix product over all rows. The low-rank products are computed
adapter by adapter, each at its own rank, without padding. They have the rank as the *first*
dimension, ``h = A x'`` (rank, rows): a thin product with few columns runs at half the speed of
one with few rows (measured at rank 30: 96 against 136 GFLOP/s; the gradient of ``B``: 74
against 136).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flexlora.lowrank import Factors


@dataclass
class Layout:
    """Which rows belong to which adapter; one object is shared by all layers of a base model.

    ``edges`` has one entry more than there are adapters: adapter i has the rows from
    ``edges[i]`` to ``edges[i + 1]``, possibly none. Without edges every adapter has an equal
    part of the batch. With an ``only`` adapter it has all rows, however many a layer gets. Both
    are set for the duration of a forward pass.
    """

    edges: tuple[int, ...] | None = None
    only: int | None = None

    @contextmanager
    def of(self, edges: Sequence[int] | None, only: int | None = None) -> Iterator[None]:
        """Set these edges, or the only adapter, within the context.

        Without either the only adapter stays as it was.
        """
        previous = self.edges, self.only
        if edges is None and only is None:
            only = self.only
        self.edges, self.only = None if edges is None else tuple(edges), only
        try:
            yield
        finally:
            self.edges, self.only = previous

    def spans(self, rows: int, adapters: int) -> tuple[tuple[int, int], ...]:
        """The rows (first, end) of each adapter.

        Raises:
            ValueError: the edges, or equal parts, do not fit rows and adapters.
        """
        edges = self.edges
        if self.only is not None:
            return tuple((0, rows if i == self.only else 0) for i in range(adapters))
        if edges is None:
            if rows % adapters:
                raise ValueError(f"{rows} rows cannot be split equally among {adapters} adapters.")
            edges = tuple(range(0, rows + 1, rows // adapters))
        complete = edges[0] == 0 and edges[-1] == rows and list(edges) == sorted(edges)
        if len(edges) != adapters + 1 or not complete:
            raise ValueError(f"Edges {edges} do not split {rows} rows among {adapters} adapters.")
        return tuple(itertools.pairwise(edges))


class LayerAdapter(NamedTuple):
    """One adapter's factors in one layer: the update is ``scale * B @ A``.

    ``B`` is (out, rank) and ``A`` (rank, in). ``frozen`` are further factors, of any rank, that
    are added for the same rows and have no gradient. No gradient is computed for a factor that
    does not require one.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    frozen: Factors | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer that can carry adapters; without any it is the layer itself."""

    def __init__(self, base: nn.Linear | Conv1D, layout: Layout) -> None:
        super().__init__()
        self.base = base
        self.layout = layout
        self.adapters: tuple[LayerAdapter, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """``x W'``, plus ``scale (x A') B'`` for the rows of each adapter.

        ``x`` is (..., in), the result (..., out).
        """
        if not self.adapters:
            return cast(Tensor, self.base(x))
        linear = self.linear(x.numel() // x.shape[-1])
        if linear.W is None:
            y = _Added.apply(x, self.base(x), linear, *linear.factors)  # type: ignore[no-untyped-call]
        else:
            y = _Fused.apply(x, linear, *linear.factors)  # type: ignore[no-untyped-call]
        return cast(Tensor, y)

    def linear(self, rows: int) -> Linear:
        """The layer's values for an input of ``rows`` rows.

        Raises:
            ValueError: the layout does not fit the rows and the adapters.
        """
        spans = self.layout.spans(rows, len(self.adapters)) if self.adapters else ()
        # Only its own layer can multiply by, for example, quantised weights.
        plain = type(self.base) in (nn.Linear, Conv1D)
        weight = weight_of(self.base) if plain else None
        return Linear(weight, self.base.bias if plain else None, spans, self.adapters)


def shape_of(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """The shape (out, in) of a layer's weight, also where it is stored quantised."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def weight_of(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight (out, in) of a layer; GPT-2's ``Conv1D`` stores it as (in, out)."""
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


class Linear(NamedTuple):
    """A linear layer with its adapters as plain values, outside of autograd.

    ``W`` is (out, in), or None if another layer computes the base product; ``bias`` is (out,).
    ``spans`` are the rows (first, end) of each adapter.
    """

    W: Tensor | None
    bias: Tensor | None
    spans: tuple[tuple[int, int], ...]
    adapters: tuple[LayerAdapter, ...]

    @property
    def factors(self) -> list[Tensor]:
        """A and B of each adapter, alternating, as autograd functions take them."""
        return [factor for adapter in self.adapters for factor in (adapter.A, adapter.B)]

    def forward(self, rows: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, and the ``A x'`` of each adapter, which ``backward`` needs.

        ``rows`` is x (rows, in). ``y`` (rows, out) is the base product, to which the adapters'
        products are added in place; without it the base product is computed. Returns y and one
        (rank, its rows) tensor for each adapter.
        """
        if y is None:
            assert self.W is not None
            y = F.linear(rows, self.W, self.bias)
        hidden = []
        for (first, end), adapter in zip(self.spans, self.adapters, strict=True):
            if first == end:
                hidden.append(rows.new_empty(adapter.A.shape[0], 0))
                continue
            h = adapter.A.to(rows.dtype) @ rows[first:end].t()
            y[first:end].addmm_(h.t(), adapter.B.to(rows.dtype).t(), alpha=adapter.scale)
            if adapter.frozen is not None:
                frozen_h = adapter.frozen.A.to(rows.dtype) @ rows[first:end].t()
                y[first:end].addmm_(frozen_h.t(), adapter.frozen.B.to(rows.dtype).t())
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
        """Write the input's gradient to ``dx``; returns the gradients of the factors.

        ``grad`` is that of the output (rows, out), ``rows`` the input (rows, in), ``hidden`` the
        second result of ``forward``. ``dx`` (rows, in) is overwritten, or with ``add`` added
        to; None if it is not needed. The result has dA (rank, in) and dB (out, rank) of each
        adapter, alternating, in the factors' dtype; None for an adapter without rows and for a
        factor that requires no gradient.
        """
        if dx is not None and self.W is not None:
            torch.addmm(dx, grad, self.W, beta=1 if add else 0, out=dx)
        factor_grads: list[Tensor | None] = []
        for (first, end), adapter, h in zip(self.spans, self.adapters, hidden, strict=True):
            if first == end:
                factor_grads += [None, None]
                continue
            A, B, scale, frozen = adapter
            g = grad[first:end]
            dh = B.to(g.dtype).t() @ g.t()
            if dx is not None:
                dx[first:end].addmm_(dh.t(), A.to(g.dtype), alpha=scale)
                if frozen is not None:
                    frozen_dh = frozen.B.to(g.dtype).t() @ g.t()
                    dx[first:end].addmm_(frozen_dh.t(), frozen.A.to(g.dtype))
            dA = (dh @ rows[first:end]).mul_(scale) if A.requires_grad else None
            dB = (h @ g).mul_(scale) if B.requires_grad else None
            factor_grads.append(None if dA is None else dA.to(A.dtype))
            factor_grads.append(None if dB is None else dB.to(B.dtype).t())
        return factor_grads


class _Fused(torch.autograd.Function):
    """The layer and its adapters as one node of autograd: the input is saved only once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, *factors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, hidden = linear.forward(rows)
        ctx.save_for_backward(rows, *hidden)
        ctx.linear = linear
        return _shaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        factor_grads = ctx.linear.backward(g, rows, hidden, dx)
        return None if dx is None else dx.view(*grad.shape[:-1], -1), None, *factor_grads


class _Added(torch.autograd.Function):
    """The adapters' products, added to the base product of another layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, linear: Linear, *factors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, hidden = linear.forward(rows, y.reshape(len(rows), -1).clone())
        ctx.save_for_backward(rows, *hidden)
        ctx.linear = linear
        return _shaped(out, y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        factor_grads = ctx.linear.backward(g, rows, hidden, dx, add=True)
        return None if dx is None else dx.view(*grad.shape[:-1], -1), grad, None, *factor_grads


def _shaped(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The values in another shape, and not a view for autograd: a model may change it in place."""
    return cast(Tensor, torch.ops.aten._unsafe_view(values, shape))
