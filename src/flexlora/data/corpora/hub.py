"""A corpus from a dataset of the Hugging Face hub; needs the package ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from flexlora.data.corpora.table import Columns, corpus_of
from flexlora.data.corpus import SPLITS, Corpus
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
    default all splits are read and must have these names. If ``columns.split`` is None and
    the hub has several splits, they become the column; with one split there is none (see
    ``split_rows``). No code of the dataset is run.

    Raises:
        DataError: a split or column is missing or misnamed, or a value is null or ill-typed.
        ConfigError: the package ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"Reading '{name}' from the hub needs the package 'datasets'; install it with: "
            "pip install 'flexlora[hub]'."
        ) from error
    dataset = load_dataset(name, name=subset, revision=revision)
    place = f"The dataset '{name}'"
    chosen = dict(splits) if splits is not None else {split: split for split in dataset}
    _check_splits(chosen, list(dataset), place)
    tables = []
    for source, split in chosen.items():
        table = arrow(dataset[source])
        if columns.split is None and len(chosen) > 1:
            table = table.append_column("_split", pa.repeat(split, table.num_rows))
        tables.append(table)
    if columns.split is None and len(chosen) > 1:
        columns = replace(columns, split="_split")
    whole = pa.concat_tables(tables, promote_options="default")
    return corpus_of(whole, columns, place)


def arrow(dataset: Any) -> pa.Table:
    """The rows of a ``datasets.Dataset`` as an Arrow table, in the dataset's order."""
    table: pa.Table = dataset.with_format("arrow")[:]
    return table


def _check_splits(chosen: Mapping[str, str], available: list[str], place: str) -> None:
    for source, split in chosen.items():
        if source not in available:
            raise DataError(f"{place} has no split '{source}'; it has {', '.join(available)}.")
        if split not in SPLITS:
            raise DataError(
                f"{place}: the split '{source}' would become '{split}', which is not one of "
                f"{', '.join(SPLITS)}; map it, for example splits = {{'{source}': 'test'}}."
            )
