"""Checks on what clients send, before any of it reaches an aggregate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora.errors import ProtocolError
from flexlora.method import Client, Expected, Upload

LARGEST_NORM = 1e6
"""Of a factor. Trained ones are far below; finite numbers without bound overflow in products."""

TRAVELS = (torch.float32, torch.bfloat16, torch.float16)
"""The kinds of numbers that adapters travel in."""


def upload(
    upload: Upload,
    client: Client,
    round: int,
    expected: Mapping[str, Expected],
    most_examples: int | None = None,
) -> None:
    """Refuse an upload that is not what ``client`` was asked for in this round.

    It must name this client and round, hold exactly the modules expected, each of the shape
    and of a rank expected, all finite and of a kind that travels, and count at least one
    example. Reads every tensor once.

    Raises:
        ProtocolError: with the module and the value that is wrong.
    """
    place = f"The upload of client {client.id!r} for round {round}"
    if (upload.client, upload.round) != (client.id, round):
        raise ProtocolError(f"{place} says it is of {upload.client!r}, round {upload.round}.")
    if upload.examples < 1 or (most_examples and upload.examples > most_examples):
        raise ProtocolError(f"{place} counts {upload.examples} examples.")
    missing, strange = (
        expected.keys() - upload.adapter.keys(),
        upload.adapter.keys() - expected.keys(),
    )
    if missing or strange:
        raise ProtocolError(
            f"{place} lacks {sorted(missing)[:3]} and has unexpected {sorted(strange)[:3]}."
        )
    _check_terms(upload, expected, place)
    for module, factors in upload.adapter.items():
        wanted = expected[module]
        if factors.shape != tuple(wanted.shape):
            raise ProtocolError(
                f"{place}: module {module!r} is {factors.shape} (out, in), not {wanted.shape}."
            )
        if factors.B.dtype not in TRAVELS:
            raise ProtocolError(
                f"{place}: module {module!r} is {factors.B.dtype}, not of {TRAVELS}."
            )
        if not wanted.least <= factors.rank <= wanted.most:
            raise ProtocolError(
                f"{place}: module {module!r} has rank {factors.rank}; this client's rank "
                f"is {wanted.most}."
            )
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise ProtocolError(f"{place}: module {module!r} holds NaN or infinity.")
        size = max(float(half.double().norm()) for half in (factors.B, factors.A))
        if size > LARGEST_NORM:
            raise ProtocolError(
                f"{place}: a factor of module {module!r} has the norm {size:.3g}; at most "
                f"{LARGEST_NORM:g} is taken."
            )


def _check_terms(upload: Upload, expected: Mapping[str, Expected], place: str) -> None:
    """Terms must be numbered just where the method numbers them, one for each, all known."""
    numbered = {module for module, wanted in expected.items() if wanted.terms is not None}
    if upload.terms.keys() != numbered:
        raise ProtocolError(
            f"{place} numbers the terms of {len(upload.terms)} modules, not of the "
            f"{len(numbered)} for which the method asks it."
        )
    for module in numbered:
        terms, most = upload.terms[module], expected[module].terms or 0
        known = all(type(term) is int and 0 <= term < most for term in terms)
        whole = len(set(terms)) == len(terms) == upload.adapter[module].rank
        if not known or not whole:
            raise ProtocolError(
                f"{place}: module {module!r} numbers its terms {list(terms)[:8]}, which are not "
                f"{upload.adapter[module].rank} different ones of {most}."
            )
