"""Bad uploads by name, each made from a good one, with the code with which it must be refused.

``BAD`` has them by the method of the good upload: "plain" ones fit any method that sends both
factors, the others are of methods that send more. Each changes one thing, unless its name says so.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flexlora.storage.untrusted import RefusalCode as Code

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass
class Parts:
    """An upload taken apart: tensors as (dtype, shape, bytes) by name, and its own header."""

    tensors: dict[str, tuple[Any, Any, bytes]]
    fields: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> Parts:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        fields = json.loads(header.pop("__metadata__")["flexlora"])
        tensors = {
            name: (e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]])
            for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
        return cls(tensors, fields)

    def header(self) -> dict[str, Any]:
        """The header with offsets that fit the tensors."""
        text = json.dumps(self.fields)
        header: dict[str, Any] = {"__metadata__": {"flexlora": text, **self.metadata}}
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            offsets = [end, end := end + len(data)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        return header

    @property
    def body(self) -> bytes:
        return b"".join(data for _, _, data in self.tensors.values())

    @property
    def names(self) -> list[str]:
        return sorted(name for name in self.tensors if "/" not in name)

    @property
    def A(self) -> str:
        return self.names[0]

    @property
    def B(self) -> str:
        return self.names[1]

    @property
    def module(self) -> str:
        return self.A[:-2]

    def array(self, name: str) -> np.ndarray:
        dtype, shape, data = self.tensors[name]
        assert dtype == "F32"
        return np.frombuffer(data, np.float32).reshape(shape).copy()

    def put(self, name: str, dtype: str, shape: Any, data: bytes | None = None) -> None:
        """Replace or add a tensor; of zeros, if no data is given."""
        count = math.prod(shape) * SIZES.get(dtype, 4) if data is None else 0
        self.tensors[name] = (dtype, shape, bytes(count) if data is None else data)

    def put_array(self, name: str, array: np.ndarray) -> None:
        self.tensors[name] = ("F32", list(array.shape), array.astype(np.float32).tobytes())


def framed(header: str | bytes, body: bytes = b"") -> bytes:
    """A safetensors file with this text as its header."""
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + body


def built(parts: Parts) -> bytes:
    return framed(json.dumps(parts.header(), separators=(",", ":")), parts.body)


Make = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Bad:
    code: Code
    make: Make


BAD: dict[str, dict[str, Bad]] = {"plain": {}, "sparse": {}, "numbered": {}, "aux": {}}


def bad(group: str, name: str, code: Code, make: Make) -> None:
    assert name not in BAD[group], name
    BAD[group][name] = Bad(code, make)


def edited(change: Callable[[Parts], Any]) -> Make:
    """A change of the parts, with offsets that fit afterwards."""

    def make(good: bytes) -> bytes:
        parts = Parts.of(good)
        change(parts)
        return built(parts)

    return make


def _no_room(change: Callable[[Parts], Any]) -> Make:
    """A change for which another module makes room, so that the size is not what is wrong."""

    def edit(parts: Parts) -> None:
        for name in parts.names[4:8]:
            del parts.tensors[name]
        change(parts)

    return edited(edit)


def in_header(change: Callable[[dict[str, Any], Parts], Any]) -> Make:
    """A change of the header alone; the body stays."""

    def make(good: bytes) -> bytes:
        parts = Parts.of(good)
        header = copy.deepcopy(parts.header())
        change(header, parts)
        return framed(json.dumps(header, separators=(",", ":")), parts.body)

    return make


def in_text(change: Callable[[str, Parts], str | bytes]) -> Make:
    """A change of the header's text; the body stays."""

    def make(good: bytes) -> bytes:
        parts = Parts.of(good)
        return framed(change(json.dumps(parts.header(), separators=(",", ":")), parts), parts.body)

    return make


def own_text(text: str | Callable[[Parts], str]) -> Make:
    """The flexlora header replaced by a text."""

    def make(good: bytes) -> bytes:
        parts = Parts.of(good)
        header = parts.header()
        header["__metadata__"]["flexlora"] = text if isinstance(text, str) else text(parts)
        return framed(json.dumps(header, separators=(",", ":")), parts.body)

    return make


def with_field(name: str, value: Any) -> Make:
    return edited(lambda p: p.fields.update({name: value}))


def without_field(name: str) -> Make:
    return edited(lambda p: p.fields.pop(name))


def with_fact(name: str, value: Any) -> Make:
    return edited(lambda p: p.fields["facts"].update({name: value}))


def field_text(name: str, text: str) -> Make:
    """A field whose value is a text of JSON that ``json`` would not write."""
    marker = "MARKER"

    def change(parts: Parts) -> str:
        return json.dumps({**parts.fields, name: marker}).replace(f'"{marker}"', text)

    return own_text(change)


def entry(change: Callable[[dict[str, Any]], Any]) -> Make:
    """A change of the first tensor's entry in the header."""
    return in_header(lambda header, parts: change(header[parts.A]))


def renamed(name: Callable[[str], str], which: int = 0) -> Make:
    """The first module under another name."""

    def change(parts: Parts) -> None:
        module = parts.names[2 * which][:-2]
        for factor in "AB":
            parts.tensors[name(module) + f".{factor}"] = parts.tensors.pop(f"{module}.{factor}")

    return edited(change)


def values(name: str, change: Callable[[np.ndarray], Any]) -> Make:
    """A change of the values of the first module's factor ``name``."""

    def edit(parts: Parts) -> None:
        key = parts.A if name == "A" else parts.B
        array = parts.array(key)
        parts.put_array(key, array if (new := change(array)) is None else new)

    return edited(edit)


# --- not a message at all ------------------------------------------------------------------


class _Boom:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (exec, ("raise SystemExit('pickled code ran')",))


