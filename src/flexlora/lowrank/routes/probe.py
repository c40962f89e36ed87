"""An upper bound, from a few products, of the norm of a matrix outside a basis.

This is not a route; the bound of ``krylov`` relies on it. With Q orthonormal and
``D = (I - Q Q') W W' (I - Q Q')``, it bounds the largest eigenvalue of D and fails with a
probability of at most 1e-9 over the probes, for every D.

A block Krylov space of D is started from p Gaussian vectors that are independent of Q (after
Kuczynski and Wozniakowski 1992). Let theta be its largest Ritz value after q products, v the
top eigenvector of D and lambda its eigenvalue, if above theta. Among the combinations of the
starting vectors is a w with
``(v'w)^2 ~ chi^2_p`` and the remaining part ``~ chi^2_{n-1}``, and ``f(D) w`` is in the space for
every polynomial f of degree q; with f the Chebyshev polynomial ``T_q`` on [0, theta] its
Rayleigh quotient gives ``(lambda/theta - 1) T_q(2 lambda/theta - 1)^2 <= chi^2_{n-1} / chi^2_p``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexlora.lowrank.svd import Matrix, times, transposed

PROBES = 32
FAILURE = 1e-9
"""The probability that the bound is too small, over the Gaussian probes."""
STEPS = 8
TINY = 1e-36
"""Numbers below it count as zero; near the smallest normal number of float32."""


def probe(matrix: Matrix, Q: Tensor, target: float, draw: torch.Generator) -> tuple[float, float]:
    """An upper bound of ``||D||_2`` and an estimate of ``trace(D)``.

    ``matrix`` is W (out, in), ``Q`` an orthonormal basis (out, m), and D is ``W W'`` outside Q.
    The iteration stops when the bound is well below ``target``, and when the Ritz value of D is
    above it, so that further steps cannot help; at most ``STEPS`` products with ``PROBES``
    columns in each direction. The trace is Hutchinson's unbiased estimate, with a relative
    standard deviation of at most sqrt(2 / PROBES).
    """
    X = outside(gaussian(Q, PROBES, draw), Q)
    ratio = _ratio(Q.shape[0])
    basis, images = Q.new_empty(Q.shape[0], 0), []
    norm, trace = math.inf, 0.0
    for degree in range(STEPS):
        block, R = torch.linalg.qr(X)
        block = torch.linalg.qr(outside(block, torch.cat([Q, basis], dim=1))).Q
        image = times(transposed(matrix), block)
        if degree == 0:
            trace = float((image @ R).double().square().sum()) / PROBES
        basis = torch.cat([basis, block], dim=1)
        images.append(image.double())
        Y = torch.cat(images, dim=1)
        theta = float(torch.linalg.eigvalsh(Y.T @ Y)[-1])
        norm = min(norm, theta * (1 + _overshoot(ratio, degree)))
        if norm <= 0.7 * target or theta > target:
            break
        # Only the span matters; dividing by the norm keeps small numbers from underflowing.
        X = times(matrix, image / torch.linalg.vector_norm(image).clamp_min(TINY))
    return norm, trace


def outside(X: Tensor, Q: Tensor) -> Tensor:
    """The part of X (out, columns) orthogonal to the orthonormal Q (out, m)."""
    return torch.addmm(X, Q, Q.T @ X, alpha=-1)


def gaussian(like: Tensor, columns: int, draw: torch.Generator) -> Tensor:
    """Standard normal numbers (rows of ``like``, columns) in the dtype and device of ``like``.

    Drawn on the CPU, so that they are equal on every device.
    """
    return torch.randn(like.shape[0], columns, generator=draw, dtype=torch.float64).to(like)


def _ratio(n: int) -> float:
    """A bound on ``chi^2_{n-1} / chi^2_p`` that fails with probability ``FAILURE`` at most.

    Chernoff below, ``P(chi^2_p <= p u) <= (u e^{1-u})^{p/2}``; Laurent and Massart above.
    """
    log = -math.log(FAILURE / 2)
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        small = u == 0 or PROBES / 2 * (math.log(u) + 1 - u) <= -log
        low, high = (u, high) if small else (low, u)
    return (n + 2 * math.sqrt(n * log) + 2 * log) / (PROBES * low)


def _overshoot(ratio: float, degree: int) -> float:
    """The eta with ``eta T_q(1 + 2 eta)^2 = ratio``: how far an eigenvalue can hide above."""
    low, high = 0.0, ratio
    for _ in range(60):
        eta = (low + high) / 2
        # In logarithms: T_q grows as a power and would overflow.
        chebyshev = degree * math.acosh(1 + 2 * eta)
        value = math.log(eta) + 2 * (chebyshev + math.log1p(math.exp(-2 * chebyshev)) - math.log(2))
        low, high = (low, eta) if value >= math.log(ratio) else (eta, high)
    return high
