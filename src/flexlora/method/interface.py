"""What a federated method decides in one round, and the values it decides on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flexlora.lowrank import Adapter, FactorNames, Factors, Parametrization
from flexlora.method.merge_log import MergeLog
from flexlora.method.truncation import Truncation
from flexlora.seeds import rng

if TYPE_CHECKING:
    from flexlora.method.averager import Cohort, Mean, Weights

Json = Any
"""A value that JSON can hold."""


class Feature(StrEnum):
    """What a method supports or does; what a method does not name is refused or not done."""

    MIXED_RANKS = "mixed ranks"
    """Clients may differ in rank."""
    PER_MODULE = "aggregation by module"
    """Each module is aggregated by itself, whatever the others are. Then parts of the modules can
    be aggregated apart, to the same bits, and clients may train different modules."""
    PRODUCT_STATE = "a model that is a product"
    """``State.model`` may be replaced by any other product of its ranks, as a server optimiser
    does; it is truncated as ``Method.truncation`` says."""
    COMMON_FACTORS = "common factors"
    """Component j is the same for all clients and keeps its meaning from round to round, so that
    gradients in the factors may be averaged over both."""
    SAME_FOR_EQUAL_RANKS = "one download for equal ranks"
    """Clients of equal ranks get the same download, which is then made once."""
    PROBES = "a probing epoch"
    """A client trains one epoch on its whole download, to ``select`` the components to train."""
    PERSONAL = "personal models"
    """Each client's model is its own, made of what it keeps; there is no global model."""
    SPARSE_MESSAGES = "sparse messages"
    """Messages hold so many zeros that they travel without them."""


@dataclass(frozen=True)
class Info:
    """What people read about a method; no code depends on it.

    ``exact`` says whether the aggregate's product is the weighted mean of the clients' products,
    up to the rank that the server keeps. With ``by_component`` that mean is taken component by
    component, over the clients that hold it. ``up`` and ``down`` are formulas of how many
    parameters travel for a module (m, n), ``server`` is what the server computes for it: see
    docs/methods.md. ``exempt`` names laws that the method breaks by design, with the reason, and
    ``lossless`` the options without which it drops a part of the aggregate by design.
    """

    title: str
    paper: str = ""
    exact: bool = False
    by_component: bool = False
    up: str = ""
    down: str = ""
    server: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)
    lossless: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exactness(self) -> str:
        """Exact, inexact, or exact by component, for tables."""
        if self.exact and self.by_component:
            return "by component"
        return "exact" if self.exact else "inexact"


@dataclass(frozen=True)
class Client:
    """A client as the server sees it.

    ``ranks`` is its rank by module path; ``rank_type`` names these ranks in reports;
    ``examples`` is the number of training examples that it reports.
    """

    id: str
    ranks: Mapping[str, int] = field(repr=False)
    rank_type: str
    examples: int


@dataclass(frozen=True)
class RoundContext:
    """The round that a server hook is called for, and what never changes in a run.

    ``round`` counts from 1; 0 is before the first. ``shapes`` has each trained module's shape
    (out, in) and ``ranks`` the largest rank of any client, by module, in the model's order.
    """

    round: int
    seed: int
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    ranks: Mapping[str, int] = field(repr=False)

    def rng(self, name: str) -> np.random.Generator:
        """The random generator of this round with this name; equal names, equal draws."""
        return rng(self.seed, "handout", self.round, name)

    def only(self, modules: Collection[str]) -> RoundContext:
        """The same context for some of the modules."""
        wanted = set(modules)
        return replace(
            self,
            shapes={m: shape for m, shape in self.shapes.items() if m in wanted},
            ranks={m: rank for m, rank in self.ranks.items() if m in wanted},
        )


