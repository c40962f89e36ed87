"""All laws on one method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flexlora.laws.case import Case, Violation
from flexlora.laws.laws import LAWS, Law
from flexlora.method import Method
from flexlora.storage import scratch


@dataclass(frozen=True)
class Verdict:
    """What one law says of a method; ``reason`` is empty where it holds."""

    law: Law
    outcome: Literal["holds", "exempt", "does not apply", "broken"]
    reason: str = ""


def verdicts(method: Method) -> Iterator[Verdict]:
    """Check every law on a method, some seconds in all; an error of a hook breaks the law.

    Laws that mean nothing for the method do not apply; those that it names in ``Info.exempt``
    are not checked.
    """
    for law in LAWS:
        with scratch("laws") as folder:
            yield verdict(method, law, folder)


def verdict(method: Method, law: Law, folder: Path) -> Verdict:
    """Check one law; ``folder`` is empty and may be written to."""
    if law.name in method.info.exempt:
        return Verdict(law, "exempt", method.info.exempt[law.name])
    case = Case(method, folder)
    try:
        if not law.applies(case):
            return Verdict(law, "does not apply")
        law.check(case)
    except Violation as violation:
        return Verdict(law, "broken", str(violation))
    except Exception as error:
        return Verdict(law, "broken", f"{type(error).__name__}: {error}")
    return Verdict(law, "holds")
