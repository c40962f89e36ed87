"""Laws of messages: their size, what the server accepts, and the way over the wire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from flexlora import wire
from flexlora.errors import FlexloraError
from flexlora.laws.case import Case, Violation, is_equal, require
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Feature, Upload
from flexlora.wire import validate


def bytes_are_parameters(case: Case) -> None:
    """A message's length beside its header is four bytes for each parameter that it carries."""
    sparse = Feature.SPARSE_MESSAGES in case.method.features
    for client, upload in zip(case.clients, case.uploads, strict=True):
        download = case.method.handout(case.state, client, case.context)
        adapters = [download.adapter, *download.base_updates.values(), *download.aux.values()]
        adapters += [download.frozen] if download.frozen else []
        down = sum(adapter.parameters for adapter in adapters)
        up = sum(adapter.parameters for adapter in (upload.adapter, *upload.aux.values()))
        for data, count in (
            (wire.encode_download(download, torch.float32, sparse), down),
            (wire.encode_upload(upload, torch.float32, sparse), up),
        ):
            body = len(data) - 8 - int.from_bytes(data[:8], "little")
            fits = body <= 4 * count if sparse else body == 4 * count
            require(fits, f"a message of {count} parameters has {body} bytes")


def only_the_expected_is_accepted(case: Case) -> None:
    """An upload passes validation; one of other ranks, shapes or modules does not."""
    for client, upload in zip(case.clients, case.uploads, strict=True):
        expected = case.method.upload_spec(case.state, client, case.context)
        sent = replace(
            upload,
            adapter=upload.adapter.to(torch.float32),
            aux={name: adapter.to(torch.float32) for name, adapter in upload.aux.items()},
        )
        validate.upload(sent, client, 3, expected, client.examples)
        for change in (_larger, _wider, _fewer_modules):
            wrong = replace(sent, adapter=change(sent.adapter))
            try:
                validate.upload(wrong, client, 3, expected, client.examples)
            except FlexloraError:
                continue
            raise Violation(f"an upload that is{change.__name__.replace('_', ' ')} is accepted")


def _larger(adapter: Adapter) -> Adapter:
    return Adapter(
        {
            m: Factors(
                torch.cat([f.B, f.B.new_ones(f.B.shape[0], 40)], 1),
                torch.cat([f.A, f.A.new_ones(40, f.A.shape[1])], 0),
            )
            for m, f in adapter.items()
        }
    )


def _wider(adapter: Adapter) -> Adapter:
    return Adapter(
        {
            m: Factors(torch.cat([f.B, f.B.new_ones(f.B.shape[0] + 1, f.rank)]), f.A)
            for m, f in adapter.items()
        }
    )


def _fewer_modules(adapter: Adapter) -> Adapter:
    return adapter.only(list(adapter)[1:])


def an_upload_survives_the_wire(case: Case) -> None:
    """To the bit, with its component ids and what travels beside it."""
    for number, upload in enumerate(case.uploads):
        received = sent(upload, case.folder / str(number), torch.float64)
        ids = {m: tuple(numbers) for m, numbers in upload.component_ids.items()}
        require(received.component_ids == ids, "the component ids differ")
        require(received.aux.keys() == upload.aux.keys(), "what travels beside it differs")
        for module, f in upload.adapter.items():
            require(is_equal(received.adapter[module], f), f"{module} differs")
            require(received.adapter.rank(module) == f.rank, f"{module} has another rank")


def sent(upload: Upload, path: Path, dtype: torch.dtype) -> Upload:
    """The upload after its way over the wire to a file at ``path``."""
    path.write_bytes(wire.encode_upload(upload, dtype))
    return wire.open_upload(path)
