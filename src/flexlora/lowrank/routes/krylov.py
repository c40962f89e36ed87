"""Randomised block Krylov iteration with an a-posteriori error bound.

Musco and Musco 2015 (arXiv 1504.05477): with ``G = W W'`` and a random block X, the best
approximation of W from ``span[X, G X, ..., G^q X]`` is near the optimum. Here the blocks are
narrower than the target rank (a quarter of it), which needs fewer products with W (Meyer,
Musco and Musco 2023, arXiv 2305.02535); the space grows until the bound holds or a further
block no longer pays.

**The bound.** Q (out, m) is an orthonormal basis of the space; in ``[Q, Q_perp]`` G is
``[[T, C'], [C, D]]``. T (m, m) and ``C'C`` are computed, D is not; let ``d >= ||D||_2``. For
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
summed rank, and most of that error is orthogonal to the remaining error; so its squares are
added to the gap, and ``eps ||B|| ||A||`` to the error itself. The random blocks have a fixed
seed: equal input gives equal bytes. Data chosen by an adversary who has the seed could
invalidate d, and nothing else in the bound.
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
    """The columns of a block: about a quarter of the rank, in multiples of ``BLOCK_STEP``."""
    return BLOCK_STEP * max(1, round(rank / (4 * BLOCK_STEP)))


def widest_of(rank: int) -> int:
    """The largest number of basis columns that is tried: about two and a half times the rank."""
    block = block_of(rank)
    return block * max(5, -(-5 * rank // (2 * block)))


def cost(matrix: Matrix, rank: int) -> float:
    """The time of this route, as the flops of a matrix product that takes equally long.

    For a basis of 1.75 times the rank, which decaying spectra need (measured). Infinite for
    rank 0, and if the widest basis and the probes exceed the matrix.
    """
    limit = min(matrix.shape) if isinstance(matrix, Tensor) else min(*matrix.shape, matrix.rank)
    if rank == 0 or widest_of(rank) + PROBES > limit:
        return math.inf
    basis = 2 * block_of(rank) + 1.5 * rank
    twice = 4 * sum(part.numel() for part in parts(matrix))
    growing = (basis + 4 * PROBES) * twice
    return growing + 12 * sum(matrix.shape) * basis**2 + 100 * basis**3


def svd(matrix: Matrix, rank: int, tolerance: float, start: Factors | None = None) -> SVD:
    """The first ``rank`` singular vectors; ``excess`` may be above ``tolerance``.

    Cost: about ``8 rank`` products with one column in each direction, and O((out + in) rank^2)
    in addition; 3 to 4 times faster than QR if the spectrum decays. If ``excess`` stays above
    the tolerance, the pairs are the best of the largest basis; it is infinite if the iteration
    was stopped early because the spectrum is too flat for the widest basis.
    """
    if matrix.shape[0] > matrix.shape[1]:
        start_transposed = None if start is None else Factors(start.A.T, start.B.T)
        wide = svd(transposed(matrix), rank, tolerance, start_transposed)
        sign = signs(wide.U)
        U, Vt = wide.Vt.T * sign, (wide.U * sign).T
        return SVD(U, wide.S, Vt, wide.beyond, "krylov", wide.excess)
    draw = torch.Generator().manual_seed(SEED)
    space = _Space.begun(matrix, rank, None if start is None else start.B, draw)
    previous = math.inf
    while True:
        space.grow()
        if space.columns < 1.5 * rank:
            continue
        ritz = space.ritz()
        # The excess for d = 0, the smallest possible: a probe is only worth its time below it.
        least = ritz.excess(rank, 0.0, space.rounding, tolerance)
        if least > tolerance and not space.hopeless(least, previous, tolerance):
            previous = least
            continue
        if least > tolerance:
            return space.finish(ritz, rank, math.inf, math.inf)
        norm, trace = probe(matrix, space.Q, ritz.target(rank), draw)
        excess = ritz.excess(rank, norm, space.rounding, tolerance)
        if excess <= tolerance or space.full:
            return space.finish(ritz, rank, excess, trace)


class _Space:
    """A growing block Krylov space of ``G = W W'`` for W (out, in), with m basis columns.

    The basis is ``Q`` (out, m), its images are ``Y = W'Q`` (in, m), and ``_T = Y'Y = Q'GQ`` is
    (m, m). ``residual`` (out, block) is the part of ``G`` times the last block that lies outside
    Q, divided by ``size``, the product of the factors' norms. For earlier blocks that part is
    zero: their products with G are in the space.
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
        """A space whose first block mixes the columns of ``start`` (out, n) or of the matrix.

        The mixture is random. A ``start`` of zeros (the initial B of LoRA) or with fewer columns
        than a block is not used.
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
        """Whether another block would exceed the widest allowed basis."""
        return self.columns + self.block > self.widest

    def hopeless(self, excess: float, previous: float, tolerance: float) -> bool:
        """Whether an excess that keeps falling by the last block's factor misses the tolerance."""
        blocks_left = (self.widest - self.columns) // self.block
        return self.full or excess * (excess / previous) ** blocks_left > tolerance

    def grow(self) -> None:
        """Add one block, the orthonormalised residual, and its product with G."""
        block = torch.linalg.qr(self.residual).Q
        # The second projection, of unit columns, makes the basis orthogonal to rounding.
        block = torch.linalg.qr(outside(block, self.Q)).Q
        image = times(transposed(self.matrix), block)
        new = slice(self.columns, self.columns + self.block)
        self._Q[:, new], self._Y[:, new] = block, image.double()
        self.columns += self.block
        products = self.Y.T @ self._Y[:, new]
        self._T[: self.columns, new], self._T[new, : self.columns] = products, products.T
        self.residual = outside(times(self.matrix, image / self.size), self.Q)

    def ritz(self) -> _Ritz:
        """The Ritz values and vectors of G in the space, in float64."""
        values, vectors = torch.linalg.eigh(self._T[: self.columns, : self.columns])
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        R = torch.linalg.qr(self.residual.double() * self.size, mode="r").R
        coupling = R @ vectors[-self.block :]
        return _Ritz(values, vectors, coupling.T @ coupling)

    def finish(self, ritz: _Ritz, rank: int, excess: float, beyond: float) -> SVD:
        """The leading ``rank`` pairs; the images are orthonormalised again in their own precision.

        The excess is infinite if the basis has lost its orthogonality.
        """
        eye = torch.eye(self.columns, dtype=self._Q.dtype, device=self._Q.device)
        defect = float((self.Q.T @ self.Q - eye).abs().max())
        if not defect < torch.finfo(self._Q.dtype).eps ** 0.5:
            excess = math.inf
        leading = ritz.vectors[:, :rank].to(self._Q)
        V, R = torch.linalg.qr(self.Y.to(leading) @ leading)
        rotation, S, Vt = torch.linalg.svd(R.T)
        U, V = self.Q @ (leading @ rotation), V @ Vt.T
        sign = signs(V)
        trailing = ritz.values[rank:].sqrt().to(S)
        return SVD(U * sign, torch.cat([S, trailing]), (V * sign).T, beyond, "krylov", excess)


