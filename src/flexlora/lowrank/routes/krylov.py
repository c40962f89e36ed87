"""Randomised block Krylov iteration, with a bound on its error computed afterwards.

Musco and Musco 2015 (arXiv 1504.05477): with ``G = W W'`` and a random block X, the best
approximation of W from ``span[X, G X, ..., G^q X]`` is near the optimum. Here the blocks are
narrower than the rank wanted (a quarter), which needs fewer products with W (Meyer, Musco
and Musco 2023, arXiv 2305.02535); the space grows until the bound holds or it stops paying.

**The bound.** Q is an orthonormal basis of the space, of m columns; in ``[Q, Q_perp]`` G is
``[[T, C'], [C, D]]``. T (m, m) and ``C'C`` are at hand, D is not; let ``d >= ||D||_2``. For
every x > 0, ``[[C'C / x, -C'], [-C, x I]]`` is positive semidefinite, so
``G <= diag(T + C'C / x, D + x I)``, and with ``t_i`` the eigenvalues of T and ``a_i(x)`` those
of ``T + C'C / x``, both descending, the squared singular values of W obey (Weyl)

    sum_{i<=r} s_i^2 <= sum_{i<=r} max(a_i(x), d + x)            for every r and x.

The result, W projected on the leading r eigenvectors of T, has the squared error
``||W||^2 - sum_{i<=r} t_i``, at most ``gap_r = sum_{i<=r} (max(a_i, d + x) - t_i)`` above the
optimum's; the optimum's is at least ``sum_{i>rank} t_i`` (Cauchy). Hence
``excess = sqrt(1 + gap / sum_{i>rank} t_i) - 1``, for the rank and, as each term of the gap
is non-negative and a smaller r leaves more, for all smaller ones. ``||W||`` is not needed,
so no digits cancel.

d comes from ``probe``, with a failure probability of at most 1e-9.

Arithmetic is not exact. Sums of s products err by about ``sqrt(s) eps ||B|| ||A||``, s the
summed rank, almost all of it orthogonal to the rest of the error; so the squares of that
are added to the gap, and ``eps ||B|| ||A||`` to the error itself. The random blocks have a
fixed seed: equal input gives equal bytes. Data made by someone who knows the seed could
defeat d, and nothing else here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lowrank.factors import Factors
from flexlora.lowrank.routes.probe import PROBES, TINY, gaussian, outside, probe
from flexlora.lowrank.svd import SVD, Matrix, parts, signs, times, transposed

SEED = 150405477
BLOCK_STEP = 16
"""Blocks are multiples of this: a product with 8 columns takes longer than one with 16."""


def block_of(rank: int) -> int:
    """The width of a block: a quarter of the rank, for products that are still efficient."""
    return BLOCK_STEP * max(1, round(rank / (4 * BLOCK_STEP)))


def widest_of(rank: int) -> int:
    """The columns of the basis at which it is given up: about two and a half times the rank."""
    block = block_of(rank)
    return block * max(5, -(-5 * rank // (2 * block)))


def cost(matrix: Matrix, rank: int) -> float:
    """The time this route takes, as the flops of a matrix product that takes as long.

    For a basis of 1.75 times the rank, which decaying spectra need (measured). Infinite for
    a rank of zero and where the widest basis and the probes do not fit into the shape.
    """
    limit = min(matrix.shape) if isinstance(matrix, Tensor) else min(*matrix.shape, matrix.rank)
    if rank == 0 or widest_of(rank) + PROBES > limit:
        return math.inf
    basis = 2 * block_of(rank) + 1.5 * rank
    twice = 4 * sum(part.numel() for part in parts(matrix))
    growing = (basis + 4 * PROBES) * twice
    return growing + 12 * sum(matrix.shape) * basis**2 + 100 * basis**3


def svd(matrix: Matrix, rank: int, tolerance: float, start: Factors | None = None) -> SVD:
    """The vectors of the first ``rank`` values; ``excess`` may be above ``tolerance``.

    About ``8 rank`` products with a column each way, and O((out + in) rank^2) beside; 3 to 4
    times faster than QR where the spectrum decays. Where ``excess`` stays above the tolerance
    the pairs are the best found; it is infinite where the attempt was given up early, a
    spectrum being too flat to get there with the widest basis.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = None if start is None else Factors(start.A.T, start.B.T)
        found = svd(transposed(matrix), rank, tolerance, turned)
        sign = signs(found.U)
        U, Vt = found.Vt.T * sign, (found.U * sign).T
        return SVD(U, found.S, Vt, found.beyond, "krylov", found.excess)
    draw = torch.Generator().manual_seed(SEED)
    space = _Space.begun(matrix, rank, None if start is None else start.B, draw)
    before = math.inf
    while True:
        space.grow()
        if space.columns < 1.5 * rank:
            continue
        ritz = space.ritz()
        # What remains even with d = 0: until that is little, a probe is not worth its time.
        least = ritz.excess(rank, 0.0, space.rounding, tolerance)
        if least > tolerance and not space.hopeless(least, before, tolerance):
            before = least
            continue
        if least > tolerance:
            return space.finish(ritz, rank, math.inf, math.inf)
        norm, trace = probe(matrix, space.Q, ritz.target(rank), draw)
        excess = ritz.excess(rank, norm, space.rounding, tolerance)
        if excess <= tolerance or space.full:
            return space.finish(ritz, rank, excess, trace)