@dataclass(frozen=True)
class Download:
    """What a client starts from, as it travels; ``Method.prepare`` completes it on the client.

    The client trains ``adapter``, or only one of its ``factors``, at ``learning_rate_factor``
    times the learning rate. ``ranks`` are sent instead of an adapter where the client makes the
    adapter itself. ``frozen`` is added to its base weights for this round. ``base_updates`` are
    added for good: by the round that made them, all that the client has not merged yet, so that
    a client which missed rounds needs nothing special; ``base_rounds`` are the rounds whose
    updates it has merged already, as far as the server knows. ``component_ids`` numbers the
    adapter's components by module; the upload repeats it. ``aux`` are the method's own adapters.
    """

    adapter: Adapter
    frozen: Adapter | None = None
    base_updates: Mapping[int, Adapter] = field(default_factory=dict)
    base_rounds: Sequence[int] = ()
    factors: FactorNames = "BA"
    learning_rate_factor: float = 1.0
    component_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    aux: Mapping[str, Adapter] = field(default_factory=dict)
    ints: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One client's local training, when it is over.

    ``start`` is what it started from, in float32. ``trained`` has the factors after ``steps``
    optimiser steps or, where the method trains other parameters, those ``as_vector``.
    """

    start: Download
    trained: Adapter
    steps: int
    round: int


@dataclass(frozen=True)
class Upload:
    """What a client returns: what it learnt, and on how many examples.

    ``aux`` are adapters that travel beside it. ``metrics`` are numbers for the journal (seconds,
    tokens, losses); no method reads them.
    """

    client: str
    round: int
    adapter: Adapter
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    component_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    aux: Mapping[str, Adapter] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleSpec:
    """What an upload may hold of one module: a shape (out, in), and the ranks allowed.

    ``components`` is how many components the server has to number; None where the upload
    numbers none.
    """

    shape: tuple[int, int]
    min_rank: int
    max_rank: int
    components: int | None = None


@dataclass(frozen=True)
class UploadSpec:
    """What an upload may hold, by module, and the same of each adapter beside it."""

    modules: Mapping[str, ModuleSpec]
    aux: Mapping[str, Mapping[str, ModuleSpec]] = field(default_factory=dict)


@dataclass(frozen=True)
class FreshAdapters:
    """Where fresh adapters come from, on server and client: ``B`` zero, ``A`` LoRA's start.

    ``seed`` is the run's. ``common`` is the same for every client in every round, and that of a
    lower rank is a prefix of that of a higher one; ``own`` is that of this client in this round.
    """

    shapes: Mapping[str, tuple[int, int]]
    seed: int
    client: str = ""
    round: int = 0

    def common(self, ranks: Mapping[str, int]) -> Adapter:
        """The run's own start, at these ranks."""
        return self._drawn(ranks, "start")

    def own(self, ranks: Mapping[str, int]) -> Adapter:
        """A start that no other client has."""
        return self._drawn(ranks, "start", self.client, self.round)

    def _drawn(self, ranks: Mapping[str, int], *address: str | int) -> Adapter:
        modules = {}
        for module, rank in ranks.items():
            out, in_ = self.shapes[module]
            empty = Factors(torch.zeros(out, 0), torch.zeros(0, in_))
            modules[module] = empty.widened(rank, rng(self.seed, *address, module))
        return Adapter(modules)


@dataclass(frozen=True)
class State:
    """All that a server remembers between rounds.

    ``model`` is what its model is made of, in the method's own form; ``memory`` holds other
    adapters by name. ``per_module`` and ``per_client`` hold values that JSON can hold, by name
    and then by module or client id. Of these the journal reads ``per_module["lost_energy"]``,
    the share of each module's energy that the last truncation lost. ``merge_log`` are the
    updates that clients merge into their base for good.
    """

    model: Adapter
    memory: Mapping[str, Adapter] = field(default_factory=dict)
    per_module: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    per_client: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    merge_log: MergeLog = field(default_factory=MergeLog)

    def only(self, modules: Collection[str]) -> State:
        """What the state holds of these modules; an adapter that has none of them is left out."""
        wanted = set(modules)
        memory = {name: adapter.only(wanted) for name, adapter in self.memory.items()}
        return replace(
            self,
            model=self.model.only(wanted),
            memory={name: adapter for name, adapter in memory.items() if len(adapter)},
            per_module={
                name: {m: value for m, value in values.items() if m in wanted}
                for name, values in self.per_module.items()
            },
            merge_log=self.merge_log.only(wanted),
        )


