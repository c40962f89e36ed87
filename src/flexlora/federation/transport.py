"""The seam between the round loop and wherever the clients are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flexlora.federation.client_turn import TurnRequest
from flexlora.method import Method, State, Upload


@dataclass(frozen=True)
class Reply:
    """What a client sent: bytes, not yet looked at."""

    client: str
    data: bytes


@dataclass(frozen=True)
class Lost:
    """A client that did not reply, and why; ``forgot``: it has lost all that it had merged."""

    client: str
    reason: str
    forgot: bool = False


@dataclass(frozen=True)
class LateReply:
    """An answer that nobody waits for any more: one that came late, or twice."""

    client: str
    reason: str


@dataclass(frozen=True)
class TransportEvent:
    """What happens among real clients, for the journal: an event's name and its facts."""

    event: str
    facts: Mapping[str, Any]


Received = Reply | Lost | LateReply | TransportEvent
"""What an exchange tells."""


@dataclass(frozen=True)
class WaitPolicy:
    """How long a round waits: until so many seconds are over, or until it has ``enough``.

    ``seconds`` None is for ever. Who is not waited for any more is lost to the round.
    """

    seconds: float | None = None
    enough: Callable[[], bool] = lambda: False


class Transport(Protocol):
    """Carries jobs to clients and replies back."""

    @property
    def together(self) -> int:
        """How many consecutive jobs are worked on as one; 1 where clients do not meet."""
        ...

    def present(self, clients: Collection[str]) -> list[str]:
        """Those of these clients that can be asked now, in their order."""
        ...

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Received]:
        """One reply or loss for each job, as they arrive, in any order.

        Jobs are drawn when there is somebody to take them, so that not all downloads of a
        round are in memory at once. When it has enough, those still at work are not waited
        for; nothing is said of them.
        """
        ...


@runtime_checkable
class Aggregating(Protocol):
    """A federation whose workers take a part in the server's step too."""

    def aggregate(self, method: Method, state: State, uploads: Sequence[Upload]) -> State:
        """What the method's own ``aggregate`` finds, to the bit."""
        ...
