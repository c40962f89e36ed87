"""Sample answers of a run, one JSON object a line: what the model wrote before and after training.

They are beside the journal, not in it: they contain rows of the data. With real clients these
are rows of the server's own test data only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.journal.lines import checked_line, opened_line
from flexlora.storage import DamagedFile, append, write_atomically
from flexlora.storage.untrusted import short

ANSWERS = "answers.jsonl"
"""The file's name in the folder of a run."""

FIELDS: Mapping[str, str] = {
    "round": "the number of the round; 0 is before training",
    "adapter": "base, global, or the rank type that the global adapter was truncated to",
    "population": "seen: the client takes part in training; unseen: it is held out",
    "client": "the client's name",
    "category": "the row's category, or null",
    "prompt": "the end of the prompt, of at most 2,000 characters",
    "reference": "the row's output; of a long one its first 2,000 characters",
    "answer": "what the model wrote",
    "rouge_l": "Rouge-L of the answer, from 0 to 1",
    "exact_match": "whether the answer is the reference, ignoring case and outer blanks",
}
"""The fields of a line."""


@dataclass(frozen=True)
class SampleAnswers:
    """The sample answers of the run in ``folder``."""

    folder: Path

    @property
    def path(self) -> Path:
        """Their file, which exists once an evaluation has been made."""
        return self.folder / ANSWERS

    def append(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add these lines."""
        if answers:
            append(self.path, b"".join(map(checked_line, answers)))

    def rewind(self, round: int) -> int:
        """Remove the answers of later rounds; those before training too if ``round`` is 0.

        Returns how many damaged lines were removed as well.
        """
        if not self.path.exists():
            return 0
        kept, damaged = [], 0
        for line in self._lines():
            try:
                if 0 < round >= _answer(line)["round"]:
                    kept.append(line)
            except ValueError:
                damaged += 1
        write_atomically(self.path, b"".join(kept))
        return damaged

    def all(self) -> Iterator[dict[str, Any]]:
        """The answers in order; a last line cut off by a crash is left out.

        Raises:
            DamagedFile: a line is not an answer, or not as it was written.
        """
        if not self.path.exists():
            return
        for number, line in enumerate(self._lines(), 1):
            try:
                yield _answer(line)
            except ValueError as error:
                raise DamagedFile(
                    self.path,
                    f"has a damaged line, {number}",
                    sentence=f"Line {number} of {self.path} is not a sample answer "
                    f"({short(error)}); remove the line.",
                ) from error

    def _lines(self) -> Iterator[bytes]:
        lines = self.path.read_bytes().splitlines(keepends=True)
        return (line for line in lines if line.endswith(b"\n"))


def _answer(line: bytes) -> dict[str, Any]:
    answer = opened_line(line)
    if not isinstance(answer.get("round"), int):
        raise ValueError("it has no round")
    return answer
