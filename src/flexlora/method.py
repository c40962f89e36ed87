"""What a federated method decides in one round, and the values it decides on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from flexlora.adapter import Adapter, Factors


@dataclass(frozen=True)
class Client:
    """A data owner as the server knows it.

    ``ranks`` is its budget by module path; ``rank_type`` names that budget in reports;
    ``examples`` is how many training rows it says it has.
    """

    id: str
    ranks: Mapping[str, int] = field(repr=False)
    rank_type: str
    examples: int


@dataclass(frozen=True)
class Download:
    """What a client starts its turn from."""

    adapter: Adapter


@dataclass(frozen=True)
class Upload:
    """What a client returns: its trained adapter and how many examples it trained on.

    ``facts`` are numbers for the record (seconds, tokens, losses); no method reads them.
    """

    client: str
    round: int
    adapter: Adapter
    examples: int
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """All that a server remembers between rounds: adapters by name, and facts fit for JSON."""

    adapters: Mapping[str, Adapter]
    facts: Mapping[str, Any] = field(default_factory=dict)


Draw = Callable[[str], np.random.Generator]
"""The randomness of one module in one round, the same for every client."""


class Method(ABC):
    """A federated method, client's half and server's half: the plug-in.

    A kind is a frozen dataclass in a file of its own under ``methods/``; the file's name is
    the method's name, its fields are its hyper-parameters and so its section of the config.
    Everything remembered is in ``State``, which is passed in and returned; inputs are
    never changed.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool]
    """Whether the aggregate's product is the weighted mean of the clients' products, up to
    the rank that the server keeps."""
    mixed_ranks: ClassVar[bool]
    """Whether clients may differ in rank; if not, such a federation is refused at start."""

    def start(self, adapter: Adapter) -> State:
        """The server's state before the first round, from a fresh adapter of the largest ranks."""
        return State({"global": adapter}, {"ranks": adapter.ranks})

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """What ``client`` starts from: the global adapter's first terms, at the client's rank."""
        return Download(at_ranks(state.adapters["global"], client.ranks, draw))

    def penalty(self, now: Mapping[str, Factors]) -> Tensor | None:
        """A term added to the client's loss at every step, differentiable in ``now``."""
        return None

    def returns(self, start: Adapter, trained: Adapter) -> Adapter:
        """What the client sends back, from what it started with and what it trained."""
        return trained

    @abstractmethod
    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The next state. ``uploads`` are in cohort order, at least one, all validated.

        Adapters may be read from disk module by module: go through the modules once, in
        the order of ``state``, and hold no more than one module's stack.
        """

    def update(self, state: State) -> Adapter:
        """The global adapter, for evaluation and export."""
        return state.adapters["global"]


def at_ranks(adapter: Adapter, ranks: Mapping[str, int], draw: Draw) -> Adapter:
    """Each module's first terms at the rank asked for, with fresh ones where it has fewer."""
    return Adapter(
        {
            module: (
                factors.first(ranks[module])
                if ranks[module] <= factors.rank
                else factors.widened(ranks[module], draw(module))
            )
            for module, factors in adapter.items()
        }
    )


def shares(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; equal shares if all are zero."""
    total = sum(weights)
    if total == 0:
        return [1 / len(weights)] * len(weights)
    return [weight / total for weight in weights]
