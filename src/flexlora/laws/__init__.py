"""The laws that every federated method must obey, and what checks a method against them."""

from flexlora.laws.case import Case, Violation
from flexlora.laws.laws import LAWS, Law
from flexlora.laws.run import Verdict, verdict, verdicts

__all__ = ["LAWS", "Case", "Law", "Verdict", "Violation", "verdict", "verdicts"]
