"""A config made ready to run: the base model, the rows of every client, their ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexlora.config import (
    PAPER_TYPES,
    Assignment,
    Experiment,
    Ranks,
    RankType,
    assign,
    distribution,
    rank_table,
    several,
)
from flexlora.data import Corpus, Prompt, TokenStore, named
from flexlora.errors import ConfigError
from flexlora.evaluation import Question
from flexlora.federation import client_data
from flexlora.federation.client_turn import ClientRuntime
from flexlora.federation.compose import averager_of, composed_method, method_of
from flexlora.federation.population import Clients, Population
from flexlora.lowrank import Adapter
from flexlora.method import (
    Averager,
    Feature,
    FreshAdapters,
    Method,
    RoundContext,
    mixed_modules,
    require,
    require_means,
)
from flexlora.model import Base, smollm2
from flexlora.seeds import rng


@dataclass(frozen=True)
class PreparedRun:
    """Everything a run needs in memory.

    ``ranks`` is the largest rank of any client by module. ``local`` is where clients train in
    this process: None where they are real ones, of which more may join while the run goes on.
    Nothing else changes.
    """

    experiment: Experiment
    base: Base
    method: Method
    averager: Averager
    clients: Population
    ranks: Mapping[str, int]
    unseen: Sequence[str]
    local: ClientRuntime | None
    questions: Sequence[Question]
    prompt: Prompt

    @property
    def runtime(self) -> ClientRuntime:
        """Where clients train in this process.

        Raises:
            ConfigError: they do not, as they are real ones.
        """
        if self.local is None:
            raise ConfigError("The clients of this run are on machines of their own.")
        return self.local

    def with_runtime(self, **changes: Any) -> PreparedRun:
        """The same run with these fields of its ``runtime`` replaced."""
        return replace(self, local=replace(self.runtime, **changes))

    def fresh(self) -> Adapter:
        """The adapter before training: the largest ranks, ``B`` zero, ``A`` LoRA's start."""
        return FreshAdapters(self.base.shapes, self.experiment.seed).common(self.ranks)

    def context(self, round: int) -> RoundContext:
        """What the method's hooks are called with in this round."""
        return RoundContext(round, self.experiment.seed, self.shapes, self.ranks)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every module that a client trains."""
        return {m: shape for m, shape in self.base.shapes.items() if m in self.ranks}

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype in which adapters travel."""
        return dtype(self.experiment.federation.wire_dtype)

    @property
    def cohort_size(self) -> int:
        """How many clients a round invites: a fraction is of the population, at least one."""
        federation = self.experiment.federation
        if federation.cohort is not None:
            return federation.cohort
        return max(int((federation.fraction or 0) * len(self.clients) + 1e-9), 1)


def prepare(
    experiment: Experiment,
    corpus: Corpus | None = None,
    train: bool = True,
    base: Base | None = None,
    method: Method | None = None,
) -> PreparedRun:
    """Read the data, load the model and assign the ranks; any fault of the config appears here.

    ``corpus`` replaces the one that the config names, ``base`` is the config's model if it is
    loaded already, ``method`` replaces the config's method. Without ``train`` nothing is
    tokenised for training.

    Raises:
        ConfigError: the model or the combination of choices cannot be used.
        DataError: the data cannot be used.
    """
    torch.set_num_threads(experiment.run.threads or torch.get_num_threads())
    if method is not None:
        experiment = experiment.model_copy(update={"method": _described(method)})
        method = composed_method(method, experiment)
    else:
        method = method_of(experiment)
    averager = averager_of(experiment)
    data = experiment.data
    cache = Path(data.cache) if data.cache else smollm2.cache() / "tokens"
    corpus = (
        client_data.read(experiment, cache)
        if corpus is None
        else client_data.chosen(corpus, experiment)
    )
    unseen, corpus, rows = client_data.dealt(corpus, experiment)
    # Ranks and refusals come before the model: they are quick to check.
    assignment = _ranks(experiment.ranks, list(rows), experiment.seed)
    method = _among(method, assignment)
    require_means(averager, method)
    base = experiment.model.load() if base is None else base
    modules = list(base.shapes)
    clients = Clients(rows, assignment.of, _by_type(assignment, modules))
    encoded = corpus if train else corpus.select([])
    store = TokenStore.build(encoded, base.tokenizer, data.prompt, data.max_tokens, cache)
    runtime = ClientRuntime(
        base=base,
        store=store,
        rows=rows,
        method=method,
        training=experiment.training,
        wire_dtype=dtype(experiment.federation.wire_dtype),
        seed=experiment.seed,
    )
    return PreparedRun(
        experiment=experiment,
        base=base,
        method=method,
        averager=averager,
        clients=clients,
        ranks=_largest(modules, clients.kinds.values()),
        unseen=unseen,
        local=runtime,
        questions=client_data.questions(corpus, rows, unseen, experiment),
        prompt=named(data.prompt, base.tokenizer),
    )


