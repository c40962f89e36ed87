"""What the round loop needs of the place where its clients are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flexlora.federation.client_turn import TurnRequest
from flexlora.journal import LossKind
from flexlora.method import Cohort, Method, RoundContext, State


@dataclass(frozen=True)
class Reply:
    """What a client sent: bytes, not checked yet."""

    client: str
    data: bytes


@dataclass(frozen=True)
class Lost:
    """A client whose upload the round goes on without, and why.

    Programs read the ``kind``, and of an invalid upload the ``code``, a ``RefusalCode``; the
    ``reason`` is a sentence for people. ``lost_base``: the client has lost all base updates that it
    had merged.
    """

    client: str
    reason: str
    kind: LossKind
    lost_base: bool = False
    code: str = ""


@dataclass(frozen=True)
class LateReply:
    """A reply that no round waits for any more: one that came late, or twice."""

    client: str
    reason: str


@dataclass(frozen=True)
class TransportEvent:
    """What happens among real clients, for the journal: an event's name and its fields."""

    event: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """A request to a client that trains nothing, such as to evaluate an adapter.

    ``payload`` is an adapter as it travels; ``facts`` are values of JSON for the client.
    """

    client: str
    round: int
    payload: bytes
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class QueryAnswer:
    """What a client answered to a query: values of JSON, not checked yet."""

    client: str
    facts: Mapping[str, Any]


Received = Reply | Lost | LateReply | TransportEvent
"""What an exchange yields."""


@dataclass(frozen=True)
class WaitPolicy:
    """How long a round waits: until so many seconds are over, or until it has ``enough``.

    ``seconds`` None means no limit. A client that is not waited for any more is lost.
    """

    seconds: float | None = None
    enough: Callable[[], bool] = lambda: False


class Transport(Protocol):
    """Carries requests to clients and replies back."""

    @property
    def clients_at_once(self) -> int:
        """How many consecutive requests are worked on as one; 1 where clients do not meet."""
        ...

    def present(self, clients: Collection[str]) -> list[str]:
        """Those of these clients that a request can reach now, in their order."""
        ...

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Received]:
        """One reply or loss for each request, as they arrive, in any order.

        Requests are drawn when a client can take them, so that not all downloads of a round
        are in memory at once. Once the policy has enough, clients still at work are not waited
        for, and nothing is yielded for them.
        """
        ...


@runtime_checkable
class Evaluating(Protocol):
    """A transport whose clients evaluate an adapter on rows of their own."""

    def evaluators(self) -> list[str]:
        """The clients that can be reached now and have held out rows."""
        ...

    def evaluate(
        self, queries: Iterable[Query], patience: WaitPolicy
    ) -> Iterator[QueryAnswer | Lost | LateReply | TransportEvent]:
        """One answer or loss for each query, as they arrive, in any order."""
        ...


@runtime_checkable
class Aggregating(Protocol):
    """A transport whose workers take a part in the server's step too."""

    def aggregate(
        self, method: Method, state: State, cohort: Cohort, context: RoundContext
    ) -> State:
        """What the method's own ``aggregate`` returns, to the bit."""
        ...
