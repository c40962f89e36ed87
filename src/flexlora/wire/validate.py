"""Checks of what clients send, before any of it reaches an aggregate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora.errors import ProtocolError
from flexlora.lowrank import Factors
from flexlora.method import Client, Expected, Upload

LARGEST_NORM = 1e6
"""The largest Frobenius norm of a factor.

Those of trained factors are far below; without a bound, products of finite values overflow.
"""

TRANSPORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes in which adapters are sent."""


def upload(
    upload: Upload,
    client: Client,
    round: int,
    expected: Mapping[str, Expected],
    most_examples: int | None = None,
) -> None:
    """Refuse an upload that is not what was requested from ``client`` in this round.

    It must name this client and round, contain exactly the expected modules, each with the
    expected shape and a rank in the expected range, finite and in a transport dtype, and count
    at least one and at most ``most_examples`` examples. Reads every tensor once.

    Raises:
        ProtocolError: with the module and the value that is wrong.
    """
    place = f"The upload of client {client.id!r} for round {round}"
    if (upload.client, upload.round) != (client.id, round):
        raise ProtocolError(f"{place} names client {upload.client!r}, round {upload.round}.")
    if upload.examples < 1 or (most_examples and upload.examples > most_examples):
        raise ProtocolError(f"{place} counts {upload.examples} examples.")
    missing = expected.keys() - upload.adapter.keys()
    unexpected = upload.adapter.keys() - expected.keys()
    if missing or unexpected:
        raise ProtocolError(
            f"{place} lacks {sorted(missing)[:3]} and has unexpected {sorted(unexpected)[:3]}."
        )
    _check_terms(upload, expected, place)
    for module, factors in upload.adapter.items():
        _check_factors(factors, expected[module], f"{place}: module {module!r}")


def _check_factors(factors: Factors, expected: Expected, place: str) -> None:
    if factors.shape != tuple(expected.shape):
        raise ProtocolError(f"{place} is {factors.shape} (out, in), not {expected.shape}.")
    if factors.B.dtype not in TRANSPORT_DTYPES:
        raise ProtocolError(f"{place} is {factors.B.dtype}, not one of {TRANSPORT_DTYPES}.")
    if not expected.least <= factors.rank <= expected.most:
        raise ProtocolError(
            f"{place} has rank {factors.rank}; this client's rank is {expected.most}."
        )
    if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
        raise ProtocolError(f"{place} contains NaN or infinity.")
    norm = max(float(factor.double().norm()) for factor in (factors.B, factors.A))
    if norm > LARGEST_NORM:
        raise ProtocolError(
            f"{place} has a factor with the norm {norm:.3g}, above the limit of {LARGEST_NORM:g}."
        )


def _check_terms(upload: Upload, expected: Mapping[str, Expected], place: str) -> None:
    """Terms must be numbered exactly where the method numbers them, with one valid number each."""
    numbered = {module for module, each in expected.items() if each.terms is not None}
    if upload.terms.keys() != numbered:
        raise ProtocolError(
            f"{place} numbers the terms of {len(upload.terms)} modules, not of the "
            f"{len(numbered)} whose numbers the method requests."
        )
    for module in numbered:
        terms, most = upload.terms[module], expected[module].terms or 0
        valid = all(type(term) is int and 0 <= term < most for term in terms)
        complete = len(set(terms)) == len(terms) == upload.adapter[module].rank
        if not valid or not complete:
            raise ProtocolError(
                f"{place}: module {module!r} numbers its terms {list(terms)[:8]}, which are not "
                f"{upload.adapter[module].rank} different ones of {most}."
            )
