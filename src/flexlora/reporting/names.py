"""Names from a journal: their order, and how they are shortened."""

from __future__ import annotations

import re
from typing import Any


def natural(name: str) -> list[Any]:
    """A key that sorts client-10 after client-9.

    Digits are compared by their number and then as text: very long integers are refused by Python.
    """
    parts = re.split("([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]


def shortened(text: str, longest: int = 60) -> str:
    """A text on one line, cut at its end; dots show that something is left out.

    Characters that are not visible, such as those that reverse the direction of a text, are
    replaced by a visible one.
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