class _Space:
    """A growing block Krylov space of ``G = W W'``: basis Q, images ``Y = W'Q``, residual.

    ``residual`` is the part of ``G`` times the last block that lies outside Q, over ``size``,
    the product of the factors' norms; of the other blocks it is zero, their products being
    in the space.
    """

    def __init__(self, matrix: Matrix, rank: int, first: Tensor) -> None:
        self.matrix, self.block, self.widest = matrix, first.shape[1], widest_of(rank)
        out, in_ = matrix.shape
        self.columns = 0
        self.residual = first
        self._Q = first.new_empty(out, self.widest)
        # In float64: small Ritz values would drown in the rounding of a Gram matrix.
        self._Y = first.new_empty(in_, self.widest, dtype=torch.float64)
        self._T = self._Y.new_empty(self.widest, self.widest)
        inner = in_ if isinstance(matrix, Tensor) else matrix.rank
        self.size = math.prod(float(torch.linalg.vector_norm(part)) for part in parts(matrix))
        self.size = max(self.size, TINY)
        self.rounding = _Rounding(torch.finfo(first.dtype).eps * self.size, inner)

    @classmethod
    def begun(
        cls, matrix: Matrix, rank: int, start: Tensor | None, draw: torch.Generator
    ) -> _Space:
        """From a random mixture of the columns of ``start``, or of the matrix.

        A start that is zero, as LoRA's first B, or too narrow for a block is of no use.
        """
        usable = start is not None and start.shape[1] >= block_of(rank) and bool(start.any())
        source = start.to(parts(matrix)[0]) if start is not None and usable else matrix
        like = parts(matrix)[0].new_empty(source.shape[1], 0)
        return cls(matrix, rank, times(source, gaussian(like, block_of(rank), draw)))

    @property
    def Q(self) -> Tensor:
        """The basis (out, columns)."""
        return self._Q[:, : self.columns]

    @property
    def Y(self) -> Tensor:
        """The images (in, columns) of the basis, in float64."""
        return self._Y[:, : self.columns]

    @property
    def full(self) -> bool:
        """Whether another block would make it wider than it may be."""
        return self.columns + self.block > self.widest

    def hopeless(self, now: float, before: float, wanted: float) -> bool:
        """Whether an excess that falls by the same factor a block stays above the one wanted."""
        left = (self.widest - self.columns) // self.block
        return self.full or now * (now / before) ** left > wanted

    def grow(self) -> None:
        """Add one block: the residual, made orthonormal, and its product with G."""
        block = torch.linalg.qr(self.residual).Q
        # The second projection, of unit columns, is what makes the basis orthogonal to rounding.
        block = torch.linalg.qr(outside(block, self.Q)).Q
        image = times(transposed(self.matrix), block)
        new = slice(self.columns, self.columns + self.block)
        self._Q[:, new], self._Y[:, new] = block, image.double()
        self.columns += self.block
        products = self.Y.T @ self._Y[:, new]
        self._T[: self.columns, new], self._T[new, : self.columns] = products, products.T
        self.residual = outside(times(self.matrix, image / self.size), self.Q)

    def ritz(self) -> _Ritz:
        """The Ritz values and vectors in the space, in float64."""
        values, vectors = torch.linalg.eigh(self._T[: self.columns, : self.columns])
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        R = torch.linalg.qr(self.residual.double() * self.size, mode="r").R
        coupling = R @ vectors[-self.block :]
        return _Ritz(values, vectors, coupling.T @ coupling)

    def finish(self, ritz: _Ritz, rank: int, excess: float, beyond: float) -> SVD:
        """The leading pairs; the images are made orthonormal once more, in their own precision."""
        eye = torch.eye(self.columns, dtype=self._Q.dtype, device=self._Q.device)
        defect = float((self.Q.T @ self.Q - eye).abs().max())
        if not defect < torch.finfo(self._Q.dtype).eps ** 0.5:
            excess = math.inf
        leading = ritz.vectors[:, :rank].to(self._Q)
        V, R = torch.linalg.qr(self.Y.to(leading) @ leading)
        turn, S, Vt = torch.linalg.svd(R.T)
        U, V = self.Q @ (leading @ turn), V @ Vt.T
        sign = signs(V)
        rest = ritz.values[rank:].sqrt().to(S)
        return SVD(U * sign, torch.cat([S, rest]), (V * sign).T, beyond, "krylov", excess)