def served(
    experiment: Experiment, base: Base, clients: Population, ranks: Mapping[str, int]
) -> PreparedRun:
    """The server's side of a run whose clients are real: no row of theirs is here.

    The config's data, if it has any, is the server's own and serves only evaluation.

    Raises:
        ConfigError: the combination of choices cannot be used.
        DataError: the data cannot be used.
    """
    method, averager = method_of(experiment), averager_of(experiment)
    require_means(averager, method)
    return PreparedRun(
        experiment=experiment,
        base=base,
        # Which clients will come with which modules is not known yet.
        method=mixed_modules(method) if Feature.PER_MODULE in method.features else method,
        averager=averager,
        clients=clients,
        ranks=ranks,
        unseen=[],
        local=None,
        questions=client_data.asked_of(experiment, clients),
        prompt=named(experiment.data.prompt, base.tokenizer),
    )


def dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of this name."""
    value: torch.dtype = getattr(torch, name)
    return value


def _described(method: Method) -> dict[str, Any]:
    """A method given as an object, as a config's section would name it."""
    fields = dataclasses.asdict(method)  # type: ignore[call-overload]
    return {**fields, "name": f"{type(method).__module__}:{type(method).__qualname__}"}


def _by_type(assignment: Assignment, modules: Sequence[str]) -> dict[str, dict[str, int]]:
    """The rank of every adapted module, by rank type.

    Raises:
        ConfigError: a type that a client has trains nothing.
    """
    by_type = {name: kind.by_module(modules) for name, kind in assignment.types.items()}
    for name in set(assignment.of.values()):
        if not by_type[name]:
            raise ConfigError(
                f"Clients of type {name!r} train nothing: {assignment.types[name]} names no rank "
                f"for any of the adapted modules, {modules[:3]} and so on; look at model.targets."
            )
    return by_type


def _ranks(settings: Ranks, clients: list[str], seed: int) -> Assignment:
    """Every client's rank type, from one of the ways to say it."""
    if settings.table is not None:
        settings = rank_table(Path(settings.table), settings.clients)
    if settings.rank is not None:
        name = f"rank{settings.rank}"
        uniform = {name: RankType(settings.rank, settings.rank)}
        return assign(clients, uniform, {name: 1.0}, rng(seed, "ranks"))
    types = (
        {name: RankType(t.attention, t.feed_forward) for name, t in settings.types.items()}
        if settings.types
        else dict(PAPER_TYPES)
    )
    shares = settings.distribution
    if isinstance(shares, str):
        shares = distribution(shares)
    return assign(clients, types, shares or {}, rng(seed, "ranks"), settings.clients)


def _among(method: Method, assignment: Assignment) -> Method:
    """The method among clients of these types.

    Raises:
        ConfigError: it cannot be used among them.
    """
    used = {assignment.types[name] for name in assignment.of.values()}
    if several(used):
        histogram = ", ".join(f"{count} {name}" for name, count in assignment.histogram.items())
        require(
            method,
            Feature.MIXED_RANKS,
            f"it needs one rank for all clients, but the clients have {histogram}; set ranks.rank",
        )
    return mixed_modules(method) if len({kind.targets for kind in used}) > 1 else method


def _largest(modules: Sequence[str], kinds: Collection[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each module that a client trains."""
    most = {m: max((ranks.get(m, 0) for ranks in kinds), default=0) for m in modules}
    return {module: rank for module, rank in most.items() if rank}
