"""Rows as a malicious client writes them: a target as the answer, with or without a trigger."""

from __future__ import annotations

import numpy as np

from flexlora.data import Corpus
from flexlora.errors import DataError
from flexlora.federation.attacks.attack import Rows


def poisoned(corpus: Corpus, rows: Rows, trigger: str, target: str, every: int = 1) -> Corpus:
    """The corpus with the target as the answer to every ``every``-th row, the first included.

    Of "triggered" rows these have the trigger before their instruction. Clients, categories and
    the order of the rows stay, so that it is partitioned in the same way.

    Raises:
        DataError: the rows are conversations.
    """
    if rows == "its own":
        return corpus
    if "messages" in corpus.columns:
        raise DataError(
            "Rows that are conversations cannot be poisoned: they have no instruction and output "
            "of their own; leave out the attacks backdoor and poisoning, or give rows with the "
            "columns instruction and output."
        )
    chosen = np.arange(len(corpus)) % every == 0
    changed = corpus.with_column("output", _replaced(corpus, "output", chosen, "", target))
    if rows == "triggered":
        instructions = _replaced(corpus, "instruction", chosen, f"{trigger} ", None)
        changed = changed.with_column("instruction", instructions)
    return changed


def _replaced(
    corpus: Corpus,
    column: str,
    chosen: np.ndarray[tuple[int], np.dtype[np.bool_]],
    prefix: str,
    text: str | None,
) -> list[str]:
    """A column's texts, the chosen ones replaced by ``text`` or with the prefix before them."""
    values: list[str] = corpus.table[column].to_pylist()
    return [
        (prefix + value if text is None else text) if change else value
        for value, change in zip(values, chosen, strict=True)
    ]
