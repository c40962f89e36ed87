"""One run: its clients, its rounds, and the transports that reach the clients."""

from flexlora.federation.client_store import ClientStore, LostBase
from flexlora.federation.client_turn import ClientRuntime, TurnRequest, turn
from flexlora.federation.compare import FILES, Outcome
from flexlora.federation.holdout import HoldoutLoss, drawn, holdout_loss
from flexlora.federation.population import Population
from flexlora.federation.transport import (
    LateReply,
    Lost,
    Query,
    QueryAnswer,
    Received,
    Reply,
    Transport,
    TransportEvent,
    WaitPolicy,
)

__all__ = [
    "FILES",
    "ClientRuntime",
    "ClientStore",
    "HoldoutLoss",
    "LateReply",
    "Lost",
    "LostBase",
    "Outcome",
    "Population",
    "Query",
    "QueryAnswer",
    "Received",
    "Reply",
    "Transport",
    "TransportEvent",
    "TurnRequest",
    "WaitPolicy",
    "drawn",
    "holdout_loss",
    "turn",
]
