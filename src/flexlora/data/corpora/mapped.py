"""A corpus cached in a memory-mapped file, created once from its source."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from flexlora.data.corpus import Corpus
from flexlora.errors import DataError

FORMAT: Final = 2
"""Incremented when the content of such a file, or the way a source is read, changes."""

_DIGESTS: Final = b"flexlora.digests"
_NOTICES: Final = b"flexlora.notices"


def kept(
    cache: Path, sources: Iterable[Path], settings: Mapping[str, Any], make: Callable[[], Corpus]
) -> Corpus:
    """The corpus that ``make`` reads from ``sources`` with ``settings``, from the cache.

    The name of the cached file is a hash of the sources' content and the settings; if there is
    no such file, ``make`` is called and its result written. The columns are memory-mapped, so
    they take no private memory, and come with their digests. Cost of a lookup: one pass over
    the bytes of the sources, about a second per GiB.

    Raises:
        DataError: a source cannot be read, or the cached file is damaged. Errors of ``make``
            are passed on.
    """
    path = cache / f"corpus-{_key(sources, settings)}.arrow"
    if not path.exists():
        write(make(), path)
        pa.default_memory_pool().release_unused()
    return read(path)


def write(corpus: Corpus, path: Path) -> None:
    """Write a corpus with its digests to a temporary file and rename it to ``path``."""
    digests = {name: corpus.digest(name) for name in corpus.columns}
    table = corpus.table.replace_schema_metadata(
        {_DIGESTS: json.dumps(digests), _NOTICES: json.dumps(corpus.notices)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def read(path: Path) -> Corpus:
    """The corpus in a file written by ``write``, memory-mapped.

    Raises:
        DataError: the file is not a corpus of this format.
    """
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        digests = json.loads(table.schema.metadata[_DIGESTS])
        notices = tuple(json.loads(table.schema.metadata[_NOTICES]))
        corpus = Corpus(table.replace_schema_metadata(), digests, notices)
        if set(digests) != set(corpus.columns):
            raise DataError(f"it has digests of {', '.join(digests)} and other columns")
        return corpus
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The corpus in '{path}' cannot be read ({error}); delete the file, and the next run "
            "creates it again."
        ) from error


def _key(sources: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """The hash in a file's name, of everything that determines its content."""
    files = []
    for path in sources:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror}.") from error
        files.append([path.name, digest])
    text = json.dumps([FORMAT, files, dict(settings)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
