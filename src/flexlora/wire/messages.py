"""Downloads and uploads as bytes and back.

The modules of the adapters that a download sends besides its first one are named
``<section>/<module>``; ``adapters`` gives the format of the bytes. Every field of a header is
checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Download, Upload
from flexlora.wire.adapters import decode, encode, open_file

LARGEST_FACT = 1e15


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


def decode_download(data: bytes) -> Download:
    """A download from bytes. Raises ProtocolError for anything else."""
    return _download(*decode(data))


def open_download(path: Path) -> Download:
    """A download from a file, its modules read on look-up. Raises ProtocolError."""
    return _download(*open_file(path))


def _download(adapter: Adapter, header: Mapping[str, Any]) -> Download:
    _expect(header, "download")
    factors, rate = header.get("factors", "BA"), header.get("learning_rate_factor", 1.0)
    if factors not in ("BA", "B", "A") or type(rate) not in (int, float) or not 0 < rate < 1e6:
        raise ProtocolError(f"The download is to train factors {factors!r} at a rate of {rate!r}.")
    rounds = header.get("base_rounds", [])
    if not isinstance(rounds, list) or any(type(round) is not int or round < 1 for round in rounds):
        raise ProtocolError(f"The download's base_rounds {str(rounds)[:30]!r} are no rounds.")
    ranks, ints = header.get("ranks", {}), header.get("ints", {})
    for name, table, least in (("ranks", ranks, 0), ("ints", ints, -math.inf)):
        if not isinstance(table, dict) or any(
            type(n) is not int or n < least for n in table.values()
        ):
            raise ProtocolError(f"The download's {name} are not a table of whole numbers.")
    sections = _sections(adapter)
    updates, aux = {}, {}
    for name in sections.keys() - {"", "frozen"}:
        kind, _, rest = name.partition(" ")
        if kind == "update" and rest.isdecimal():
            updates[int(rest)] = sections[name]
        elif kind == "aux":
            aux[rest] = sections[name]
        else:
            raise ProtocolError(f"The download has an unknown section {name[:40]!r}.")
    trained = sections.get("", Adapter({}))
    return Download(
        trained,
        frozen=sections.get("frozen"),
        base_updates=dict(sorted(updates.items())),
        base_rounds=tuple(rounds),
        factors=factors,
        learning_rate_factor=float(rate),
        component_ids=_component_ids(header, trained),
        ranks=ranks,
        aux=aux,
        ints=ints,
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


def open_upload(path: Path) -> Upload:
    """An upload from a file, its modules read on look-up.

    Raises:
        ProtocolError: the file is not an upload, or a field of its header has a wrong type.
    """
    adapter, header = open_file(path)
    _expect(header, "upload")
    fields = {"client": str, "round": int, "examples": int, "facts": dict}
    for name, kind in fields.items():
        if type(header.get(name)) is not kind:
            raise ProtocolError(
                f"{path}: the upload's {name!r} is {header.get(name)!r}, not a {kind.__name__}."
            )
    for name, value in header["facts"].items():
        if type(value) not in (int, float) or not abs(value) <= LARGEST_FACT:
            raise ProtocolError(f"{path}: the upload's fact {name[:40]!r} is no usable number.")
    sections = _sections(adapter)
    strange = [name for name in sections if name and not name.startswith("aux ")]
    if strange:
        raise ProtocolError(f"{path}: the upload has an unknown section {strange[0][:40]!r}.")
    trained = sections.pop("", Adapter({}))
    return Upload(
        header["client"],
        header["round"],
        trained,
        header["examples"],
        header["facts"],
        _component_ids(header, trained),
        {name.removeprefix("aux "): adapter for name, adapter in sections.items()},
    )


def encode_private(adapters: Mapping[str, Adapter]) -> bytes:
    """Adapters that a client keeps, by name, as bytes; in float32."""
    return encode(_joined(adapters), {"kind": "private"}, torch.float32)


def open_private(path: Path) -> dict[str, Adapter]:
    """What ``encode_private`` has written, modules read when they are asked for.

    Raises:
        ProtocolError: the file holds something else.
    """
    adapter, header = open_file(path)
    _expect(header, "private")
    return _sections(adapter)


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


def _component_ids(header: Mapping[str, Any], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The numbers of the adapter's components: one for each of every module, or none at all.

    Raises:
        ProtocolError: they are anything else than that.
    """
    ids = header.get("component_ids", {})
    if not isinstance(ids, dict) or (ids and ids.keys() != set(adapter)):
        raise ProtocolError("The header's component_ids do not name the modules that travel.")
    for module, numbers in ids.items():
        whole = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        if not whole or len(set(numbers)) != len(numbers) or any(n < 0 for n in numbers):
            raise ProtocolError(
                f"The component_ids of module {module[:80]!r} are not distinct numbers."
            )
        if len(numbers) != adapter.rank(module):
            raise ProtocolError(
                f"Module {module[:80]!r} has {adapter.rank(module)} components but "
                f"{len(numbers)} component_ids."
            )
    return {module: tuple(numbers) for module, numbers in ids.items()}


def _expect(header: Mapping[str, Any], kind: str) -> None:
    if header.get("kind") != kind:
        raise ProtocolError(f"Expected a message of kind {kind!r}, not {header.get('kind')!r}.")
