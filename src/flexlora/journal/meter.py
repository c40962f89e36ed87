"""How far a long computation is, between two events of the journal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Meter:
    """What a computation is doing and how far it is: ``done`` of ``total`` ``unit``, or percent.

    The computation writes it and nothing waits for it. Whoever shows it reads it from another
    thread. ``stage`` is empty while nothing is measured, ``total`` 0 if the end is not known.
    """

    stage: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""

    def begin(self, stage: str, total: float = 0, unit: str = "") -> None:
        """Start a stage."""
        self.stage, self.done, self.total, self.unit = stage, 0, total, unit

    def advance(self, count: float = 1) -> None:
        """Count what has been done of the stage."""
        self.done += count

    def end(self) -> None:
        """End the stage; no other one has begun."""
        self.begin("")

    @property
    def share(self) -> float | None:
        """The part of the stage that is done, from 0 to 1; None if its end is not known."""
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def text(self) -> str:
        """The stage in words, such as ``tokenising: 4,096 of 12,000 rows`` or ``evaluating: 7 %``.

        In percent if the stage has no unit.
        """
        if self.share is None:
            return self.stage
        if not self.unit:
            return f"{self.stage}: {int(100 * self.share)} %"
        return f"{self.stage}: {min(self.done, self.total):,.0f} of {self.total:,.0f} {self.unit}"
