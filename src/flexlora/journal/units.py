"""Bytes, durations and numbers as text: one way for terminals, pages and tables."""

from __future__ import annotations

_UNITS = ((3, "GiB"), (2, "MiB"), (1, "KiB"))
NOTHING = "–"
"""What stands for a number that was not measured."""


def byte_unit(largest: float) -> tuple[int, str]:
    """The divisor and the name of the unit in which ``largest`` bytes read well."""
    for power, unit in _UNITS:
        if largest >= 1024**power:
            return 1024**power, unit
    return 1, "B"


def size(count: float) -> str:
    """Bytes in the unit that reads best, such as 17 B, 1.5 KiB or 3.00 GiB."""
    divisor, unit = byte_unit(count)
    digits = {"B": 0, "GiB": 2}.get(unit, 1)
    return f"{count / divisor:,.{digits}f} {unit}"


def duration(seconds: float | None, digits: int = 0) -> str:
    """A time of at most two units, such as 7 s, 1 min 01 s or 2 h 01 min; never negative.

    Below one minute it has this number of decimal ``digits``; whole units are not rounded up.
    """
    if seconds is None:
        return NOTHING
    seconds = max(seconds, 0.0)
    if seconds < 60 and digits:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def age(seconds: float) -> str:
    """A time in one unit, such as 98 s, 2 min, 5 h or 3 days, for glances; never negative."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length:,.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A number with this many decimals and its unit, a dash if there is none."""
    return NOTHING if value is None else f"{value:,.{digits}f}{unit}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun, such as 1 round or 2 rounds."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