def _zip(good: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", good)
    return file.getvalue()


def _saved(save: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _tar(good: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = len(good)
        archive.addfile(info, io.BytesIO(good))
    return file.getvalue()


NO_MESSAGE: dict[str, tuple[Code, Make]] = {
    "nothing": (Code.CUT_OFF, lambda good: b""),
    "seven bytes": (Code.CUT_OFF, lambda good: good[:7]),
    "only a length": (Code.CUT_OFF, lambda good: good[:8]),
    "zeros": (Code.NOT_JSON, lambda good: bytes(64)),
    "a header cut off": (Code.CUT_OFF, lambda good: good[:100]),
    "noise": (Code.CUT_OFF, lambda good: bytes(range(1, 256)) * 3),
    "text": (Code.CUT_OFF, lambda good: b"Dear server, here is my adapter. " * 9),
    "html": (Code.CUT_OFF, lambda good: b"<!doctype html><script>alert(1)</script>" * 9),
    "an executable": (Code.CUT_OFF, lambda good: b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03" * 500),
    "pickle": (Code.CUT_OFF, lambda good: pickle.dumps(_Boom()) * 5),
    "pickle of protocol 0": (Code.CUT_OFF, lambda good: pickle.dumps(_Boom(), 0) * 5),
    "torch.save": (Code.CUT_OFF, lambda g: _saved(lambda f: torch.save({"a": torch.ones(3)}, f))),
    "zip": (Code.CUT_OFF, lambda good: _zip(good[:2000])),
    "npz": (Code.CUT_OFF, lambda good: _saved(lambda f: np.savez(f, a=np.ones(3)))),
    "npy with objects": (
        Code.CUT_OFF,
        lambda good: _saved(lambda f: np.save(f, np.array([_Boom()]), allow_pickle=True)),
    ),
    "tar": (Code.WRONG_SIZE, lambda good: _tar(good + bytes(20_000))),
    "gzip": (Code.CUT_OFF, gzip.compress),
    "gzip bomb": (Code.CUT_OFF, lambda good: gzip.compress(bytes(10**7))),
    "zip at the end": (Code.WRONG_SIZE, lambda good: good + _zip(b"x")),
    "zip within the size": (
        Code.WRONG_OFFSETS,
        edited(lambda p: p.put(p.A, "F32", p.tensors[p.A][1], _zip(b"")[:20])),
    ),
    "one more byte": (Code.WRONG_SIZE, lambda good: good + b"\0"),
    "eight more bytes": (Code.WRONG_SIZE, lambda good: good + bytes(8)),
    "a megabyte more": (Code.WRONG_SIZE, lambda good: good + bytes(2**20)),
    "one byte less": (Code.CUT_OFF, lambda good: good[:-1]),
    "half of it": (Code.CUT_OFF, lambda good: good[: len(good) - len(Parts.of(good).body) // 2]),
    "no body": (Code.CUT_OFF, lambda good: good[: len(good) - len(Parts.of(good).body)]),
    "length 2^63": (Code.CUT_OFF, lambda good: struct.pack("<Q", 2**63) + good[8:]),
    "length 2^64 - 1": (Code.CUT_OFF, lambda good: struct.pack("<Q", 2**64 - 1) + good[8:]),
    "length of everything": (
        Code.HEADER_TOO_LONG,
        lambda good: struct.pack("<Q", len(good) - 8) + good[8:],
    ),
    "length one less": (
        Code.NOT_JSON,
        lambda good: struct.pack("<Q", len(good[8:].split(b"]}}")[0]) + 2) + good[8:],
    ),
    "length 0": (Code.NOT_JSON, lambda good: bytes(8) + good[8:]),
    "twice": (Code.WRONG_SIZE, lambda good: good + good),
}

# --- JSON ----------------------------------------------------------------------------------


def _replaced_once(old: str, new: str) -> Make:
    return in_text(lambda text, parts: text.replace(old, new, 1))


def _twice(text: str, parts: Parts) -> str:
    one = json.dumps({parts.A: parts.header()[parts.A]}, separators=(",", ":"))[1:-1]
    return text[:-1] + "," + one + "}"


JSON: dict[str, tuple[Code, Make]] = {
    "a list": (Code.NOT_JSON, in_text(lambda t, p: "[]")),
    "a number": (Code.NOT_JSON, in_text(lambda t, p: "17")),
    "null": (Code.NOT_JSON, in_text(lambda t, p: "null")),
    "an empty table": (Code.WRONG_SIZE, in_text(lambda t, p: "{}")),
    "no closing bracket": (Code.NOT_JSON, in_text(lambda t, p: t[:-1])),
    "two tables": (Code.NOT_JSON, in_text(lambda t, p: t[:-1] + "}{}")),
    "a comment": (Code.NOT_JSON, in_text(lambda t, p: "{/**/" + t[1:])),
    "a comma too many": (Code.NOT_JSON, in_text(lambda t, p: t[:-1] + ",}")),
    "single quotes": (Code.NOT_JSON, in_text(lambda t, p: t.replace('"', "'"))),
    "byte order mark": (Code.NOT_JSON, in_text(lambda t, p: b"\xef\xbb\xbf" + t.encode())),
    "utf-16": (Code.NOT_JSON, in_text(lambda t, p: "{}".encode("utf-16-le") * 9)),
    "not utf-8": (
        Code.NOT_JSON,
        in_text(lambda t, p: t.encode().replace(b"model", b"mod\xffl", 1)),
    ),
    "overlong utf-8": (
        Code.NOT_JSON,
        in_text(lambda t, p: t.encode().replace(b"model", b"mod\xc0\xafl", 1)),
    ),
    "raw surrogate": (Code.NOT_JSON, in_text(lambda t, p: t.replace("model", "mod\ud800l", 1))),
    "NUL in the header": (Code.NOT_JSON, in_text(lambda t, p: t.replace("model", "mod\0l", 1))),
    "zeros after the header": (Code.NOT_JSON, in_text(lambda t, p: t + "\0\0\0")),
    "blank before the header": (Code.NOT_JSON, in_text(lambda t, p: " " + t)),
    "a megabyte of blanks": (Code.WRONG_SIZE, in_text(lambda t, p: t + " " * 2**20)),
    "depth 100,000": (Code.WRONG_SIZE, in_text(lambda t, p: '{"a":' + "[" * 100_000)),
    "depth 2,000": (Code.NOT_JSON, in_text(lambda t, p: '{"a":' + "[" * 2000)),
    "depth 400 of tables": (Code.NOT_JSON, in_text(lambda t, p: '{"a":' * 400)),
    "an unknown key": (Code.WRONG_TYPE, in_text(lambda t, p: t[:-1] + ',"x":[[],[]]}')),
    "lists without end": (
        Code.WRONG_TYPE,
        in_text(lambda t, p: '{"x":[' + "[],[]," * ((len(t) - 20) // 6) + "[]]}"),
    ),
    "NaN as a side": (
        Code.NOT_JSON,
        in_text(lambda t, p: t.replace('"shape":[', '"shape":[NaN,', 1)),
    ),
    "Infinity as a side": (
        Code.NOT_JSON,
        in_text(lambda t, p: t.replace('"shape":[', '"shape":[-Infinity,', 1)),
    ),
    "1e400 as a side": (
        Code.NOT_JSON,
        in_text(lambda t, p: t.replace('"shape":[', '"shape":[1e400,', 1)),
    ),
    "4,000 digits as a side": (
        Code.WRONG_SIZE,
        in_text(lambda t, p: t.replace('"shape":[', '"shape":[' + "9" * 4000 + ",", 1)),
    ),
    "5,000 digits as an offset": (
        Code.HEADER_TOO_LONG,
        lambda good: framed(
            '{"a.A":{"dtype":"F32","shape":[2,2],"data_offsets":[0,1' + "0" * 5000 + "]}}"
        ),
    ),
    "a tensor twice": (Code.DUPLICATE_KEY, in_text(_twice)),
    "metadata twice": (
        Code.DUPLICATE_KEY,
        in_text(lambda text, parts: text[:-1] + ',"__metadata__":{}}'),
    ),
    "dtype twice": (Code.DUPLICATE_KEY, _replaced_once('"dtype":"F32"', '"dtype":0,"dtype":"F32"')),
    "client twice": (
        Code.DUPLICATE_KEY,
        own_text(lambda p: json.dumps(p.fields)[:-1] + ', "client": "x"}'),
    ),
    "a fact twice": (
        Code.DUPLICATE_KEY,
        own_text(lambda p: json.dumps(p.fields).replace('"facts": {', '"facts": {"steps": 1, ', 1)),
    ),
    "format twice": (
        Code.DUPLICATE_KEY,
        own_text(lambda p: '{"format": 2, ' + json.dumps(p.fields)[1:]),
    ),
    "metadata that is a list": (
        Code.WRONG_TYPE,
        in_header(lambda h, p: h.update(__metadata__=["flexlora"])),
    ),
    "metadata that is null": (
        Code.WRONG_FORMAT,
        in_header(lambda h, p: h.update(__metadata__=None)),
    ),
    "no metadata": (Code.WRONG_FORMAT, in_header(lambda h, p: h.pop("__metadata__"))),
    "metadata of numbers": (
        Code.WRONG_TYPE,
        in_header(lambda h, p: h["__metadata__"].update(flexlora=5)),
    ),
    "more metadata": (Code.UNKNOWN_KEY, in_header(lambda h, p: h["__metadata__"].update(x=""))),
    "an own header of nothing": (Code.NOT_JSON, own_text("")),
    "an own header of null": (Code.WRONG_FORMAT, own_text("null")),
    "an own header that is a list": (Code.WRONG_FORMAT, own_text("[2]")),
    "an own header that is a text": (Code.WRONG_FORMAT, own_text('"format"')),
    "an own header cut off": (Code.NOT_JSON, own_text(lambda p: json.dumps(p.fields)[:-1])),
    "an own header of depth 400": (Code.NOT_JSON, own_text("[" * 400)),
    "an own header with a surrogate": (
        Code.WRONG_TYPE,
        own_text(lambda p: json.dumps({**p.fields, "client": "\ud800"})),
    ),
}


# --- fields of the own header --------------------------------------------------------------

HUGE = 10**400
FIELDS: dict[str, tuple[Code, Make]] = {
    "no format": (Code.WRONG_FORMAT, without_field("format")),
    "format true": (Code.WRONG_FORMAT, with_field("format", True)),
    "format 2.0": (Code.WRONG_FORMAT, with_field("format", 2.0)),
    "format as a text": (Code.WRONG_FORMAT, with_field("format", "2")),
    "format 1": (Code.WRONG_FORMAT, with_field("format", 1)),
    "format 3": (Code.WRONG_FORMAT, with_field("format", 3)),
    "format 2^64 + 2": (Code.WRONG_FORMAT, with_field("format", 2**64 + 2)),
    "no kind": (Code.WRONG_KIND, without_field("kind")),
    "a download": (Code.WRONG_KIND, with_field("kind", "download")),
    "a state": (Code.WRONG_KIND, with_field("kind", "state")),
    "a kind that is a list": (Code.WRONG_KIND, with_field("kind", ["upload"])),
    "a kind in capitals": (Code.WRONG_KIND, with_field("kind", "Upload")),
    "an unknown field": (Code.UNKNOWN_KEY, with_field("weight", 1)),
    "a download's field": (Code.UNKNOWN_KEY, with_field("ranks", {})),
    "an empty field name": (Code.UNKNOWN_KEY, with_field("", 1)),
    "no client": (Code.MISSING_KEY, without_field("client")),
    "client 5": (Code.WRONG_TYPE, with_field("client", 5)),
    "client null": (Code.WRONG_TYPE, with_field("client", None)),
    "client a list": (Code.WRONG_TYPE, with_field("client", ["client1"])),
    "client empty": (Code.WRONG_TYPE, with_field("client", "")),
    "another client": (Code.WRONG_CLIENT, with_field("client", "client0")),
    "client in capitals": (
        Code.WRONG_CLIENT,
        edited(lambda p: p.fields.update(client=p.fields["client"].upper())),
    ),
    "client and a blank": (
        Code.WRONG_CLIENT,
        edited(lambda p: p.fields.update(client=p.fields["client"] + " ")),
    ),
    "client of another alphabet": (
        Code.WRONG_CLIENT,
        edited(lambda p: p.fields.update(client=p.fields["client"].replace("c", "с"))),
    ),
    "client with an escape code": (Code.WRONG_TYPE, with_field("client", "\x1b[2J")),
    "client with a line": (Code.WRONG_TYPE, with_field("client", "x\nround 9: loss 0.001")),
    "client turned to the left": (Code.WRONG_TYPE, with_field("client", "\u202e2tneilc")),
    "client of a surrogate": (Code.WRONG_TYPE, with_field("client", "\ud800")),
    "client with NUL": (Code.WRONG_TYPE, with_field("client", "client1\0")),
    "client of 540 letters": (
        Code.WRONG_TYPE,
        _no_room(lambda p: p.fields.update(client="c" * 540)),
    ),
    "client of 20 megabytes": (Code.WRONG_SIZE, with_field("client", "c" * 20_000_000)),
    "no round": (Code.MISSING_KEY, without_field("round")),
    "another round": (Code.WRONG_ROUND, with_field("round", 2)),
    "round 0": (Code.WRONG_ROUND, with_field("round", 0)),
    "round -1": (Code.WRONG_TYPE, with_field("round", -1)),
    "round true": (Code.WRONG_TYPE, with_field("round", True)),
    "round 1.0": (Code.WRONG_TYPE, with_field("round", 1.0)),
    "round as a text": (Code.WRONG_TYPE, with_field("round", "1")),
    "round null": (Code.WRONG_TYPE, with_field("round", None)),
    "round 2^64": (Code.WRONG_TYPE, with_field("round", 2**64)),
    "no examples": (Code.MISSING_KEY, without_field("examples")),
    "examples 0": (Code.WRONG_EXAMPLES, with_field("examples", 0)),
    "examples -1": (Code.WRONG_EXAMPLES, with_field("examples", -1)),
    "examples one more": (
        Code.WRONG_EXAMPLES,
        edited(lambda p: p.fields.update(examples=p.fields["examples"] + 1)),
    ),
    "examples 1e9": (Code.WRONG_EXAMPLES, with_field("examples", 10**9)),
    "examples 1e18": (Code.WRONG_EXAMPLES, with_field("examples", 10**18)),
    "examples 10^400": (Code.WRONG_TYPE, _no_room(lambda p: p.fields.update(examples=HUGE))),
    "examples true": (Code.WRONG_TYPE, with_field("examples", True)),
    "examples 1.5": (Code.WRONG_TYPE, with_field("examples", 1.5)),
    "examples as a text": (Code.WRONG_TYPE, with_field("examples", "7")),
    "examples null": (Code.WRONG_TYPE, with_field("examples", None)),
    "examples NaN": (Code.NOT_JSON, field_text("examples", "NaN")),
    "examples 1e400": (Code.NOT_JSON, field_text("examples", "1e400")),
    "examples of 5,000 digits": (Code.WRONG_SIZE, field_text("examples", "9" * 5000)),
    "component numbers that nobody asked for": (
        Code.WRONG_COMPONENTS,
        edited(lambda p: p.fields.update(component_ids={p.module: [0]})),
    ),
    "component numbers of nothing": (Code.WRONG_TYPE, with_field("component_ids", [])),
    "sparse where nothing is": (
        Code.UNKNOWN_KEY,
        with_field("sparse", {"dtype": "F32", "shapes": {}}),
    ),
}

# --- facts ---------------------------------------------------------------------------------

FACTS: dict[str, tuple[Code, Make]] = {
    "no facts": (Code.MISSING_KEY, without_field("facts")),
    "facts of nothing": (Code.MISSING_KEY, with_field("facts", {})),
    "facts in a list": (Code.IMPOSSIBLE_FACT, with_field("facts", [])),
    "facts null": (Code.IMPOSSIBLE_FACT, with_field("facts", None)),
    "a fact too many": (Code.UNKNOWN_KEY, with_fact("x", 1)),
    "a fact less": (Code.MISSING_KEY, edited(lambda p: p.fields["facts"].pop("steps"))),
    "a fact with an escape code": (Code.IMPOSSIBLE_FACT, with_fact("\x1b[2J", 1)),
    "a fact of 505 letters": (
        Code.IMPOSSIBLE_FACT,
        _no_room(lambda p: p.fields["facts"].update({"c" * 505: 1})),
    ),
    "100,000 facts": (
        Code.WRONG_SIZE,
        edited(lambda p: p.fields["facts"].update({str(n): n for n in range(100_000)})),
    ),
    "a fact that is a text": (Code.IMPOSSIBLE_FACT, with_fact("steps", "many")),
    "a fact that is true": (Code.IMPOSSIBLE_FACT, with_fact("steps", True)),
    "a fact that is null": (Code.IMPOSSIBLE_FACT, with_fact("seconds", None)),
    "a fact that is a list": (Code.IMPOSSIBLE_FACT, with_fact("seconds", [1])),
    "a fact that is NaN": (Code.NOT_JSON, with_fact("loss_total", math.nan)),
    "a fact that is infinite": (Code.NOT_JSON, with_fact("seconds", math.inf)),
    "a fact of 400 digits": (
        Code.IMPOSSIBLE_FACT,
        _no_room(lambda p: p.fields["facts"].update(tokens=HUGE)),
    ),
    "half a step": (Code.IMPOSSIBLE_FACT, with_fact("steps", 0.5)),
    "tokens as a fraction": (Code.IMPOSSIBLE_FACT, with_fact("tokens", 1.0)),
    "a loss per token of 10^6": (
        Code.IMPOSSIBLE_FACT,
        edited(
            lambda p: p.fields["facts"].update(loss_total=p.fields["facts"]["loss_tokens"] * 1e6)
        ),
    ),
    "a loss of no tokens": (Code.IMPOSSIBLE_FACT, with_fact("loss_tokens", 0)),
    "tokens for a library": (Code.IMPOSSIBLE_FACT, with_fact("tokens", 10**9)),
    "tokens below zero for ever": (Code.IMPOSSIBLE_FACT, with_fact("tokens", -999_999_999_999_821)),
    "steps for a year": (Code.IMPOSSIBLE_FACT, with_fact("steps", 10**6)),
    "seconds of a million years": (Code.IMPOSSIBLE_FACT, with_fact("seconds", 3e13)),
    **{
        f"{name} below zero": (Code.IMPOSSIBLE_FACT, with_fact(name, -1))
        for name in (
            *("tokens", "computed", "steps", "loss_total", "loss_tokens", "seconds", "bytes_down"),
        )
    },
}

# --- tensors -------------------------------------------------------------------------------


def _without(*suffixes: str) -> Make:
    def change(parts: Parts) -> None:
        module = parts.module
        for suffix in suffixes:
            del parts.tensors[module + suffix]

    return edited(change)


def _instead(name: Callable[[str], str]) -> Make:
    """The tensor ``A`` of the first module under another name."""

    def change(parts: Parts) -> None:
        parts.tensors[name(parts.A)] = parts.tensors.pop(parts.A)

    return edited(change)


def _both(dtype: str, A: list[Any], B: list[Any]) -> Make:
    """The first module with other shapes, of as many zeros as they take."""

    def change(parts: Parts) -> None:
        data = b"" if 0 in A + B else None
        parts.put(parts.A, dtype, A, data)
        parts.put(parts.B, dtype, B, data)

    return edited(change)


def _reshaped(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Make:
    """The first module's A and B replaced."""

    def edit(parts: Parts) -> None:
        A, B = change(parts.array(parts.A), parts.array(parts.B))
        parts.put_array(parts.A, A)
        parts.put_array(parts.B, B)

    return edited(edit)


def _traded(parts: Parts) -> None:
    """One module has a component of its rank less and another one more."""
    A, B = parts.names[:2]
    parts.put_array(A, parts.array(A)[1:])
    parts.put_array(B, parts.array(B)[:, 1:])
    other = next(n for n in parts.names if "k_proj.A" in n)
    A, B = other, other[:-1] + "B"
    parts.put_array(A, np.pad(parts.array(A), ((0, 1), (0, 0))))
    parts.put_array(B, np.pad(parts.array(B), ((0, 0), (0, 1))))


TENSORS: dict[str, tuple[Code, Make]] = {
    "no tensors": (Code.MISSING_TENSOR, edited(lambda p: p.tensors.clear())),
    "a module less": (Code.MISSING_TENSOR, _without(".A", ".B")),
    "no A": (Code.MISSING_TENSOR, _without(".A")),
    "no B": (Code.MISSING_TENSOR, _without(".B")),
    "a module more": (
        Code.UNKNOWN_TENSOR,
        _no_room(lambda p: (p.put("lm_head.A", "F32", [1, 2]), p.put("lm_head.B", "F32", [2, 1]))),
    ),
    "a tensor of another name": (Code.UNKNOWN_TENSOR, _instead(lambda n: n[:-2])),
    "a small letter": (Code.MISSING_TENSOR, _instead(lambda n: n[:-1] + "a")),
    "PEFT's names": (Code.MISSING_TENSOR, _instead(lambda n: n[:-1] + "lora_A.weight")),
    "no name": (Code.UNKNOWN_TENSOR, _instead(lambda n: ".A")),
    "an empty name": (Code.UNKNOWN_TENSOR, _instead(lambda n: "")),
    "the name A": (Code.UNKNOWN_TENSOR, _instead(lambda n: "A")),
    "another module": (Code.UNKNOWN_TENSOR, renamed(lambda m: m + "x")),
    "a module in capitals": (Code.UNKNOWN_TENSOR, renamed(str.upper)),
    "a module of another alphabet": (
        Code.UNKNOWN_TENSOR,
        renamed(lambda m: m.replace("o", "о", 1)),
    ),
    "a module with a space of no width": (
        Code.UNKNOWN_TENSOR,
        renamed(lambda m: m[:3] + "\u200b" + m[3:]),
    ),
    "a module with a soft hyphen": (Code.UNKNOWN_TENSOR, renamed(lambda m: m + "\u00ad")),
    "a module and a blank": (Code.UNKNOWN_TENSOR, renamed(lambda m: m + " ")),
    "a module in wide letters": (Code.UNKNOWN_TENSOR, renamed(lambda m: m.replace("m", "ｍ", 1))),
    "a module with NUL": (Code.UNKNOWN_TENSOR, renamed(lambda m: m + "\0")),
    "a module with an escape code": (Code.UNKNOWN_TENSOR, renamed(lambda m: "\x1b[31m" + m)),
    "a module with a surrogate": (Code.UNKNOWN_TENSOR, renamed(lambda m: m + "\ud800")),
    "a module out of the folder": (Code.UNKNOWN_TENSOR, renamed(lambda m: "../../etc/passwd")),
    "a module called __class__": (Code.UNKNOWN_TENSOR, renamed(lambda m: "__class__")),
    "a module of 2,000 letters": (Code.WRONG_SIZE, renamed(lambda m: "m" * 2000)),
    "a module of 30 megabytes": (Code.WRONG_SIZE, renamed(lambda m: "m" * 15_000_000)),
    "a section frozen": (Code.UNKNOWN_TENSOR, renamed(lambda m: f"frozen/{m}")),
    "a section update": (Code.UNKNOWN_TENSOR, renamed(lambda m: f"update 1/{m}")),
    "a section that nobody asked for": (Code.UNKNOWN_TENSOR, renamed(lambda m: f"aux x/{m}")),
    "a section without a name": (Code.UNKNOWN_TENSOR, renamed(lambda m: f"/{m}")),
    "a section aux without a name": (Code.UNKNOWN_TENSOR, renamed(lambda m: f"aux /{m}")),
    "200,000 empty tensors": (
        Code.WRONG_SIZE,
        edited(lambda p: [p.put(f"x{n}.A", "F32", [0, 1]) for n in range(20_000)]),
    ),
    "empty tensors as far as there is room": (
        Code.UNKNOWN_TENSOR,
        _no_room(lambda p: [p.put(f"{n}.{f}", "F32", [0, 0]) for n in range(2) for f in "AB"]),
    ),
    "[2^63, 0]": (Code.WRONG_SHAPE, _both("F32", [2**63, 0], [0, 2**63])),
    "[2^64 - 1, 0]": (Code.WRONG_SHAPE, _both("F32", [2**64 - 1, 0], [0, 2**64 - 1])),
    "[2^40, 0]": (Code.WRONG_SHAPE, _both("F32", [2**40, 0], [0, 2**40])),
    "[2^31 - 1, 0]": (Code.WRONG_SHAPE, _both("F32", [2**31 - 1, 0], [0, 2**31 - 1])),
    "[2^32, 2^32]": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[2**32, 2**32]))),
    "[2^16, 2^16]": (Code.WRONG_OFFSETS, entry(lambda e: e.update(shape=[2**16, 2**16]))),
    "no dimensions": (Code.WRONG_SHAPE, _no_room(lambda p: p.put(p.A, "F32", []))),
    "one dimension": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[math.prod(e["shape"])]))),
    "three dimensions": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[1, *e["shape"]]))),
    "200 dimensions": (
        Code.WRONG_SHAPE,
        lambda good: framed(
            json.dumps({"a.A": {"dtype": "F32", "shape": [1] * 200, "data_offsets": [0, 4]}}),
            bytes(4),
        ),
    ),
    "1,000 dimensions": (
        Code.WRONG_SHAPE,
        lambda good: framed(
            json.dumps({"a.A": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}),
            bytes(4),
        ),
    ),
    "transposed": (Code.WRONG_RANK, _reshaped(lambda A, B: (A.T, B))),
    "both transposed": (Code.WRONG_SHAPE, _reshaped(lambda A, B: (B.T, A.T))),
    "a row more, a column less": (
        Code.WRONG_SHAPE,
        _reshaped(lambda A, B: (A[:, 1:], np.pad(B, ((0, 1), (0, 0))))),
    ),
    "a row more": (
        Code.WRONG_SIZE,
        _reshaped(lambda A, B: (A, np.pad(B, ((0, 100), (0, 0))))),
    ),
    "a row less": (Code.WRONG_SHAPE, _reshaped(lambda A, B: (A, B[1:]))),
    "a column less": (Code.WRONG_SHAPE, _reshaped(lambda A, B: (A[:, 1:], B))),
    "rank 0": (Code.WRONG_RANK, _reshaped(lambda A, B: (A[:0], B[:, :0]))),
    "a larger rank": (
        Code.WRONG_SIZE,
        _reshaped(lambda A, B: (np.pad(A, ((0, 4), (0, 0))), np.pad(B, ((0, 0), (0, 4))))),
    ),
    "a larger rank in a smaller module": (Code.WRONG_RANK, edited(_traded)),
    "two ranks": (Code.WRONG_RANK, _reshaped(lambda A, B: (A[1:], B))),
    "a negative side": (
        Code.WRONG_SHAPE,
        entry(lambda e: e.update(shape=[-n for n in e["shape"]])),
    ),
    "a side as a fraction": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[2.0, 32]))),
    "a side that is true": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[True, 64]))),
    "a side as a text": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=["2", 32]))),
    "a side that is null": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[None, 32]))),
    "a shape of lists": (Code.WRONG_SHAPE, entry(lambda e: e.update(shape=[[2], [32]]))),
    "a shape that is null": (Code.WRONG_TYPE, entry(lambda e: e.update(shape=None))),
    "a shape that is a text": (Code.WRONG_TYPE, entry(lambda e: e.update(shape="2x32"))),
    "a shape that is a table": (Code.WRONG_TYPE, entry(lambda e: e.update(shape={"0": 2}))),
    **{
        f"dtype {name}": (
            Code.WRONG_DTYPE,
            _no_room(lambda p, name=name: [p.put(n, name, p.tensors[n][1]) for n in (p.A, p.B)]),
        )
        for name in ("F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL")
    },
    **{
        f"the dtype {name!r}": (Code.WRONG_DTYPE, entry(lambda e, name=name: e.update(dtype=name)))
        for name in ("F8_E5M2", "F8_E4M3", "F4", "C64", "U64", "f32", "F32 ", "", "../F32")
    },
    "two dtypes": (Code.WRONG_DTYPE, _no_room(lambda p: p.put(p.A, "F64", p.tensors[p.A][1]))),
    "dtype null": (Code.WRONG_TYPE, entry(lambda e: e.update(dtype=None))),
    "dtype 1": (Code.WRONG_TYPE, entry(lambda e: e.update(dtype=1))),
    "dtype in a list": (Code.WRONG_TYPE, entry(lambda e: e.update(dtype=["F32"]))),
    "an entry that is a list": (
        Code.WRONG_TYPE,
        in_header(lambda h, p: h.update({p.A: list(h[p.A].values())})),
    ),
    "an entry that is null": (Code.WRONG_TYPE, in_header(lambda h, p: h.update({p.A: None}))),
    "an entry that is a number": (Code.WRONG_TYPE, in_header(lambda h, p: h.update({p.A: 7}))),
    "an entry with more keys": (Code.WRONG_TYPE, entry(lambda e: e.update(x=1))),
    "an entry without offsets": (Code.WRONG_TYPE, entry(lambda e: e.pop("data_offsets"))),
    "an entry without a dtype": (Code.WRONG_TYPE, entry(lambda e: e.pop("dtype"))),
}

