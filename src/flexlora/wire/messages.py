"""Downloads and uploads as bytes and back.

The modules of the adapters that a message sends besides its first one are named
``<section>/<module>``; ``adapters`` gives the format of the bytes. ``header`` has checked every
key and every field before it is used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexlora.lowrank import Adapter, Factors
from flexlora.method import Download, Upload
from flexlora.storage.untrusted import RefusalCode, short
from flexlora.wire.adapters import decode, encode, open_file, stored_adapter
from flexlora.wire.expected import ExpectedUpload
from flexlora.wire.header import ANY, HeaderLimits, read_header
from flexlora.wire.refused import RefusedMessage


def encode_download(download: Download, dtype: torch.dtype, sparse: bool = False) -> bytes:
    """A download as bytes; fields at their defaults take none."""
    sections = {"": download.adapter}
    if download.frozen is not None:
        sections["frozen"] = download.frozen
    sections |= {f"update {round}": adapter for round, adapter in download.base_updates.items()}
    sections |= {f"aux {name}": adapter for name, adapter in download.aux.items()}
    header: dict[str, Any] = {"kind": "download"}
    if download.factors != "BA":
        header["factors"] = download.factors
    if download.learning_rate_factor != 1:
        header["learning_rate_factor"] = download.learning_rate_factor
    if download.base_rounds:
        header["base_rounds"] = list(download.base_rounds)
    if download.ranks:
        header["ranks"] = dict(download.ranks)
    if download.ints:
        header["ints"] = dict(download.ints)
    header |= _numbered(download.component_ids)
    return encode(_joined(sections), header, dtype, sparse)


def decode_download(data: bytes, limits: HeaderLimits = ANY) -> Download:
    """A download from bytes. Raises RefusedMessage for anything else."""
    return _download(*decode(data, replace(limits, kind="download")))


def open_download(path: Path, limits: HeaderLimits = ANY) -> Download:
    """A download from a file, its modules read on look-up. Raises RefusedMessage."""
    return _download(*open_file(path, replace(limits, kind="download")))


def _download(adapter: Adapter, fields: Mapping[str, Any]) -> Download:
    sections = _sections(adapter)
    updates = {name: each for name, each in sections.items() if name.startswith("update ")}
    rounds = {int(name.removeprefix("update ")): each for name, each in updates.items()}
    trained = sections.get("", Adapter({}))
    return Download(
        trained,
        frozen=sections.get("frozen"),
        base_updates=dict(sorted(rounds.items())),
        base_rounds=tuple(fields.get("base_rounds", ())),
        factors=fields.get("factors", "BA"),
        learning_rate_factor=float(fields.get("learning_rate_factor", 1.0)),
        component_ids=_component_ids(fields, trained),
        ranks=fields.get("ranks", {}),
        aux=_beside(sections),
        ints=fields.get("ints", {}),
    )


def encode_upload(upload: Upload, dtype: torch.dtype, sparse: bool = False) -> bytes:
    """An upload as bytes."""
    header = {
        "kind": "upload",
        "client": upload.client,
        "round": upload.round,
        "examples": upload.examples,
        "facts": dict(upload.metrics),
        **_numbered(upload.component_ids),
    }
    sections = {"": upload.adapter}
    sections |= {f"aux {name}": adapter for name, adapter in upload.aux.items()}
    return encode(_joined(sections), header, dtype, sparse)


def open_upload(path: Path, expected: ExpectedUpload | None = None) -> Upload:
    """An upload from a file, its modules read on look-up.

    With ``expected`` all that can be checked without reading a tensor is checked: sizes, fields,
    modules, shapes, ranks, dtypes. None is for files that this process has written itself.

    Raises:
        RefusedMessage: the file is not an upload, or not the one that is expected.
    """
    header = read_header(path, expected.limits if expected else replace(ANY, kind="upload"))
    if expected is not None:
        expected.check(header)
    fields, sections = header.fields, _sections(stored_adapter(path, header))
    trained = sections.get("", Adapter({}))
    return Upload(
        fields["client"],
        fields["round"],
        trained,
        fields["examples"],
        fields["facts"],
        _component_ids(fields, trained),
        _beside(sections),
    )


def encode_private(adapters: Mapping[str, Adapter]) -> bytes:
    """Adapters that a client keeps, by name, as bytes; in float32."""
    return encode(_joined(adapters), {"kind": "private"}, torch.float32)


def open_private(path: Path) -> dict[str, Adapter]:
    """What ``encode_private`` has written, modules read when they are asked for.

    Raises:
        RefusedMessage: the file has something else.
    """
    return _sections(open_file(path, HeaderLimits(kind="private"))[0])


def _joined(sections: Mapping[str, Adapter]) -> Adapter:
    """Several adapters as one, their modules prefixed with the names of the sections."""
    return Adapter(
        {
            f"{name}/{module}" if name else module: factors
            for name, adapter in sections.items()
            for module, factors in adapter.items()
        }
    )


def _sections(adapter: Adapter) -> dict[str, Adapter]:
    """The adapters that ``_joined`` joined; modules are still read on look-up."""
    names: dict[str, dict[str, str]] = {}
    for key in adapter:
        section, _, module = key.rpartition("/")
        names.setdefault(section, {})[module] = key
    if names.keys() == {""}:
        return {"": adapter}  # the file's own, so that ``stored_at`` tells where it lies
    return {section: Adapter(_Section(adapter, keys)) for section, keys in names.items()}


@dataclass(frozen=True)
class _Section(Mapping[str, Factors]):
    """Some modules of an adapter under other names: ``names`` maps these to the adapter's."""

    adapter: Adapter
    names: Mapping[str, str]

    def __getitem__(self, module: str) -> Factors:
        return self.adapter[self.names[module]]

    def __contains__(self, module: object) -> bool:
        return module in self.names

    def rank(self, module: str) -> int:
        """The rank of a module, not read from the file."""
        return self.adapter.rank(self.names[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _numbered(ids: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The numbers of components as a header has them, if there are any."""
    return {"component_ids": {m: list(numbers) for m, numbers in ids.items()}} if ids else {}


def _component_ids(fields: Mapping[str, Any], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The numbers of the adapter's components: one for each of every module, or none at all.

    Raises:
        RefusedMessage: they are anything else than that.
    """
    ids = fields.get("component_ids", {})
    if ids and ids.keys() != set(adapter):
        raise RefusedMessage(
            RefusalCode.WRONG_COMPONENTS,
            "The header's component_ids do not name the modules that travel.",
        )
    for module, numbers in ids.items():
        if len(numbers) != adapter.rank(module):
            raise RefusedMessage(
                RefusalCode.WRONG_COMPONENTS,
                f"Module {short(module)} has {adapter.rank(module)} components but "
                f"{len(numbers)} component_ids.",
            )
    return {module: tuple(numbers) for module, numbers in ids.items()}


def _beside(sections: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters of a method's own, by name."""
    return {
        name.removeprefix("aux "): adapter
        for name, adapter in sections.items()
        if name.startswith("aux ")
    }
