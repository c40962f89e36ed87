"""Checks on what clients send, before any of it reaches an aggregate."""

from __future__ import annotations

import math

import torch

from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, Upload, UploadSpec, in_parallel
from flexlora.storage.untrusted import RefusalCode
from flexlora.wire.expected import (
    ExpectedUpload,
    check_components,
    check_modules,
    check_origin,
)
from flexlora.wire.header import ModuleShape
from flexlora.wire.refused import RefusedMessage

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
    and of a rank expected, all finite and of bounded norms, and count at least one example. The
    same holds for the adapters beside it. Reads every tensor once.

    For uploads in memory: of one that travelled, ``open_upload`` has checked all but the values.

    Raises:
        RefusedMessage: with the module and the value that is wrong.
    """
    whole = ExpectedUpload(client.id, round, most_examples or client.examples, expected)
    place = whole.place
    check_origin(upload.client, upload.round, upload.examples, whole, place)
    beside = {f"aux {name}": adapter for name, adapter in upload.aux.items()}
    shapes = {n: _shapes(adapter) for n, adapter in {"": upload.adapter, **beside}.items()}
    check_modules(shapes, expected, place)
    check_components(upload.component_ids, shapes[""], expected.modules, place)
    values(upload, place)


def values(upload: Upload, place: str) -> None:
    """Refuse an upload with a value that is not finite, or a factor of a norm above the limit.

    Reads every tensor once, so that one without its zeros is known to be what its header says.

    Raises:
        RefusedMessage: with the module and the value that is wrong.
    """
    beside = {f"{place}, {name!r}": adapter for name, adapter in upload.aux.items()}
    for where, adapter in {place: upload.adapter, **beside}.items():

        def check(module: str, where: str = where, adapter: Adapter = adapter) -> None:
            _check_values(module, adapter[module], where)

        in_parallel(check, list(adapter))


def _shapes(adapter: Adapter) -> dict[str, ModuleShape]:
    return {m: ModuleShape(f.shape, f.rank, f.B.dtype) for m, f in adapter.items()}


def _check_values(module: str, factors: Factors, place: str) -> None:
    if factors.B.dtype not in TRANSPORT_DTYPES:
        raise RefusedMessage(
            RefusalCode.WRONG_DTYPE,
            f"{place}: module {module!r} is {factors.B.dtype}, not one of {TRANSPORT_DTYPES}.",
        )
    # One pass: the norm is finite just where all values are, as no sum of squares is too large
    # for float64.
    sizes = [
        float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (factors.B, factors.A)
    ]
    if not all(map(math.isfinite, sizes)):
        raise RefusedMessage(
            RefusalCode.NOT_FINITE, f"{place}: module {module!r} contains NaN or infinity."
        )
    if (size := max(sizes)) > LARGEST_NORM:
        raise RefusedMessage(
            RefusalCode.TOO_LARGE,
            f"{place}: module {module!r} has a factor with the norm {size:.3g}, above the limit of "
            f"{LARGEST_NORM:g}.",
        )