# --- where tensors lie ---------------------------------------------------------------------


def _moved(change: Callable[[list[int]], list[Any]]) -> Make:
    return entry(lambda e: e.update(data_offsets=change(e["data_offsets"])))


def _all_at_0(header: dict[str, Any], parts: Parts) -> None:
    for name in parts.tensors:
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"] = [0, last - first]


def _swapped_places(header: dict[str, Any], parts: Parts) -> None:
    """Two tensors of different sizes over each other."""
    A, B = header[parts.A]["data_offsets"], header[parts.B]["data_offsets"]
    header[parts.B]["data_offsets"] = [A[0], A[0] + B[1] - B[0]]


OFFSETS: dict[str, tuple[Code, Make]] = {
    "turned round": (Code.WRONG_OFFSETS, _moved(lambda o: o[::-1])),
    "below zero": (Code.WRONG_OFFSETS, _moved(lambda o: [o[0] - 10**6, o[1] - 10**6])),
    "beyond the end": (Code.CUT_OFF, _moved(lambda o: [o[0] + 10**6, o[1] + 10**6])),
    "at 2^63": (Code.CUT_OFF, _moved(lambda o: [2**63, 2**63 + o[1] - o[0]])),
    "at 2^200": (Code.CUT_OFF, _moved(lambda o: [2**200, 2**200 + o[1] - o[0]])),
    "four bytes too many": (Code.WRONG_OFFSETS, _moved(lambda o: [o[0], o[1] + 4])),
    "four bytes too few": (Code.WRONG_OFFSETS, _moved(lambda o: [o[0], o[1] - 4])),
    "one byte further": (Code.WRONG_OFFSETS, _moved(lambda o: [o[0] + 1, o[1] + 1])),
    "over another": (Code.WRONG_OFFSETS, in_header(_swapped_places)),
    "all at the beginning": (Code.WRONG_OFFSETS, in_header(_all_at_0)),
    "three": (Code.WRONG_TYPE, _moved(lambda o: [*o, o[1]])),
    "one": (Code.WRONG_TYPE, _moved(lambda o: o[:1])),
    "none": (Code.WRONG_TYPE, _moved(lambda o: [])),
    "fractions": (Code.WRONG_TYPE, _moved(lambda o: [float(n) for n in o])),
    "texts": (Code.WRONG_TYPE, _moved(lambda o: [str(n) for n in o])),
    "true and false": (Code.WRONG_OFFSETS, _moved(lambda o: [False, True])),
    "null": (Code.WRONG_TYPE, entry(lambda e: e.update(data_offsets=None))),
    "a gap": (
        Code.WRONG_OFFSETS,
        # The module that makes room stays in the body, where no tensor names it.
        in_header(lambda h, p: [h.pop(name) for name in p.names[2:4]]),
    ),
}

