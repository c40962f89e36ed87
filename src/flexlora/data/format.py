"""What a file of rows is: its format, compression, encoding and delimiter, from its content."""

from __future__ import annotations

import bz2
import codecs
import csv
import dataclasses
import gzip
import io
import json
import lzma
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

import pyarrow as pa

from flexlora.errors import DataError

Format = Literal["parquet", "arrow", "json", "csv"]

_COMPRESSED: Final[Mapping[bytes, str]] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_FOREIGN: Final[Mapping[bytes, str]] = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save the sheet as CSV",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"ORC": "an ORC file; convert it to Parquet",
    b"Obj\x01": "an Avro file; convert it to Parquet",
    b"%PDF": "a PDF; rows must be a table",
    b"\x80\x04\x95": "a Python pickle, which is never opened; save the rows as Parquet",
    b"\x80\x05\x95": "a Python pickle, which is never opened; save the rows as Parquet",
    b"\x93NUMPY": "a NumPy array; save the rows as Parquet or JSON lines",
    b"\x89HDF": "an HDF5 file; save the rows as Parquet or JSON lines",
    b"version https://git-lfs": "a pointer of Git LFS and not the file; fetch it: git lfs pull",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
"""What other files begin with, what they are and what to do."""

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS: Final = (",", "\t", ";", "|")
_HEAD_BYTES: Final = 1 << 16
_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file of rows and how to read it.

    ``compression``, ``encoding`` and ``delimiter`` apply where the format has them.
    ``constants`` are columns with one value for the whole file, which the names of files and
    folders say: ``split`` and those of ``name=value`` folders.
    """

    path: Path
    format: Format
    compression: str | None = None
    encoding: str = "utf-8"
    delimiter: str = ","
    is_array: bool = False
    constants: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The file, for errors."""
        return f"'{self.path}'"

    @contextmanager
    def bytes(self) -> Iterator[IO[bytes]]:
        """The file's bytes, decompressed.

        Raises:
            DataError: it cannot be read, or its compressed data are damaged.
        """
        try:
            with _decompressed(self.path, self.compression) as stream:
                yield stream
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or "its compressed data are damaged"
            raise DataError(f"{self.place} cannot be read: {reason}.") from error

    @contextmanager
    def text(self) -> Iterator[IO[str]]:
        """The file's text; line ends are as they are in the file."""
        with self.bytes() as stream, io.TextIOWrapper(stream, self.encoding, newline="") as text:
            yield text


def recognize(path: Path, encoding: str | None = None) -> Source:
    """What a file is, by its first bytes; the suffix decides only what these leave open.

    Text that is not UTF-8 and has no byte order mark is taken for Windows-1252, of which Latin-1
    is a part, if that is plausible; a notice says so. ``encoding`` is the text's encoding if the
    user names it. Cost: text is read once.

    Raises:
        DataError: the file is missing, empty, or of a kind that is not read.
    """
    if not path.exists():
        raise DataError(f"There is no file '{path}' to read rows from.")
    with Source(path, "csv").bytes() as stream:
        magic = stream.read(24)
    compression = next((n for mark, n in _COMPRESSED.items() if magic.startswith(mark)), None)
    source = Source(path, "csv", compression)
    with source.bytes() as stream:
        head = stream.read(_HEAD_BYTES)
    if not head.strip():
        raise DataError(f"'{path}' is empty; it must have rows.")
    if head.startswith(b"PAR1"):
        _refuse_compressed(source, "Parquet")
        return Source(path, "parquet")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        _refuse_compressed(source, "Arrow")
        return Source(path, "arrow")
    for mark, kind in _FOREIGN.items():
        if head.lstrip().startswith(mark):
            raise DataError(f"'{path}' is {kind}.")
    encoding, notices = _encoding(source, head, encoding)
    source = Source(path, "csv", compression, encoding, notices=notices)
    with source.text() as stream:
        text = stream.read(_HEAD_BYTES)
    start = text.lstrip()[:1]
    if start in "[{":
        return Source(path, "json", compression, encoding, is_array=start == "[", notices=notices)
    delimiter, notice = _delimiter(source, text)
    return Source(path, "csv", compression, encoding, delimiter, notices=notices + notice)


def _refuse_compressed(source: Source, kind: str) -> None:
    if source.compression:
        raise DataError(
            f"{source.place} is a {kind} file inside a {source.compression} file; unpack it first."
        )


