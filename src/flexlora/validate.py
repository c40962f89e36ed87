"""Checks on what clients send, before any of it reaches an aggregate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora.method import Client, Upload

TRAVELS = (torch.float32, torch.bfloat16, torch.float16)
"""The kinds of numbers that adapters travel in."""


def upload(
    upload: Upload,
    client: Client,
    round: int,
    shapes: Mapping[str, tuple[int, int]],
    most_examples: int | None = None,
    whole_rank: bool = False,
) -> None:
    """Refuse an upload that is not what ``client`` was asked for in this round.

    It must name this client and round, hold exactly the modules of ``shapes`` (out, in), none
    above the client's rank (with ``whole_rank`` exactly of it), all finite and of a kind
    that travels, and count at least one example. Reads every tensor once.

    Raises:
        ValueError: with the module and the value that is wrong.
    """
    place = f"The upload of client {client.id!r} for round {round}"
    if (upload.client, upload.round) != (client.id, round):
        raise ValueError(f"{place} says it is of {upload.client!r}, round {upload.round}.")
    if upload.examples < 1 or (most_examples and upload.examples > most_examples):
        raise ValueError(f"{place} counts {upload.examples} examples.")
    missing, strange = (
        shapes.keys() - upload.adapter.keys(),
        upload.adapter.keys() - shapes.keys(),
    )
    if missing or strange:
        raise ValueError(
            f"{place} lacks {sorted(missing)[:3]} and has unexpected {sorted(strange)[:3]}."
        )
    for module, factors in upload.adapter.items():
        if factors.shape != tuple(shapes[module]):
            raise ValueError(
                f"{place}: module {module!r} is {factors.shape} (out, in), not {shapes[module]}."
            )
        if factors.B.dtype not in TRAVELS:
            raise ValueError(f"{place}: module {module!r} is {factors.B.dtype}, not of {TRAVELS}.")
        least = client.ranks[module] if whole_rank else 1
        if not least <= factors.rank <= client.ranks[module]:
            raise ValueError(
                f"{place}: module {module!r} has rank {factors.rank}; this client's rank "
                f"is {client.ranks[module]}."
            )
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise ValueError(f"{place}: module {module!r} holds NaN or infinity.")
