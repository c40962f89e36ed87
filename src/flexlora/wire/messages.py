"""Downloads and uploads as bytes and back.

The modules of the adapters that a download sends besides its first one are named
``<section>/<module>``; ``adapters`` gives the format of the bytes. Every field of a header is
checked before it is used.
"""

from __future__ import annotations

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
    """A download as bytes; fields with their default value take none."""
    sections = {"": download.adapter}
    if download.rest is not None:
        sections["rest"] = download.rest
    sections |= {f"merge {round}": adapter for round, adapter in download.merge.items()}
    sections |= {f"extra {name}": adapter for name, adapter in download.extra.items()}
    header: dict[str, Any] = {"kind": "download"}
    if download.halves != "BA":
        header["halves"] = download.halves
    if download.rate != 1:
        header["rate"] = download.rate
    if download.held:
        header["held"] = list(download.held)
    if download.facts:
        header["numbers"] = dict(download.facts)
    return encode(_joined(sections), {**header, **_told(download.terms)}, dtype, sparse)


def decode_download(data: bytes) -> Download:
    """A download from bytes. Raises ProtocolError for anything else."""
    return _download(*decode(data))


def open_download(path: Path) -> Download:
    """A download from a file, its modules read on look-up. Raises ProtocolError."""
    return _download(*open_file(path))


def _download(adapter: Adapter, header: Mapping[str, Any]) -> Download:
    _expect(header, "download")
    halves, rate = header.get("halves", "BA"), header.get("rate", 1.0)
    if halves not in ("BA", "B", "A") or type(rate) not in (int, float) or not 0 < rate < 1e6:
        raise ProtocolError(f"The download asks for halves {halves!r} at rate {rate!r}.")
    held = header.get("held", [])
    if not isinstance(held, list) or any(type(round) is not int or round < 1 for round in held):
        raise ProtocolError(f"The download says that rounds {str(held)[:30]!r} are merged already.")
    numbers = header.get("numbers", {})
    if not isinstance(numbers, dict) or any(type(n) is not int for n in numbers.values()):
        raise ProtocolError("The download's own numbers are no whole numbers.")
    sections = _sections(adapter)
    merge, extra = {}, {}
    for name in sections.keys() - {"", "rest"}:
        kind, _, what = name.partition(" ")
        if kind == "merge" and what.isdecimal():
            merge[int(what)] = sections[name]
        elif kind == "extra":
            extra[what] = sections[name]
        else:
            raise ProtocolError(f"The download has a section {name[:40]!r} that is not known.")
    return Download(
        sections.get("", Adapter({})),
        sections.get("rest"),
        dict(sorted(merge.items())),
        halves,
        float(rate),
        _terms(header, sections.get("", Adapter({}))),
        extra,
        numbers,
        tuple(held),
    )


def encode_upload(upload: Upload, dtype: torch.dtype, sparse: bool = False) -> bytes:
    """An upload as bytes."""
    header = {
        "kind": "upload",
        "client": upload.client,
        "round": upload.round,
        "examples": upload.examples,
        "facts": dict(upload.facts),
        **_told(upload.terms),
    }
    return encode(upload.adapter, header, dtype, sparse)


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
    facts = header["facts"]
    return Upload(
        header["client"],
        header["round"],
        adapter,
        header["examples"],
        facts,
        _terms(header, adapter),
    )


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
    return {section: Adapter(_Section(adapter, keys)) for section, keys in names.items()}


@dataclass(frozen=True)
class _Section(Mapping[str, Factors]):
    """Some modules of an adapter under other names: ``names`` maps these to the adapter's."""

    adapter: Adapter
    names: Mapping[str, str]

    def __getitem__(self, module: str) -> Factors:
        return self.adapter[self.names[module]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _told(terms: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The header entry for the numbers of terms; empty if there are none."""
    return {"terms": {m: list(chosen) for m, chosen in terms.items()}} if terms else {}


def _terms(header: Mapping[str, Any], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The numbers of the adapter's terms: one for every term of every module, or none at all.

    Raises:
        ProtocolError: the header has anything else.
    """
    terms = header.get("terms", {})
    if not isinstance(terms, dict) or (terms and terms.keys() != set(adapter)):
        raise ProtocolError("The header's terms are not those of the modules sent.")
    for module, chosen in terms.items():
        whole = isinstance(chosen, list) and all(type(term) is int for term in chosen)
        if not whole or len(set(chosen)) != len(chosen) or any(term < 0 for term in chosen):
            raise ProtocolError(f"The terms of module {module[:80]!r} are not distinct numbers.")
        if len(chosen) != adapter[module].rank:
            raise ProtocolError(
                f"Module {module[:80]!r} has {adapter[module].rank} terms but numbers for "
                f"{len(chosen)}."
            )
    return {module: tuple(chosen) for module, chosen in terms.items()}


def _expect(header: Mapping[str, Any], kind: str) -> None:
    if header.get("kind") != kind:
        raise ProtocolError(f"Expected a message of kind {kind!r}, not {header.get('kind')!r}.")
