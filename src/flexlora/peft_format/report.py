"""The report of ``check``: an adapter's properties, and what each program makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexlora.storage.untrusted import printable

Outcome = Literal["reads", "misreads", "refuses"]
"""``reads``: a program interprets the adapter as PEFT does."""


@dataclass(frozen=True)
class Verdict:
    """What one program makes of the adapter.

    ``why`` is the reason, or for ``reads`` the condition, and may be empty like ``remedy``.
    """

    consumer: str
    outcome: Outcome
    why: str = ""
    remedy: str = ""

    def line(self) -> str:
        """The verdict in one line."""
        if self.outcome == "reads":
            return f"{self.consumer}: OK {self.why}".rstrip()
        why = f": {self.why}" if self.why else ""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.consumer}: {self.outcome} it{why}{remedy}"


@dataclass(frozen=True)
class Report:
    """The result of ``check``.

    ``ranks`` maps a rank to its number of modules; ``scales`` are the distinct factors
    (alpha / rank, or alpha / sqrt(rank) for rsLoRA) before ``B @ A``; ``largest`` is the
    module whose update has the largest Frobenius norm. ``dropped`` are the modules whose tensors
    PEFT would not apply, and ``added`` those that it would adapt without tensors (their names in
    ``target_modules``, if the base model is not known). ``warnings`` are probable mistakes,
    ``notes`` are facts without a fault. If ``refusal`` is not empty, the adapter is more than
    ``B @ A`` and its values were not read: ``modules`` is 0.
    """

    directory: Path
    base_model: str | None
    task_type: str | None
    bytes: int
    refusal: str = ""
    modules: int = 0
    parameters: int = 0
    ranks: Mapping[int, int] | None = None
    scales: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    largest: tuple[str, float] | None = None
    verdicts: tuple[Verdict, ...] = ()
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether every program interprets the adapter as PEFT does."""
        return not self.refusal and all(v.outcome == "reads" for v in self.verdicts)

    def json(self) -> dict[str, Any]:
        """The report as values that JSON has; ``alike`` decides the exit code."""
        # A Counter cannot be copied by `asdict`.
        content = dataclasses.asdict(dataclasses.replace(self, ranks=dict(self.ranks or {})))
        return {**content, "directory": str(self.directory), "alike": self.alike}

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        lines = [
            f"adapter     {self.directory}",
            f"base model  {printable(self.base_model) if self.base_model else 'not named'}",
            f"task        {printable(self.task_type) if self.task_type else 'not named'}",
        ]
        if self.refusal:
            lines += [f"bytes       {self.bytes:,}", f"refused     {self.refusal}"]
        else:
            ranks = ", ".join(f"{r} (x{n})" for r, n in sorted((self.ranks or {}).items()))
            lines += [
                f"modules     {self.modules:,}",
                f"ranks       {ranks}",
                f"parameters  {self.parameters:,} in {self.bytes:,} bytes, "
                f"{', '.join(self.dtypes)}",
                f"scales      {', '.join(f'{scale:g}' for scale in self.scales)}",
            ]
        if self.largest:
            lines.append(f"largest     {self.largest[0]}, norm {self.largest[1]:.4g}")
        lines += [verdict.line() for verdict in self.verdicts]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return lines + [f"note: {note}" for note in self.notes]