# --- values --------------------------------------------------------------------------------


def _set(value: float, place: tuple[int, int] = (0, 0)) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return change


def _bits(bits: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.view(np.uint32)[0, 0] = bits

    return change


VALUES: dict[str, tuple[Code, Make]] = {
    "NaN": (Code.NOT_FINITE, values("A", _set(math.nan))),
    "NaN at the end": (Code.NOT_FINITE, values("B", _set(math.nan, (-1, -1)))),
    "NaN everywhere": (Code.NOT_FINITE, values("B", lambda a: np.full_like(a, math.nan))),
    "a NaN that signals": (Code.NOT_FINITE, values("A", _bits(0x7F800001))),
    "a NaN with a sign": (Code.NOT_FINITE, values("A", _bits(0xFFC00000))),
    "infinity": (Code.NOT_FINITE, values("A", _set(math.inf))),
    "minus infinity": (Code.NOT_FINITE, values("B", _set(-math.inf))),
    "the largest number": (Code.TOO_LARGE, values("A", _set(float(np.finfo(np.float32).max)))),
    "minus the largest number": (
        Code.TOO_LARGE,
        values("B", _set(float(np.finfo(np.float32).min))),
    ),
    "a norm above a million": (Code.TOO_LARGE, values("A", _set(1.1e6))),
    "a norm of many": (Code.TOO_LARGE, values("A", lambda a: np.full_like(a, 9e5))),
    "(c B, A / c) with c = 1e20": (
        Code.TOO_LARGE,
        _reshaped(lambda A, B: (A / 1e20, B * 0 + 1e20)),
    ),
    "(B / c, c A) with c = 1e20": (Code.TOO_LARGE, _reshaped(lambda A, B: (A * 1e20, B / 1e20))),
    "(c B, A / c) with c = 1e38": (
        Code.TOO_LARGE,
        _reshaped(lambda A, B: (A / 1e38, B * 0 + 1e38)),
    ),
}

for _kind, _cases in {
    "not a message": NO_MESSAGE,
    "JSON": JSON,
    "fields": FIELDS,
    "facts": FACTS,
    "tensors": TENSORS,
    "offsets": OFFSETS,
    "values": VALUES,
}.items():
    for _name, (_code, _make) in _cases.items():
        bad("plain", f"{_kind}: {_name}", _code, _make)

# --- without zeros: of a method that sends sparse messages ----------------------------------


def thin(parts: Parts) -> str:
    """The name of a factor ``B`` that travels without its zeros, and is not all zeros."""
    shapes = parts.fields["sparse"]["shapes"]
    return next(
        name
        for name in parts.names
        if name in shapes
        and name.endswith(".B")
        and len(parts.tensors[name][2]) > _mask(shapes[name])
    )


def _thin_data(change: Callable[[bytearray, list[int]], bytes | None]) -> Make:
    """A change of the bytes of a sparse tensor; its length is in the header."""

    def edit(parts: Parts) -> None:
        name = thin(parts)
        data = bytearray(parts.tensors[name][2])
        new = change(data, parts.fields["sparse"]["shapes"][name])
        new = bytes(data) if new is None else new
        parts.tensors[name] = ("U8", [len(new)], new)

    return edited(edit)


def _thin_shape(change: Callable[[list[int]], Any]) -> Make:
    def edit(parts: Parts) -> None:
        shapes = parts.fields["sparse"]["shapes"]
        shapes[thin(parts)] = change(shapes[thin(parts)])

    return edited(edit)


def _sparse(change: Callable[[dict[str, Any], Parts], Any]) -> Make:
    return edited(lambda p: change(p.fields["sparse"], p))


def _mask(shape: list[int]) -> int:
    return -(-shape[0] * shape[1] // 8)


def _zero_bomb(factor: int) -> Make:
    """A mask of zeros for a matrix of so many times the rows; other modules make room."""

    def edit(parts: Parts) -> None:
        name = thin(parts)
        shape = parts.fields["sparse"]["shapes"][name]
        shape[0] *= factor
        for other in [n for n in parts.names if n[:-2] != name[:-2]][:12]:
            del parts.tensors[other]
            parts.fields["sparse"]["shapes"].pop(other, None)
        parts.tensors[name] = ("U8", [_mask(shape)], bytes(_mask(shape)))

    return edited(edit)


def _first_value(value: float) -> Callable[[bytearray, list[int]], None]:
    def change(data: bytearray, shape: list[int]) -> None:
        data[:4] = struct.pack("<f", value)

    return change


def _last_mask_bit(data: bytearray, shape: list[int]) -> None:
    data[-1] ^= 1


SPARSE: dict[str, tuple[Code, Make]] = {
    "a mask of zeros for 40 times the matrix": (Code.TOO_LARGE, _zero_bomb(40)),
    "a mask of zeros for 100 times the matrix": (Code.TOO_LARGE, _zero_bomb(100)),
    "values of eight bytes": (Code.WRONG_DTYPE, _sparse(lambda s, p: s.update(dtype="F64"))),
    "values of two bytes": (Code.WRONG_DTYPE, _sparse(lambda s, p: s.update(dtype="BF16"))),
    "values that are numbers of another kind": (
        Code.WRONG_DTYPE,
        _sparse(lambda s, p: s.update(dtype="I32")),
    ),
    "bytes as values": (Code.WRONG_DTYPE, _sparse(lambda s, p: s.update(dtype="U8"))),
    "dtype null": (Code.WRONG_DTYPE, _sparse(lambda s, p: s.update(dtype=None))),
    "dtype a list": (Code.WRONG_DTYPE, _sparse(lambda s, p: s.update(dtype=["F32"]))),
    "no dtype": (Code.WRONG_SPARSE, _sparse(lambda s, p: s.pop("dtype"))),
    "no shapes": (Code.WRONG_SPARSE, _sparse(lambda s, p: s.pop("shapes"))),
    "an unknown key": (Code.WRONG_SPARSE, _sparse(lambda s, p: s.update(x=1))),
    "shapes in a list": (
        Code.WRONG_SPARSE,
        _sparse(lambda s, p: s.update(shapes=list(s["shapes"].items())[:3])),
    ),
    "nothing said": (Code.WRONG_SPARSE, edited(lambda p: p.fields.pop("sparse"))),
    "null said": (Code.WRONG_TYPE, edited(lambda p: p.fields.update(sparse=None))),
    "a list said": (Code.WRONG_TYPE, edited(lambda p: p.fields.update(sparse=[]))),
    "a shape less": (Code.WRONG_SPARSE, _sparse(lambda s, p: s["shapes"].pop(thin(p)))),
    "a shape more": (Code.WRONG_SPARSE, _sparse(lambda s, p: s["shapes"].update(x=[1, 1]))),
    "a shape for a name with an escape code": (
        Code.WRONG_SPARSE,
        _sparse(lambda s, p: s["shapes"].update({"\x1b[2J": [1, 1]})),
    ),
    "transposed": (Code.WRONG_RANK, _thin_shape(lambda shape: shape[::-1])),
    "a row more": (Code.TOO_LARGE, _thin_shape(lambda shape: [shape[0] + 1, shape[1]])),
    "a column more": (Code.WRONG_RANK, _thin_shape(lambda shape: [shape[0], shape[1] + 1])),
    "a side of 2^31 - 1": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [shape[0], 2**31 - 1])),
    "a side of 10^30": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [shape[0], 10**30])),
    "[2^63, 0]": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [2**63, 0])),
    "[2^30, 0]": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [2**30, 0])),
    "[0, 0]": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [0, 0])),
    "a negative side": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [-1, -shape[1]])),
    "a side as a fraction": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [2.0, shape[1]])),
    "a side that is true": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [True, shape[1]])),
    "one side": (Code.WRONG_SPARSE, _thin_shape(lambda shape: shape[:1])),
    "three sides": (Code.WRONG_SPARSE, _thin_shape(lambda shape: [1, *shape])),
    "a shape as a text": (Code.WRONG_SPARSE, _thin_shape(lambda shape: "2x32")),
    "a shape that is null": (Code.WRONG_SPARSE, _thin_shape(lambda shape: None)),
    "a value less": (Code.WRONG_SPARSE, _thin_data(lambda data, shape: bytes(data[4:]))),
    "a value more": (Code.WRONG_SPARSE, _thin_data(lambda data, shape: b"abcd" + bytes(data))),
    "a byte less": (Code.WRONG_SPARSE, _thin_data(lambda data, shape: bytes(data[1:]))),
    "a mask cut off": (
        Code.WRONG_SPARSE,
        _thin_data(lambda data, shape: bytes(_mask(shape) - 1)),
    ),
    "a mask of ones": (
        Code.WRONG_SPARSE,
        _thin_data(lambda d, shape: bytes(d[: -_mask(shape)]) + b"\xff" * _mask(shape)),
    ),
    "a mask of zeros": (
        Code.WRONG_SPARSE,
        _thin_data(lambda d, shape: bytes(d[: -_mask(shape)]) + bytes(_mask(shape))),
    ),
    "one bit of the mask": (Code.WRONG_SPARSE, _thin_data(_last_mask_bit)),
    "as large as with its zeros": (
        Code.WRONG_SPARSE,
        _no_room(
            lambda p: p.tensors.update(
                {
                    thin(p): (
                        "U8",
                        [n := 4 * math.prod(p.fields["sparse"]["shapes"][thin(p)])],
                        bytes(n),
                    )
                }
            )
        ),
    ),
    "two dimensions": (
        Code.WRONG_SPARSE,
        in_header(lambda h, p: h[thin(p)].update(shape=[1, *h[thin(p)]["shape"]])),
    ),
    "no dimensions": (
        Code.WRONG_OFFSETS,
        in_header(lambda h, p: h[thin(p)].update(shape=[])),
    ),
    "NaN": (Code.NOT_FINITE, _thin_data(_first_value(math.nan))),
    "infinity": (Code.NOT_FINITE, _thin_data(_first_value(-math.inf))),
    "a norm above a million": (Code.TOO_LARGE, _thin_data(_first_value(2e6))),
    "the largest number": (Code.TOO_LARGE, _thin_data(_first_value(3e38))),
}

