"""Adapters as bytes: what travels between server and client, and what it weighs.

The form is safetensors with tensors ``<module>.A`` and ``<module>.B`` and one JSON header
under the metadata key ``flexlora``. Adapters that travel beside the first have their modules
named ``<section>/<module>``. A tensor of bytes is one of many zeros, as ``sparse`` packs it: the
header says its shape and the numbers' dtype. Nothing else is ever parsed from the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Download, Upload
from flexlora.wire.sparse import FLOATS, Form, forms, thinned, unpacked

FORMAT = 2
"""Raised whenever messages change: 1 was that of flexlora before its interface for methods."""
NUMBER_CHARACTERS = 25
"""What every fact takes in a header: a clock's digits must not change a message's length."""
LARGEST_FACT = 1e15

DTYPES = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
"""What safetensors calls the dtypes that are read; which of them are welcome, others decide."""


def encode(
    adapter: Adapter, header: Mapping[str, Any], dtype: torch.dtype, sparse: bool = False
) -> bytes:
    """The adapter and a JSON header as bytes; the same input always gives the same bytes.

    With ``sparse`` every tensor that is smaller without its zeros travels without them.
    """
    tensors = {}
    for module, factors in adapter.items():
        tensors[f"{module}.A"] = factors.A.detach().to(dtype).contiguous()
        tensors[f"{module}.B"] = factors.B.detach().to(dtype).contiguous()
    if sparse:
        tensors, said = thinned(tensors, dtype)
        header = {**header, **said}
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True, allow_nan=False)
    facts = header.get("facts", {}).values()
    text += " " * sum(NUMBER_CHARACTERS - len(json.dumps(value)) for value in facts)
    return safetensors.torch.save(tensors, metadata={"flexlora": text})


def decode(data: bytes) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, in the dtype it travelled in, and the header.

    Raises:
        ProtocolError: the bytes are not what ``encode`` makes.
    """
    header = _header(data[: 8 + _header_length(data)])
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:
        raise ProtocolError(f"The bytes received are no adapter: {error}.") from error
    halves = _halves(tensors, "the bytes received")
    for name, form in forms(header, {n: (t.dtype, t.shape) for n, t in tensors.items()}).items():
        tensors[name] = unpacked(tensors[name], *form, name)
    return (
        Adapter({m: Factors(tensors[f"{m}.B"], tensors[f"{m}.A"]) for m in halves}),
        header,
    )


@dataclass(frozen=True)
class _Stored(Mapping[str, Factors]):
    """Modules in a file, read one at a time; nothing stays in memory."""

    path: Path
    tensors: Mapping[str, _Place]
    names: tuple[str, ...]
    sparse: Mapping[str, Form]

    def __getitem__(self, module: str) -> Factors:
        with self.path.open("rb") as file:
            return Factors(self._read(f"{module}.B", file), self._read(f"{module}.A", file))

    def rank(self, module: str) -> int:
        """The rank of a module, from the header."""
        name = f"{module}.A"
        shape = self.sparse[name][0] if name in self.sparse else self.tensors[name].shape
        return int(shape[0])

    def _read(self, name: str, file: BinaryIO) -> Tensor:
        data = self.tensors[name].read(file)
        return unpacked(data, *self.sparse[name], name) if name in self.sparse else data

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def stored_at(adapter: Adapter) -> Path | None:
    """The file that an adapter is read from; None if it is in memory."""
    return adapter.modules.path if isinstance(adapter.modules, _Stored) else None


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file that safetensors has found sound."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    bytes: int

    def read(self, file: BinaryIO) -> Tensor:
        """The tensor; without a map of the file, whose pages would count as memory used."""
        file.seek(self.first)
        data = bytearray(file.read(self.bytes))
        if len(data) != self.bytes:
            raise ProtocolError(f"{file.name} was cut off while it was in use.")
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


def open_file(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """As ``decode``, of a file whose modules are read when they are asked for.

    The header is checked and read once: opening the file anew for each module would parse
    all of it each time.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("flexlora")
            keys = list(file.keys())
        tensors = _places(path)
    except Exception as error:
        raise ProtocolError(f"{path} is no stored adapter: {error}.") from error
    names, header = tuple(_halves(keys, str(path))), _checked(text)
    sparse = forms(header, {name: (p.dtype, p.shape) for name, p in tensors.items()})
    return Adapter(_Stored(path, tensors, names, sparse)), header


def _places(path: Path) -> dict[str, _Place]:
    """Every tensor of a safetensors file by its name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: _Place(
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


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
    """A download from a file, its modules read when they are asked for."""
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
    """An upload from a file, its modules read when they are asked for.

    Raises:
        ProtocolError: the file is no upload, or a field of its header is ill-typed.
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
    """Several adapters as one, their modules under the sections' names."""
    return Adapter(
        {
            f"{name}/{module}" if name else module: factors
            for name, adapter in sections.items()
            for module, factors in adapter.items()
        }
    )


def _sections(adapter: Adapter) -> dict[str, Adapter]:
    """What ``_joined`` joined; modules are still read when they are asked for."""
    names: dict[str, dict[str, str]] = {}
    for key in adapter:
        section, _, module = key.rpartition("/")
        names.setdefault(section, {})[module] = key
    return {section: Adapter(_Section(adapter, keys)) for section, keys in names.items()}


@dataclass(frozen=True)
class _Section(Mapping[str, Factors]):
    """Some modules of an adapter under names of their own."""

    whole: Adapter
    keys_: Mapping[str, str]

    def __getitem__(self, module: str) -> Factors:
        return self.whole[self.keys_[module]]

    def rank(self, module: str) -> int:
        """The rank of a module, not read from the file."""
        return self.whole.rank(self.keys_[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


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


def _header_length(data: bytes) -> int:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ProtocolError(
            f"The {len(data)} bytes received are no adapter: their header is cut off."
        )
    return length


def _header(head: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(head[8:])["__metadata__"]
        text = metadata["flexlora"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError("The bytes received carry no flexlora header.") from error
    return _checked(text)


def _checked(text: str | None) -> dict[str, Any]:
    try:
        header = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The adapter's flexlora header is no JSON.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        said = header.get("format") if isinstance(header, dict) else None
        raise ProtocolError(
            f"The adapter's header is of format {said!r}; this version "
            f"reads format {FORMAT}. Run the same version of flexlora on both sides."
        )
    return header


def _expect(header: Mapping[str, Any], kind: str) -> None:
    if header.get("kind") != kind:
        raise ProtocolError(f"Expected a {kind}, got a {header.get('kind')!r}.")


def _halves(keys: Any, place: str) -> list[str]:
    """The module names, given that every one has both its halves."""
    names = set(keys)
    modules = sorted({key[:-2] for key in names if key[-2:] in (".A", ".B")})
    for module in modules:
        for half in ("A", "B"):
            if f"{module}.{half}" not in names:
                raise ProtocolError(f"{place}: module {module!r} has no {half}.")
    if len(names) != 2 * len(modules):
        strange = sorted(key for key in names if key[-2:] not in (".A", ".B"))
        raise ProtocolError(f"{place}: unknown tensor {strange[0]!r}.")
    return modules
