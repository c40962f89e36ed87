"""A corpus from a dataset of the Hugging Face hub; needs the package ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexlora.data.columns import Columns
from flexlora.data.corpora.objects import exported
from flexlora.data.corpora.table import of_splits
from flexlora.data.corpus import Corpus
from flexlora.errors import ConfigError, DataError


def read(
    name: str,
    columns: Columns,
    *,
    subset: str | None = None,
    revision: str | None = None,
    splits: Mapping[str, str] | None = None,
) -> Corpus:
    """The dataset ``name`` of the hub (or in a folder of that name), at ``revision`` if given.

    ``splits`` maps the hub's splits to train, validation or test, and only these are read; by
    default all splits are read by their names. Several splits become the column ``split``, unless
    ``columns.split`` names another one. No code of the dataset is run.

    Raises:
        DataError: a split or column is missing or misnamed, a value cannot be used, or the
            dataset cannot be loaded.
        ConfigError: the package ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        own = ' A folder or file is read without it: data.format = "table".'
        raise ConfigError(
            f"Reading '{name}' from the hub needs the package 'datasets'; install it with: "
            f"pip install 'flexlora[hub]'.{own if Path(name).exists() else ''}"
        ) from error
    place = f"The dataset '{name}'"
    try:
        dataset = load_dataset(name, name=subset, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise DataError(
            f"{place} cannot be loaded from the hub ({type(error).__name__}: {reason}); check "
            'data.path and the connection, or download it and set data.format = "table".'
        ) from error
    chosen = {split: split for split in dataset} if splits is None else dict(splits)
    for source in chosen:
        if source not in dataset:
            raise DataError(f"{place} has no split '{source}'; it has {', '.join(dataset)}.")
    tables = [(split, exported(dataset[source])) for source, split in chosen.items()]
    return of_splits(tables, columns, place)