# --- numbered components: of a method that trains some of them ------------------------------


def _ids(change: Callable[[list[int]], Any]) -> Make:
    """The numbers of the first module's components, replaced."""

    def edit(parts: Parts) -> None:
        table = parts.fields["component_ids"]
        table[parts.module] = change(table[parts.module])

    return edited(edit)


def _table(change: Callable[[dict[str, Any], Parts], Any]) -> Make:
    return edited(lambda p: change(p.fields["component_ids"], p))


NUMBERED: dict[str, tuple[Code, Make]] = {
    "none": (Code.WRONG_COMPONENTS, edited(lambda p: p.fields.pop("component_ids"))),
    "an empty table": (Code.WRONG_COMPONENTS, _table(lambda t, p: t.clear())),
    "a module less": (Code.WRONG_COMPONENTS, _table(lambda t, p: t.pop(p.module))),
    "a module more": (Code.WRONG_COMPONENTS, _table(lambda t, p: t.update(x=[0]))),
    "a module with an escape code": (
        Code.WRONG_TYPE,
        _table(lambda t, p: t.update({"\x1b[2J": [0]})),
    ),
    "a list": (Code.WRONG_TYPE, edited(lambda p: p.fields.update(component_ids=[[0]]))),
    "null": (Code.WRONG_TYPE, edited(lambda p: p.fields.update(component_ids=None))),
    "a text": (Code.WRONG_TYPE, edited(lambda p: p.fields.update(component_ids="all"))),
    "one twice": (Code.WRONG_TYPE, _ids(lambda ids: [ids[0]] * len(ids))),
    "one less": (Code.WRONG_COMPONENTS, _ids(lambda ids: ids[1:])),
    "one more": (Code.WRONG_COMPONENTS, _ids(lambda ids: list(range(len(ids) + 1)))),
    "no numbers": (Code.WRONG_COMPONENTS, _ids(lambda ids: [])),
    "below zero": (Code.WRONG_TYPE, _ids(lambda ids: [-1, *ids[1:]])),
    "one past the last": (Code.WRONG_COMPONENTS, _ids(lambda ids: [*ids[:-1], 99])),
    "2^31": (Code.WRONG_COMPONENTS, _ids(lambda ids: [*ids[:-1], 2**31])),
    "2^64": (Code.WRONG_TYPE, _ids(lambda ids: [*ids[:-1], 2**64])),
    "10^40": (Code.WRONG_TYPE, _ids(lambda ids: [*ids[:-1], 10**40])),
    "a fraction": (Code.WRONG_TYPE, _ids(lambda ids: [float(n) for n in ids])),
    "true": (Code.WRONG_TYPE, _ids(lambda ids: [True, *ids[1:]])),
    "texts": (Code.WRONG_TYPE, _ids(lambda ids: [str(n) for n in ids])),
    "lists": (Code.WRONG_TYPE, _ids(lambda ids: [[n] for n in ids])),
    "nulls": (Code.WRONG_TYPE, _ids(lambda ids: [None for _ in ids])),
    "a number in place of numbers": (Code.WRONG_TYPE, _ids(lambda ids: 0)),
    "a table in place of numbers": (Code.WRONG_TYPE, _ids(lambda ids: {"0": 0})),
    "a range": (Code.WRONG_TYPE, _ids(lambda ids: "0:2")),
    "a million": (Code.WRONG_SIZE, _ids(lambda ids: list(range(10**6)))),
    "for an adapter of another rank": (
        Code.WRONG_RANK,
        _reshaped(lambda A, B: (A[1:], B[:, 1:])),
    ),
}

