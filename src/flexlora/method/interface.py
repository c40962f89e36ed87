"""What a federated method decides in one round, and the values it decides on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flexlora.lowrank import Adapter, Factors, Form, Halves
from flexlora.seeds import rng


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
    """What a client starts from, as it travels; ``Method.receive`` completes it.

    The client trains ``adapter``, or one of its ``halves``, at ``rate`` times the learning
    rate. ``rest`` is added to its base for this turn, ``merge`` for good: each entry has the
    number of the round that made it, and holds all that the client has not merged yet, so
    that one who missed rounds needs nothing special; ``held`` are the rounds whose entries it
    has merged already, as the server knows it. ``terms`` says which of the server's
    terms the adapter's are, by module; the upload repeats it. ``extra`` and ``facts`` are the
    method's own.
    """

    adapter: Adapter
    rest: Adapter | None = None
    merge: Mapping[int, Adapter] = field(default_factory=dict)
    halves: Halves = "BA"
    rate: float = 1.0
    terms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    extra: Mapping[str, Adapter] = field(default_factory=dict)
    facts: Mapping[str, int] = field(default_factory=dict)
    held: Sequence[int] = ()


@dataclass(frozen=True)
class Upload:
    """What a client returns: what it learnt and how many examples it trained on.

    ``facts`` are numbers for the record (seconds, tokens, losses); no method reads them.
    """

    client: str
    round: int
    adapter: Adapter
    examples: int
    facts: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """What an upload may hold of one module: a shape (out, in), and the ranks allowed.

    ``terms`` is how many terms the server has to number; None where an upload numbers none.
    """

    shape: tuple[int, int]
    least: int
    most: int
    terms: int | None = None


@dataclass(frozen=True)
class Fresh:
    """Where fresh adapters come from, on either side: ``B`` zero, ``A`` LoRA's start.

    ``common`` is the same for every client in every round, and that of fewer ranks is a
    part of that of more; ``own`` is that of this client in this round alone.
    """

    shapes: Mapping[str, tuple[int, int]]
    seed: int
    client: str = ""
    round: int = 0

    def common(self, ranks: Mapping[str, int]) -> Adapter:
        """The run's own start, at these ranks."""
        return self._drawn(ranks, "start")

    def own(self, ranks: Mapping[str, int]) -> Adapter:
        """A start that nobody else has."""
        return self._drawn(ranks, "start", self.client, self.round)

    def _drawn(self, ranks: Mapping[str, int], *address: str | int) -> Adapter:
        modules = {}
        for module, rank in ranks.items():
            out, in_ = self.shapes[module]
            nothing = Factors(torch.zeros(out, 0), torch.zeros(0, in_))
            modules[module] = nothing.widened(rank, rng(self.seed, *address, module))
        return Adapter(modules)


@dataclass(frozen=True)
class State:
    """All that a server remembers between rounds: adapters by name, and facts fit for JSON."""

    adapters: Mapping[str, Adapter]
    facts: Mapping[str, Any] = field(default_factory=dict)


Draw = Callable[[str], np.random.Generator]
"""The randomness of one round by name, of a module for instance, the same for every client."""


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
    rank_wise: ClassVar[bool] = False
    """Whether that mean is taken term by term, over the clients that hold the term."""
    mixed_ranks: ClassVar[bool]
    """Whether clients may differ in rank; if not, such a federation is refused at start."""

    up: ClassVar[str]
    """How many numbers travel up for a module (m, n): a formula in m, n and the client's rank
    r, the largest rank R, the cohort's summed rank S and number K, the rank p that an energy
    leaves, the mean number b of terms that a budget gives a module, and the numbers c of a
    column of what is trained in place of factors. "or" parts rounds, "then" stages."""
    down: ClassVar[str]
    """The same of what travels down to a client that took part in the last round."""
    server: ClassVar[str]
    """What the server computes for a module, in words."""
    probes: ClassVar[bool] = False
    """Whether a client trains one epoch on all it was handed, to choose from it."""
    personal: ClassVar[bool] = False
    """Whether each client's model is its own by design, made of what it keeps."""
    product: ClassVar[bool] = False
    """Whether the state's "global" is a product that any other of its ranks may replace; then
    the options of ``aggregation.Decomposing`` are the method's."""
    fixed_frame: ClassVar[bool] = False
    """Whether term j of all clients is the same and keeps its meaning from round to round, so
    that gradients in the factors may be averaged over both."""
    sparse: ClassVar[bool] = False
    """Whether messages hold so many zeros that they travel without them."""
    by_module: ClassVar[bool] = False
    """Whether each module is aggregated by itself, whatever the others are: then parts of a state
    may be aggregated apart, to the same bits, and clients may train different modules."""

    @property
    def by_rank_alone(self) -> bool:
        """Whether clients of the same ranks are handed the same, which is then made once."""
        return type(self).handout is Method.handout

    def start(self, adapter: Adapter) -> State:
        """The server's state before the first round, from a fresh adapter of the largest ranks."""
        return State({"global": adapter}, {"ranks": adapter.ranks})

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """What ``client`` starts from: the global adapter's first terms, at the client's rank."""
        return Download(at_ranks(state.adapters["global"], client.ranks, draw))

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """On the client: the download with what did not need to travel, or never does.

        ``kept`` is what the client kept of its last turn. The adapter returned has the base
        model's shapes.
        """
        return download

    def choose(self, download: Download, probed: Adapter) -> Mapping[str, Sequence[int]]:
        """On the client, where the method ``probes``: the terms to train, by module."""
        return {module: range(f.rank) for module, f in download.adapter.items()}

    def form(self, start: Download) -> Mapping[str, Form] | None:
        """On the client: the parameters that it trains instead of ``B`` and ``A``, by module.

        None: the factors themselves. With forms, ``halves`` and the LoRA scale have no part,
        and as ``trained`` ``shares`` and ``keeps`` are given the parameters, each module's
        as a ``column``.
        """
        return None

    def penalty(self, now: Mapping[str, Factors], start: Download) -> Tensor | None:
        """A term added to the client's loss at every step, differentiable in ``now``."""
        return None

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """What the client sends back, from what it started with and what it trained.

        ``start.facts`` also say how many "steps" it made, and in which "round".
        """
        return trained

    def keeps(self, start: Download, trained: Adapter) -> Adapter | None:
        """What the client keeps to itself until its next turn."""
        return None

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """What ``client``'s upload may hold, by module; anything else is refused."""
        return {
            module: Expected(
                shape, 1 if self.mixed_ranks else client.ranks[module], client.ranks[module]
            )
            for module, shape in shapes.items()
        }

    @abstractmethod
    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The next state. ``uploads`` are in cohort order, at least one, all validated.

        Adapters may be read from disk module by module: go through the modules once, in
        the order of ``state``, and hold no more than one module's stack.
        """

    def update(self, state: State) -> Adapter:
        """The global adapter, relative to the untouched base, for evaluation and export."""
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
