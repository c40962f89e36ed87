"""Damage to the files of a run, of many kinds; each is drawn from a generator."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

Damage = Callable[[Path, Sequence[Path], random.Random], Path | None]
"""Damages a file; returns a second one that it has damaged as well."""


def flip(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """One bit."""
    data = bytearray(path.read_bytes())
    if not data:
        return append(path, others, draw)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    put(path, bytes(data))


def cut(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """The end is missing."""
    data = path.read_bytes()
    put(path, data[: draw.randrange(max(len(data), 1))])


def hole(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """A part within is missing."""
    data = path.read_bytes()
    start = draw.randrange(len(data) + 1)
    put(path, data[:start] + data[start + draw.randrange(1, 200) :])


def zero(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """A block of zeros, as of a disk that lost a write."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data) + 1)
    end = min(start + draw.choice([1, 64, 4096]), len(data))
    data[start:end] = bytes(end - start)
    put(path, bytes(data))


def swap(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """The contents of two files are exchanged."""
    other = draw.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    put(path, two)
    put(other, one)
    return other


def delete(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    path.unlink()


def duplicate(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """The content twice, or the file also under the name of another one beside it."""
    data = path.read_bytes()
    if draw.random() < 0.5:
        put(path, data + data)
    else:
        path.with_name(draw.choice(["00009.safetensors", f"{path.name} (copy)"])).write_bytes(data)


def empty(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    put(path, b"")


def append(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    put(path, path.read_bytes() + draw.randbytes(draw.choice([1, 50])))


def instead(path: Path, others: Sequence[Path], draw: random.Random) -> Path | None:
    """The content of another file."""
    put(path, draw.choice(others).read_bytes())


KINDS: tuple[Damage, ...] = (
    flip,
    cut,
    hole,
    zero,
    swap,
    delete,
    duplicate,
    empty,
    append,
    instead,
)


def put(path: Path, data: bytes) -> None:
    """Write over a file in place: other names of it, hard links, see the damage too."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate(len(data))