class Method(ABC):
    """A federated method, the client's side and the server's side: the plug-in.

    A method is a frozen dataclass whose fields are its hyper-parameters, and so its section of
    the config. It has an ``info`` and must define ``aggregate``. What it remembers is in
    ``State``, which is passed in and returned; inputs are never changed.
    """

    @property
    @abstractmethod
    def info(self) -> Info:
        """What people read about the method; a class attribute of every method."""

    @property
    def features(self) -> frozenset[Feature]:
        """What the method supports and does; a class attribute where it is not empty."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Mean]:
        """Which means over the cohort ``aggregate`` asks for; a class attribute.

        An averager that does not offer one of them is refused at the start.
        """
        return frozenset()

    @property
    def weights(self) -> Weights:
        """How clients are weighted in those means; mostly a field of the method."""
        return "examples"

    @property
    def title(self) -> str:
        """What people call the method."""
        return self.info.title

    @property
    def truncation(self) -> Truncation:
        """How the method truncates a sum of products."""
        return Truncation()

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """The server's state before the first round, from a fresh adapter of the largest ranks."""
        return State(fresh)

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """What ``client`` starts from: the model's first components, at the client's rank."""
        return Download(at_ranks(state.model, client.ranks, context))

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """On the client: the download with what did not need to travel, or never does.

        ``private`` is what the client kept of its last round, by name. The adapter returned has
        the base model's shapes. Called several times in a round, so that it must be a pure
        function.
        """
        return download

    def select(self, download: Download, probed: Adapter) -> Mapping[str, Sequence[int]]:
        """On the client, of a method that ``PROBES``: the components to train, by module."""
        return {module: range(f.rank) for module, f in download.adapter.items()}

    def parametrize(self, start: Download) -> Mapping[str, Parametrization] | None:
        """On the client: the parameters that it trains instead of ``B`` and ``A``, by module.

        None: the factors themselves. Else ``Download.factors`` and the LoRA scale have no part
        in training, and ``Turn.trained`` has the parameters, each module's ``as_vector``.
        """
        return None

    def penalty(self, current: Mapping[str, Factors], start: Download) -> Tensor | None:
        """A term added to the client's loss at every step, differentiable in ``current``."""
        return None

    def upload_from(self, turn: Turn) -> Adapter:
        """What the client sends back of its training."""
        return turn.trained

    def aux_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """What the client sends beside that, by name."""
        return {}

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """On the server: the upload of a client that starts from this and learns nothing.

        How far an upload is from it bounds what the upload may do, and is what robust averagers
        compare. Modules that it lacks count as zero, as where clients send changes.
        """
        return download.adapter

    def private_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """What stays on the client until its next round, by name."""
        return {}

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """What ``client``'s upload may hold; anything else is refused."""
        mixed = Feature.MIXED_RANKS in self.features
        return UploadSpec(
            {
                m: ModuleSpec(shape, 1 if mixed else client.ranks[m], client.ranks[m])
                for m, shape in context.shapes.items()
            }
        )

    @abstractmethod
    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The next state, from the means over the cohort that the method needs.

        Adapters may be read from disk module by module: go through the modules once, in the
        order of ``context.ranks``, and hold no more than one module's uploads.
        """

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """The global adapter, relative to the untouched base, for evaluation and export.

        ``context.round`` is the round that made the state.
        """
        return state.model


def at_ranks(adapter: Adapter, ranks: Mapping[str, int], context: RoundContext) -> Adapter:
    """Each module's first components at these ranks, with fresh ones where it has fewer."""
    return Adapter(
        {
            module: (
                factors.first(ranks[module])
                if ranks[module] <= factors.rank
                else factors.widened(ranks[module], context.rng(module))
            )
            for module, factors in adapter.items()
        }
    )
