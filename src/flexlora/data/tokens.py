"""Examples as token ids, encoded once and cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from flexlora.data.corpus import Corpus
from flexlora.data.encoding import Int32s, Tokens, bos_of, encode_all, eos_of, shorten
from flexlora.data.prompt import Prompt
from flexlora.data.prompts import named
from flexlora.errors import DataError
from flexlora.journal import Meter
from flexlora.storage import read_sealed, sha256, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT: Final = 3
"""Incremented when the files of a store or their content change."""

_ARRAYS: Final = ("ids", "offsets", "prompt_tokens")
"""The arrays of a store, each a file."""
_ROWS_AT_ONCE: Final = 4096

Int64s = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of a whole corpus, row by row, in flat arrays that may be memory-mapped.

    ``ids`` (tokens,) contains all rows one after the other, row i from ``offsets[i]`` to
    ``offsets[i + 1]``; ``offsets`` is (rows + 1,). The first ``prompt_tokens[i]`` ids of row i
    are its prompt. ``cut`` is the number of rows that were shortened, ``answers_cut`` of how many
    of these the response was, and ``empty`` the number of rows whose response is its end token
    alone. Four bytes per token.
    """

    ids: Int32s
    offsets: Int64s
    prompt_tokens: Int32s
    cut: int
    answers_cut: int = 0
    empty: int = 0

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        prompt_name: str,
        max_tokens: int,
        cache: Path | None,
        meter: Meter | None = None,
    ) -> TokenStore:
        """Encode the corpus, or open the store that an earlier call wrote to ``cache``.

        The name of a cached store is a hash of the corpus's content, the tokenizer, the prompt
        and ``max_tokens``. It is written to a temporary folder, renamed when complete, and
        memory-mapped; without ``cache`` the store is in memory. Rows are encoded in chunks of
        some thousands, so the memory for encoding is bounded; ``meter`` counts the rows.

        Raises:
            DataError: the tokenizer is not a fast one or has no EOS, a prompt has no tokens, or
                a cached store is damaged.
            ConfigError: the prompt is unknown, or does not suit the corpus or the tokenizer.
        """
        prompt = named(prompt_name, tokenizer)
        key = _key(corpus, tokenizer, prompt_name, max_tokens)
        if cache is not None and (cache / key).exists():
            return cls.open(cache / key)
        rows = _counted(_rows(corpus, prompt, tokenizer, max_tokens), len(corpus), meter)
        if cache is not None:
            _write(cache / key, rows)
            return cls.open(cache / key)
        ids, sizes = [np.empty(0, np.int32)], []
        for chunk_ids, chunk_sizes in rows:
            ids.append(chunk_ids)
            sizes.append(chunk_sizes)
        return cls(np.concatenate(ids), *_layout(sizes))

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in a folder written by ``build``, memory-mapped; read once, for its checksums.

        Raises:
            DataError: the folder has no store of this format, or a damaged one.
        """
        try:
            facts = read_sealed(folder / "facts.json")
            for name in _ARRAYS:
                if sha256(folder / f"{name}.npy") != facts["sums"][name]:
                    raise DataError(f"{name}.npy does not agree with its checksum")
            ids, offsets, prompt_tokens = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _ARRAYS
            )
            complete = facts["format"] == FORMAT and facts["tokens"] == len(ids) == offsets[-1]
            if (
                not complete
                or facts["rows"] != len(prompt_tokens)
                or len(offsets) != facts["rows"] + 1
            ):
                raise DataError(f"its files do not agree with facts.json, {facts}")
            counts = (int(facts[name]) for name in ("cut", "answers_cut", "empty"))
            return cls(ids, offsets, prompt_tokens, *counts)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"The token store in '{folder}' cannot be read ({error}); delete the folder, "
                "and the next run creates it again."
            ) from error

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def __getitem__(self, row: int) -> Tokens:
        if not 0 <= row < len(self):
            raise IndexError(
                f"The token store has no row {row}; its rows are 0 to {len(self) - 1}."
            )
        span = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Tokens(self.ids[span], int(self.prompt_tokens[row]))

    def notices(self, max_tokens: int) -> tuple[str, ...]:
        """Sentences for the user on rows that are not learnt as they are."""
        said = []
        if self.cut:
            said.append(
                f"{self.cut} of {len(self)} rows are longer than data.max_tokens = {max_tokens} "
                f"and are shortened, {self.answers_cut} of them in the response."
            )
        if self.empty:
            said.append(
                f"{self.empty} of {len(self)} rows have an empty response, of which only the end "
                "is learnt."
            )
        return tuple(said)

    @property
    def lengths(self) -> Int64s:
        """The number of tokens of each row, (rows,)."""
        return np.diff(self.offsets)


def _rows(
    corpus: Corpus, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Iterator[tuple[Int32s, Int64s]]:
    """Chunks of the corpus: the ids of its rows, concatenated, and an array (rows, 5) of their
    lengths, their prompt lengths, and whether they were cut, their response was, or is empty.
    """
    for start in range(0, len(corpus), _ROWS_AT_ONCE):
        examples = corpus.examples(range(start, min(start + _ROWS_AT_ONCE, len(corpus))))
        ids: list[int] = []
        sizes = []
        for prompt_ids, response_ids in encode_all(examples, prompt, tokenizer, start):
            row, prompt_tokens = shorten(prompt_ids, response_ids, max_tokens)
            ids += row
            cut = len(row) < len(prompt_ids) + len(response_ids)
            answer_cut = len(row) - prompt_tokens < len(response_ids)
            sizes.append((len(row), prompt_tokens, cut, answer_cut, len(response_ids) < 2))
        yield np.array(ids, np.int32), np.array(sizes, np.int64)


def _counted(
    chunks: Iterator[tuple[Int32s, Int64s]], rows: int, meter: Meter | None
) -> Iterator[tuple[Int32s, Int64s]]:
    """The same chunks, while ``meter`` counts their rows."""
    if meter is not None:
        meter.begin("tokenising", rows, "rows")
    for ids, sizes in chunks:
        yield ids, sizes
        if meter is not None:
            meter.advance(len(sizes))


def _layout(sizes: Sequence[Int64s]) -> tuple[Int64s, Int32s, int, int, int]:
    """Offsets (rows + 1,), prompt lengths (rows,) and the numbers of rows that were cut, whose
    response was, and whose response is empty, from the chunks' sizes of ``_rows``.
    """
    lengths, prompts, *flags = np.concatenate([np.empty((0, 5), np.int64), *sizes]).T
    cut, answers_cut, empty = (int(flag.sum()) for flag in flags)
    offsets = np.cumsum([0, *lengths.tolist()])
    return offsets, prompts.astype(np.int32), cut, answers_cut, empty


def _key(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, prompt_name: str, max_tokens: int
) -> str:
    """The name of a store: a hash of everything that determines its content.

    The prompt's template is included through its source.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"The tokenizer '{tokenizer.name_or_path}' is not a fast tokenizer; set model.name to "
            "a model folder that has a tokenizer.json."
        )
    # Padding and truncation are left over from the last call and do not belong to the tokenizer.
    described = json.loads(backend.to_str())
    described.update(padding=None, truncation=None)
    prompt = named(prompt_name, tokenizer)
    facts = {
        "format": FORMAT,
        "corpus": corpus.fingerprint(),
        "tokenizer": described,
        "ends": [bos_of(tokenizer), eos_of(tokenizer) if prompt.end is None else prompt.end],
        "prompt": [prompt_name, prompt.source],
        "max_tokens": max_tokens,
    }
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write(folder: Path, rows: Iterator[tuple[Int32s, Int64s]]) -> None:
    """Write the store to a temporary folder and rename it, so that it is never incomplete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        sizes = []
        with (partial / "ids.npy").open("wb") as file:
            body = _header(file, 0)
            for ids, size in rows:
                file.write(ids.tobytes())
                sizes.append(size)
            tokens = sum(int(size[:, 0].sum()) for size in sizes)
            file.seek(0)
            # NumPy pads the header so that the first axis can grow in place.
            if _header(file, tokens) != body:
                raise DataError(
                    f"The store of {tokens} tokens is too large for its file header; lower "
                    "data.max_tokens or read fewer rows."
                )
            _flush(file)
        offsets, prompt_tokens, *counts = _layout(sizes)
        arrays: tuple[tuple[str, np.ndarray[Any, Any]], ...] = (
            ("offsets", offsets),
            ("prompt_tokens", prompt_tokens),
        )
        for name, array in arrays:
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        facts = {"format": FORMAT, "rows": len(prompt_tokens), "tokens": tokens}
        facts |= dict(zip(("cut", "answers_cut", "empty"), counts, strict=True))
        sums = {name: sha256(partial / f"{name}.npy") for name in _ARRAYS}
        write_sealed(partial / "facts.json", {**facts, "sums": sums})
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished the same store first; its content is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _header(file: IO[bytes], tokens: int) -> int:
    """Write the header of an int32 array (tokens,); the byte offset of its data."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
