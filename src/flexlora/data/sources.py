"""The files of rows behind a path: one file, a pattern, a folder of shards, a saved dataset."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexlora.data.format import Source, recognize
from flexlora.errors import DataError
from flexlora.storage import expanded

SPLIT_NAMES: Final[Mapping[str, str]] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
"""The split that a name of a split stands for."""

_KINDS: Final = ((".parquet", ".pq"), (".arrow",), (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"))
"""Suffixes of files of rows in a folder, of which the first kind that occurs is read."""

_COMPRESSIONS: Final = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_METADATA: Final = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def sources_of(path: str | Path, encoding: str | None = None) -> list[Source]:
    """The files of rows at a path, which may be a pattern such as ``"rows/*.jsonl"``.

    Of a folder all files of rows are read, also in its subfolders, except those whose name
    begins with a dot or an underscore; a folder ``name=value`` (as Spark writes) is a column.
    If the files or subfolders of a folder have names of splits (``train-00000.parquet``), these
    are the column ``split``. A folder that ``datasets`` saved is read by what it says of itself.

    Raises:
        DataError: there is no file of rows, or one of a kind that is not read.
    """
    path = expanded(path, "data.path")
    if address := re.search(r"\w{2,}:/.*", str(path)):
        raise DataError(
            f"data.path is an address ('{address[0]}'); download the file first, or name a dataset "
            'of the Hugging Face hub with data.format = "hub".'
        )
    if path.is_dir():
        return _of_folder(path, encoding)
    if not path.exists() and glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"No file matches '{path}'; correct data.path.")
        return [recognize(file, encoding) for file in files]
    return [recognize(path, encoding)]


def _of_folder(folder: Path, encoding: str | None) -> list[Source]:
    if (folder / "dataset_dict.json").is_file():
        splits = [str(split) for split in _saved(folder / "dataset_dict.json", "splits")]
        if len(splits) == 1:
            return _of_dataset(folder / splits[0])
        return [
            _with(source, {"split": split_name(split, f"'{folder}'")})
            for split in splits
            for source in _of_dataset(folder / split)
        ]
    if (folder / "state.json").is_file():
        return _of_dataset(folder)
    files, unread = _files(folder)
    if not files:
        names = sorted(each.name for each in folder.iterdir())
        content = f"it contains {', '.join(names[:5])}" if names else "it is empty"
        raise DataError(
            f"The folder '{folder}' has no file of rows ({content}); rows are in files .parquet, "
            ".arrow, .jsonl, .json, .csv or .tsv, also compressed."
        )
    columns = [_constants(file.relative_to(folder)) for file in files]
    found = [
        _with(recognize(file, encoding), values)
        for file, values in zip(files, columns, strict=True)
    ]
    if unread:
        notice = (
            f"'{folder}': only the files {files[0].suffix} are read, not {unread[0].name}"
            + (f" and {len(unread) - 1} more" if len(unread) > 1 else "")
            + "; set data.path to those that are meant."
        )
        found[0] = dataclasses.replace(found[0], notices=(*found[0].notices, notice))
    return _with_splits(found, folder)


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of the first kind that occurs in a folder, and those of other kinds."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        and path.name not in _METADATA
    ]
    kinds = [[path for path in files if _suffix(path) in kind] for kind in _KINDS]
    chosen = next((kind for kind in kinds if kind), [])
    others = [path for kind in kinds for path in kind if kind is not chosen]
    return chosen, others


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _of_dataset(folder: Path) -> list[Source]:
    """The files of one dataset that ``datasets.Dataset.save_to_disk`` wrote."""
    files = [
        folder / str(each["filename"]) for each in _saved(folder / "state.json", "_data_files")
    ]
    if any(file.resolve().parent != folder.resolve() for file in files):
        raise DataError(
            f"'{folder / 'state.json'}' names a file outside of its folder; correct it."
        )
    return [recognize(file) for file in files]


def _saved(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{path}' is not the file that datasets writes: it has no list '{key}'; save the "
            "dataset again with save_to_disk."
        ) from error


def split_name(name: str, place: str) -> str:
    """The split that a dataset's own name of one stands for.

    Raises:
        DataError: it is not a usual name.
    """
    if name.casefold() not in SPLIT_NAMES:
        raise DataError(
            f"{place} has the split '{name}', which is not one of {', '.join(SPLIT_NAMES)}; rename "
            "it, or read one split alone."
        )
    return SPLIT_NAMES[name.casefold()]


def _constants(path: Path) -> dict[str, str]:
    """The columns that folders ``name=value`` on a relative path say."""
    parts = (part.partition("=") for part in path.parts[:-1])
    return {name: value for name, equals, value in parts if equals and name}


def _with(source: Source, constants: Mapping[str, str]) -> Source:
    return dataclasses.replace(source, constants={**source.constants, **constants})


def _with_splits(found: list[Source], folder: Path) -> list[Source]:
    """The files with their splits, if every file's name or subfolder begins with one."""
    splits = [_split_of(source.path.relative_to(folder)) for source in found]
    if not all(splits) or len(set(splits)) < 2:
        return found
    notice = f"'{folder}': the names of the files say which rows are for training and for tests."
    marked = [_with(s, {"split": str(split)}) for s, split in zip(found, splits, strict=True)]
    marked[0] = dataclasses.replace(marked[0], notices=(*marked[0].notices, notice))
    return marked


def _split_of(path: Path) -> str | None:
    for part in (path.name, *path.parts[:-1]):
        word = re.split(r"[-_.]", part.casefold(), maxsplit=1)[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None