# --- adapters beside the upload: of a method that sends control variates --------------------

SECTION = "aux control/"


def _beside(change: Callable[[Parts, str], Any]) -> Make:
    """A change of the tensors beside the upload, given the name of the first one's ``A``."""
    return edited(lambda p: change(p, min(n for n in p.tensors if n.startswith(SECTION))))


def _section(name: str | None) -> Make:
    """The section under another name; None leaves it out."""

    def edit(parts: Parts) -> None:
        for key in [key for key in parts.tensors if key.startswith(SECTION)]:
            tensor = parts.tensors.pop(key)
            if name is not None:
                parts.tensors[name + key.removeprefix(SECTION)] = tensor

    return edited(edit)


def _copied(parts: Parts, name: str) -> None:
    """A second section of one module; another module makes room for it."""
    for factor in "AB":
        parts.tensors[f"aux more/x.{factor}"] = parts.tensors[f"{name[:-2]}.{factor}"]
        del parts.tensors[f"{parts.module}.{factor}"]


def _of_zeros(parts: Parts, name: str, shape: list[int]) -> None:
    parts.put(name, "F32", shape)


def _beside_value(value: float) -> Make:
    def edit(parts: Parts, name: str) -> None:
        array = parts.array(name)
        array[-1, -1] = value
        parts.put_array(name, array)

    return _beside(edit)