@dataclass(frozen=True)
class _Rounding:
    """The allowance for rounding errors: ``unit`` is eps ||B|| ||A||, of sums of ``terms``."""

    unit: float
    terms: int

    def added(self, excess: float, optimum: float) -> float:
        """The excess with the allowance, given a lower bound of the optimum's error."""
        share = self.unit / optimum
        return math.sqrt((1 + excess) ** 2 + self.terms * share**2) - 1 + share


@dataclass(frozen=True, eq=False)
class _Ritz:
    """Eigenvalues of T descending, its eigenvectors, and ``C'C`` in their basis (float64)."""

    values: Tensor
    vectors: Tensor
    coupling: Tensor

    def target(self, rank: int) -> float:
        """The eigenvalue that D should stay below."""
        return float(self.values[rank - 1])

    def excess(self, rank: int, norm: float, rounding: _Rounding, enough: float) -> float:
        """The bound of the module's docstring for ``d = norm``, the least over a few x.

        The first that is ``enough`` ends the search.
        """
        rest = float(self.values[rank:].sum())
        if rest <= 0 or norm == math.inf:
            return math.inf
        best = math.inf
        for ceiling in (1.0, 1.1, 1.5, 3.0):
            level = ceiling * max(self.target(rank), 1.05 * norm)
            gap = self._gap(rank, level, level - norm)
            best = min(best, rounding.added(math.sqrt(1 + gap / rest) - 1, math.sqrt(rest)))
            if best <= enough:
                break
        return best

    def _gap(self, rank: int, level: float, x: float) -> float:
        """How much more the leading values can hold, with ``level = d + x``."""
        if x <= torch.finfo(torch.float64).eps * float(self.values[0]):
            return math.inf
        raised = torch.linalg.eigvalsh(torch.diag(self.values) + self.coupling / x).flip(0)
        terms = raised[:rank].clamp_min(level) - self.values[:rank]
        return float(terms.clamp_min(0).sum())