@contextmanager
def _decompressed(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    if compression in openers:
        with openers[compression](path, "rb") as stream:
            yield stream
    elif compression is not None:
        with pa.input_stream(str(path), compression=compression) as stream:
            yield io.BufferedReader(stream, _CHUNK_BYTES)
    else:
        with path.open("rb") as stream:
            yield stream


def _encoding(source: Source, head: bytes, named: str | None) -> tuple[str, tuple[str, ...]]:
    """The text's encoding, and a notice if it is not UTF-8.

    Raises:
        DataError: the bytes are not text of that encoding, or of one that can be recognized.
    """
    if named is not None:
        try:
            codecs.lookup(named)
        except LookupError as error:
            raise DataError(
                f"There is no encoding '{named}'; set data.encoding to a name that Python knows, "
                "such as utf-8, utf-16, cp1252, gbk or shift_jis."
            ) from error
        if place := _undecodable(source, named):
            raise DataError(
                f"{source.place} is not text of the encoding '{named}' ({place}); set "
                "data.encoding to the right one."
            )
        return named, ()
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked == "utf-8-sig":
        name = "utf-8-sig"
    elif marked:
        name = marked
    else:
        name = _unmarked_utf16(head) or "utf-8"
    fault = _undecodable(source, name)
    if fault is None:
        if b"\x00" in head and name.startswith("utf-8"):
            raise DataError(_not_text(source))
        notice = f"{source.place} is read as {name.upper()}."
        return name, () if name.startswith("utf-8") else (notice,)
    return _western(source, fault)


def _not_text(source: Source) -> str:
    return (
        f"{source.place} is neither text nor a format that is read: Parquet, Arrow, JSON, JSON "
        "lines, CSV and TSV are, also compressed. Save the rows as one of these."
    )


def _unmarked_utf16(head: bytes) -> str | None:
    """UTF-16 without a byte order mark, by the zero bytes of its ASCII characters."""
    sample = head[:4096]
    half = len(sample) // 2
    if half < 8:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if odd > 0.5 * half and even < 0.05 * half:
        return "utf-16-le"
    return "utf-16-be" if even > 0.5 * half and odd < 0.05 * half else None


def _undecodable(source: Source, encoding: str) -> str | None:
    """Where the file's bytes are not text of this encoding, or None."""
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 1
    with source.bytes() as stream:
        while True:
            chunk = stream.read(_CHUNK_BYTES)
            try:
                lines += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeError as error:
                start = getattr(error, "start", 0)
                byte = f"byte {getattr(error, 'object', b'?')[start]:#04x}, " if start else ""
                before = chunk[:start].count(b"\n") if start < len(chunk) else 0
                return f"{byte}line {lines + before}"
            if not chunk:
                return None


def _western(source: Source, fault: str) -> tuple[str, tuple[str, ...]]:
    """Windows-1252 or Latin-1, if the bytes look like a language that is written in it.

    Raises:
        DataError: they do not, or most of the file is UTF-8.
    """
    with source.bytes() as stream:
        sample = stream.read(_CHUNK_BYTES)
    high = sum(byte >= 0x80 for byte in sample)
    letters = sum(sample.count(letter) for letter in string.ascii_letters.encode()) + high
    lost = sample.decode("utf-8", errors="replace").count("\ufffd")
    if high == 0 or any(byte in sample for byte in range(9)):
        raise DataError(_not_text(source))
    remedy = "save it as UTF-8, or set data.encoding to its encoding, such as cp1252 or gbk"
    if high > letters / 3 or lost * 2 <= high:
        raise DataError(f"{source.place} is not UTF-8 throughout ({fault}); {remedy}.")
    encoding = "cp1252" if not set(sample) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "latin-1"
    if place := _undecodable(source, encoding):
        raise DataError(
            f"{source.place} is not UTF-8 ({fault}) nor {encoding} ({place}); {remedy}."
        )
    words = sample.decode(encoding).split()
    word = next(word for word in words if not word.isascii())
    return encoding, (
        f"{source.place} is not UTF-8 and is read as {encoding} (for instance '{word[:30]}'); if "
        "that is wrong, set data.encoding.",
    )


def _delimiter(source: Source, text: str) -> tuple[str, tuple[str, ...]]:
    """The delimiter of a table in text: the one that cuts the first lines into equal rows.

    Raises:
        DataError: there is none, and the suffix does not say that the file is such a table.
    """
    lines = text.splitlines(keepends=True)
    if len(text) >= _HEAD_BYTES:
        lines = lines[:-1]
    best, widths = ",", (1, 0.0)
    for delimiter in _DELIMITERS:
        attempt = dataclasses.replace(source, delimiter=delimiter)
        rows = list(records_of(lines[:200], attempt))
        if not rows or len(rows[0]) < 2:
            continue
        equal = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        # The header alone decides between delimiters that fit equally well.
        if (equal, len(rows[0])) > (widths[1], widths[0]):
            best, widths = delimiter, (len(rows[0]), equal)
    suffixes = {suffix.lower() for suffix in source.path.suffixes}
    if widths[0] < 2 and not suffixes & {".csv", ".tsv", ".tab"}:
        raise DataError(
            f"{source.place} is text, but neither JSON nor a table with a header; rows are read "
            "from Parquet, Arrow, JSON, JSON lines, CSV and TSV. It begins with "
            f"{json.dumps(text[:40], ensure_ascii=False)}."
        )
    usual = {",", "\t"} if suffixes & {".tsv", ".tab", ".txt"} else {","}
    names = {"\t": "tabs", ";": "semicolons", "|": "vertical bars", ",": "commas"}
    notice = f"{source.place}: the columns are separated by {names[best]}."
    return best, () if best in usual else (notice,)


def first_record(source: Source) -> list[str]:
    """The header of a table in text."""
    with source.text() as stream:
        return next(records_of(stream, source), [])


def records_of(lines: Iterable[str], source: Source) -> Iterator[list[str]]:
    """The records of a table in text, its header first; empty lines are left out.

    Raises:
        DataError: the text cannot be such a table.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        yield from (record for record in csv.reader(lines, delimiter=source.delimiter) if record)
    except csv.Error as error:
        raise DataError(
            f"{source.place} cannot be read as a table in text ({error}); save it again as CSV."
        ) from error
