"""Checks on what clients send, before any of it reaches an aggregate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, ModuleSpec, Upload, UploadSpec

LARGEST_NORM = 1e6
"""Of a factor. Trained ones are far below; finite numbers without bound overflow in products."""

TRANSPORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that adapters may travel in."""


def upload(
    upload: Upload,
    client: Client,
    round: int,
    expected: UploadSpec,
    most_examples: int | None = None,
) -> None:
    """Refuse an upload that is not what ``client`` has to send in this round.

    It must name this client and round, hold exactly the modules expected, each of the shape
    and of a rank expected, all finite and of a dtype that may travel, and count at least one
    example. The same holds for the adapters beside it. Reads every tensor once.

    Raises:
        ProtocolError: with the module and the value that is wrong.
    """
    place = f"The upload of client {client.id!r} for round {round}"
    if (upload.client, upload.round) != (client.id, round):
        raise ProtocolError(f"{place} names client {upload.client!r}, round {upload.round}.")
    if upload.examples < 1 or (most_examples and upload.examples > most_examples):
        raise ProtocolError(f"{place} counts {upload.examples} examples.")
    if upload.aux.keys() != expected.aux.keys():
        raise ProtocolError(
            f"{place} has {sorted(upload.aux)[:3]} beside it, not {sorted(expected.aux)}."
        )
    adapters = [(upload.adapter, expected.modules, place)]
    adapters += [
        (upload.aux[name], specs, f"{place}, {name!r}") for name, specs in expected.aux.items()
    ]
    for adapter, specs, where in adapters:
        _check_modules(adapter, specs, where)
    _check_component_ids(upload, expected.modules, place)
    for adapter, specs, where in adapters:
        for module, factors in adapter.items():
            _check_factors(module, factors, specs[module], where)


def _check_modules(adapter: Adapter, specs: Mapping[str, ModuleSpec], place: str) -> None:
    missing, unexpected = specs.keys() - adapter.keys(), adapter.keys() - specs.keys()
    if missing or unexpected:
        raise ProtocolError(
            f"{place} lacks {sorted(missing)[:3]} and has unexpected {sorted(unexpected)[:3]}."
        )


def _check_factors(module: str, factors: Factors, spec: ModuleSpec, place: str) -> None:
    if factors.shape != tuple(spec.shape):
        raise ProtocolError(
            f"{place}: module {module!r} is {factors.shape} (out, in), not {spec.shape}."
        )
    if factors.B.dtype not in TRANSPORT_DTYPES:
        raise ProtocolError(
            f"{place}: module {module!r} is {factors.B.dtype}, not one of {TRANSPORT_DTYPES}."
        )
    if not spec.min_rank <= factors.rank <= spec.max_rank:
        raise ProtocolError(
            f"{place}: module {module!r} has rank {factors.rank}; this client's rank is "
            f"{spec.max_rank}."
        )
    if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
        raise ProtocolError(f"{place}: module {module!r} contains NaN or infinity.")
    size = max(float(factor.double().norm()) for factor in (factors.B, factors.A))
    if size > LARGEST_NORM:
        raise ProtocolError(
            f"{place}: module {module!r} has a factor with the norm {size:.3g}, above "
            f"{LARGEST_NORM:g}."
        )


def _check_component_ids(upload: Upload, specs: Mapping[str, ModuleSpec], place: str) -> None:
    """Components must be numbered just where the method numbers them: distinct, in range."""
    numbered = {module for module, spec in specs.items() if spec.components is not None}
    if upload.component_ids.keys() != numbered:
        raise ProtocolError(
            f"{place} numbers the components of {len(upload.component_ids)} modules, not of the "
            f"{len(numbered)} for which the method needs it."
        )
    for module in numbered:
        ids, count = upload.component_ids[module], specs[module].components or 0
        in_range = all(type(number) is int and 0 <= number < count for number in ids)
        if not in_range or not len(set(ids)) == len(ids) == upload.adapter.rank(module):
            raise ProtocolError(
                f"{place}: module {module!r} numbers its components {list(ids)[:8]}, which are not "
                f"{upload.adapter.rank(module)} different numbers below {count}."
            )