AUX: dict[str, tuple[Code, Make]] = {
    "absent": (Code.MISSING_TENSOR, _section(None)),
    "another name": (Code.UNKNOWN_TENSOR, _section("aux controx/")),
    "a name in capitals": (Code.UNKNOWN_TENSOR, _section("aux Control/")),
    "no name": (Code.UNKNOWN_TENSOR, _section("aux /")),
    "a name that is longer": (Code.UNKNOWN_TENSOR, _section("aux control /")),
    "not marked as aux": (Code.UNKNOWN_TENSOR, _section("control/")),
    "a download's section": (Code.UNKNOWN_TENSOR, _section("frozen/")),
    "two sections": (Code.UNKNOWN_TENSOR, _beside(_copied)),
    "a module less": (
        Code.MISSING_TENSOR,
        _beside(lambda p, n: [p.tensors.pop(n), p.tensors.pop(n[:-1] + "B")]),
    ),
    "a module of another name": (
        Code.UNKNOWN_TENSOR,
        _beside(
            lambda p, n: [
                p.tensors.update({f"{SECTION}x.{f}": p.tensors.pop(f"{n[:-1]}{f}")}) for f in "AB"
            ]
        ),
    ),
    "no A": (Code.MISSING_TENSOR, _beside(lambda p, n: p.tensors.pop(n))),
    "a row less": (
        Code.WRONG_SHAPE,
        _beside(lambda p, n: p.put_array(n[:-1] + "B", p.array(n[:-1] + "B")[1:])),
    ),
    "a lower rank of one factor": (
        Code.WRONG_RANK,
        _beside(lambda p, n: p.put_array(n, p.array(n)[1:])),
    ),
    "rank 0": (
        Code.WRONG_RANK,
        _beside(
            lambda p, n: [
                p.put_array(n, p.array(n)[:0]),
                p.put_array(n[:-1] + "B", p.array(n[:-1] + "B")[:, :0]),
            ]
        ),
    ),
    "[2^63, 0]": (Code.WRONG_SHAPE, _beside(lambda p, n: p.put(n, "F32", [2**63, 0], b""))),
    "another dtype": (Code.WRONG_DTYPE, _beside(lambda p, n: p.put(n, "BF16", p.tensors[n][1]))),
    "bytes": (Code.WRONG_DTYPE, _beside(lambda p, n: p.put(n, "U8", p.tensors[n][1]))),
    "NaN": (Code.NOT_FINITE, _beside_value(math.nan)),
    "infinity": (Code.NOT_FINITE, _beside_value(math.inf)),
    "a norm above a million": (Code.TOO_LARGE, _beside_value(-2e6)),
}

for _group, _kind, _cases in (
    ("sparse", "without zeros", SPARSE),
    ("numbered", "components", NUMBERED),
    ("aux", "beside it", AUX),
):
    for _name, (_code, _make) in _cases.items():
        bad(_group, f"{_kind}: {_name}", _code, _make)
