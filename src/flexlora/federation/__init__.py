"""One run: its clients, its rounds, and the transports that reach the clients."""

from flexlora.federation.client_store import Forgotten, Private
from flexlora.federation.client_turn import Job, Workplace, turn
from flexlora.federation.compare import FILES, Outcome
from flexlora.federation.population import Population
from flexlora.federation.transport import Federation, Heard, Lost, News, Patience, Reply, Stray

__all__ = [
    "FILES",
    "Federation",
    "Forgotten",
    "Heard",
    "Job",
    "Lost",
    "News",
    "Outcome",
    "Patience",
    "Population",
    "Private",
    "Reply",
    "Stray",
    "Workplace",
    "turn",
]
