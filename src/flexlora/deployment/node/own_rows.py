"""The rows of a client, in a file on its machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flexlora.data import Columns, Corpus
from flexlora.data.corpora import table
from flexlora.errors import DataError, ProtocolError


def own_rows(data: Path, columns: Columns | None = None, rows_of: str | None = None) -> Corpus:
    """The rows in ``data``: those of the splits "train" and "validation", if it has splits.

    Raises:
        ProtocolError: there is none, or the file has rows of several clients.
    """
    try:
        corpus = table.read(data, columns)
    except DataError as error:
        option = " With `flexlora join`, --columns instruction=NAME,output=NAME names columns."
        raise DataError(f"{error}{option if 'data.columns' in str(error) else ''}") from error
    if "client" in corpus.columns:
        codes, clients = corpus.codes("client")
        if rows_of is not None:
            if rows_of not in clients:
                raise ProtocolError(f"{data} has no rows of client {rows_of!r}.")
            corpus = corpus.select(codes == list(clients).index(rows_of))
        elif len(clients) > 1:
            raise ProtocolError(
                f"{data} has rows of {len(clients)} clients ({', '.join(clients[:3])}, "
                "...); select one with --rows-of NAME."
            )
    elif rows_of is not None:
        raise ProtocolError(
            f"{data} has no column of client names, so --rows-of {rows_of} cannot "
            "select rows; leave it out, or name the column: --columns client=NAME,..."
        )
    corpus = corpus.select(in_split(corpus, "train") | in_split(corpus, "validation"))
    if not in_split(corpus, "train").any():
        raise ProtocolError(
            f"{data} has no training rows; check the values of its split column for 'train'."
        )
    return corpus


def in_split(corpus: Corpus, split: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are in a split; without splits all are for training."""
    if "split" not in corpus.columns:
        return np.full(len(corpus), split == "train")
    codes, splits = corpus.codes("split")
    return np.array([name == split for name in splits], np.bool_)[codes]
