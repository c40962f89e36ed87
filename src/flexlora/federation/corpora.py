"""Where rows come from, by the name in ``data.format``: the library's readers and installed ones.

Another package adds a reader by an entry point of the group ``flexlora.corpora``. Its name is the
format's, and its value names a function ``read(path, columns, seed) -> Corpus``, of
``data.path`` (a string or None), ``data.columns`` and the run's seed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from flexlora.data import Columns, Corpus
from flexlora.errors import ConfigError

GROUP = "flexlora.corpora"
SHIPPED = ("table", "natural-instructions", "hub", "procedural", "remote")
"""The formats of the library; "remote" says that the rows are with real clients."""

Reader = Callable[[str | None, Columns, int], Corpus]


def names() -> list[str]:
    """All formats, the library's first."""
    return [*SHIPPED, *sorted(_installed())]


def check(name: str) -> None:
    """Refuse a format that nothing reads.

    Raises:
        ConfigError: naming the formats that there are.
    """
    if name in names():
        return
    near = difflib.get_close_matches(name, names(), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if name.lower().strip(".") in ("csv", "tsv", "json", "jsonl", "parquet", "arrow", "file"):
        hint = ' Files are recognized by their content: set data.format = "table".'
    raise ConfigError(f"data.format is {name!r}.{hint} There are: {', '.join(names())}.")


def installed(name: str) -> Reader | None:
    """The reader of a format that another package adds; None for the library's own."""
    return None if name in SHIPPED else _reader(_installed()[name])


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _reader(point: EntryPoint) -> Reader:
    reader: Reader = point.load()
    if not callable(reader):
        raise ConfigError(
            f"The entry point {point.name!r} = {point.value!r} of the group {GROUP!r} is no "
            "function; it must name one of (path, columns, seed)."
        )
    return reader