@dataclass(frozen=True)
class _Rounding:
    """The allowance for rounding: ``unit`` is eps ||B|| ||A||, in sums of ``terms`` products."""

    unit: float
    terms: int

    def added(self, excess: float, optimum: float) -> float:
        """The excess plus the allowance; ``optimum`` is a lower bound of the optimum's error."""
        share = self.unit / optimum
        return math.sqrt((1 + excess) ** 2 + self.terms * share**2) - 1 + share


@dataclass(frozen=True, eq=False)
class _Ritz:
    """The eigenvalues of T (m,) in descending order, its eigenvectors (m, m) as columns, and
    ``coupling``, which is ``C'C`` (m, m) in their basis; all in float64.
    """

    values: Tensor
    vectors: Tensor
    coupling: Tensor

    def target(self, rank: int) -> float:
        """The eigenvalue of T that the norm of D should stay below."""
        return float(self.values[rank - 1])

    def excess(self, rank: int, norm: float, rounding: _Rounding, enough: float) -> float:
        """The bound of the module's docstring for ``d = norm``, minimised over a few x.

        The search ends at the first bound that is at most ``enough``.
        """
        trailing = float(self.values[rank:].sum())
        if trailing <= 0 or norm == math.inf:
            return math.inf
        best = math.inf
        for ceiling in (1.0, 1.1, 1.5, 3.0):
            level = ceiling * max(self.target(rank), 1.05 * norm)
            gap = self._gap(rank, level, level - norm)
            excess = math.sqrt(1 + gap / trailing) - 1
            best = min(best, rounding.added(excess, math.sqrt(trailing)))
            if best <= enough:
                break
        return best

    def _gap(self, rank: int, level: float, x: float) -> float:
        """The ``gap`` of the module's docstring: how much larger the leading squared singular
        values can be than those of T, with ``level = d + x``.
        """
        if x <= torch.finfo(torch.float64).eps * float(self.values[0]):
            return math.inf
        raised = torch.linalg.eigvalsh(torch.diag(self.values) + self.coupling / x).flip(0)
        terms = raised[:rank].clamp_min(level) - self.values[:rank]
        return float(terms.clamp_min(0).sum())
