"""Sample answers of a run as rows: what the model wrote before and after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BASE, _GLOBAL = "base", "global"


@dataclass(frozen=True)
class SampleRow:
    """One question with the answers before and after training; ``before`` may be missing.

    ``rouge_before`` and ``rouge_after`` are Rouge-L in percent.
    """

    client: str
    group: str
    category: str
    round: int
    prompt: str
    reference: str
    before: str | None
    after: str
    rouge_before: float | None
    rouge_after: float | None

    @property
    def gain(self) -> float:
        """The change in Rouge-L, in points; 0 if it was not measured before or after."""
        if self.rouge_before is None or self.rouge_after is None:
            return 0.0
        return self.rouge_after - self.rouge_before


def sample_table(answers: Iterable[dict[str, Any]]) -> list[SampleRow]:
    """The questions that the global adapter answered last, each with the base model's answer."""
    before: dict[tuple[str, str], dict[str, Any]] = {}
    after: dict[tuple[str, str], dict[str, Any]] = {}
    last = 0
    for answer in answers:
        key = (str(answer.get("client")), str(answer.get("prompt")))
        number = answer["round"]
        if answer.get("adapter") == _BASE:
            before[key] = answer
        elif answer.get("adapter") == _GLOBAL and number >= last:
            if number > last:
                last, after = number, {}
            after[key] = answer
    return [_row(key, before.get(key), answer) for key, answer in after.items()]


def chosen_samples(rows: Sequence[SampleRow], most: int) -> list[SampleRow]:
    """At most this many rows, from the greatest gain in Rouge-L to the greatest loss.

    They are spread evenly over all rows, so that bad answers are shown as well as good ones.
    """
    ordered = sorted(rows, key=lambda row: (-row.gain, row.client, row.prompt))
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


def _row(key: tuple[str, str], before: dict[str, Any] | None, after: dict[str, Any]) -> SampleRow:
    return SampleRow(
        client=key[0],
        group=str(after.get("population") or ""),
        category=str(after.get("category") or ""),
        round=after["round"],
        prompt=key[1],
        reference=str(after.get("reference", "")),
        before=None if before is None else str(before.get("answer", "")),
        after=str(after.get("answer", "")),
        rouge_before=None if before is None else _percent(before),
        rouge_after=_percent(after),
    )


def _percent(answer: dict[str, Any]) -> float | None:
    value = answer.get("rouge_l")
    return 100 * value if isinstance(value, int | float) else None
