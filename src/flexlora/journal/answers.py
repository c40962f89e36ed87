"""Sample answers of a run, one JSON object a line: what the model wrote before and after training.

They are beside the journal, not in it: they contain rows of the data. With real clients these
are rows of the server's own test data only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.errors import ProtocolError
from flexlora.storage import write_atomically

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
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(answer)}\n" for answer in answers)

    def rewind(self, round: int) -> None:
        """Remove the answers of later rounds; those before training too if ``round`` is 0."""
        if self.path.exists():
            kept = [a for a in self.all() if 0 < round >= a["round"]]
            write_atomically(self.path, "".join(f"{json.dumps(a)}\n" for a in kept).encode())

    def all(self) -> Iterator[dict[str, Any]]:
        """The answers in order; a last line cut off by a crash is left out.

        Raises:
            ProtocolError: a line is not a JSON object with a round.
        """
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):
                yield self._answer(line, number)

    def _answer(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("round"), int):
            raise ProtocolError(
                f"Line {number} of {self.path} is not a sample answer; remove the line."
            )
        return answer
