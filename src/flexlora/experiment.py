"""A config made ready to run: the base model, the rows of every client, their ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexlora import dealing, methods, regularizers, server_optimizers, smollm2
from flexlora.adapter import Adapter
from flexlora.client import Workplace
from flexlora.config import Experiment, Ranks, rank_table
from flexlora.data.corpus import Corpus
from flexlora.data.prompt import Prompt, named
from flexlora.data.tokens import TokenStore
from flexlora.method import Client, Fresh, Method
from flexlora.model import Base
from flexlora.ranks import PAPER_TYPES, Assignment, RankType, assign, distribution, several
from flexlora.seeds import rng
from flexlora.server_optimizer import Optimized
from flexlora.targeted import targeted
from flexlora.task import Question
from flexlora.training.optimizer import Training


class Population(Mapping[str, Client]):
    """The clients that train, in the order in which they are counted."""

    @property
    @abstractmethod
    def kinds(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks by module of every rank type that a client has, smallest types first."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """How many clients are of each of these types."""


@dataclass(frozen=True)
class Clients(Population):
    """The clients of a simulation; each is made when it is asked for, from what it differs in.

    ``rows`` has each client's training rows, ``types`` its rank type, ``ranks`` each type's
    rank by module.
    """

    rows: Mapping[str, Sequence[int]]
    types: Mapping[str, str]
    ranks: Mapping[str, Mapping[str, int]]

    def __getitem__(self, id: str) -> Client:
        examples, kind = len(self.rows[id]), self.types[id]
        return Client(id, self.ranks[kind], kind, examples)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def kinds(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks of the types that a client has."""
        return {kind: self.ranks[kind] for kind in self.counts}

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How many clients are of each type."""
        found = Counter(self.types[id] for id in self.rows)
        return {kind: found[kind] for kind in self.ranks if found[kind]}


@dataclass(frozen=True)
class Ready:
    """Everything a run needs in memory.

    ``largest`` is the largest rank of any client by module, and ``place`` where they train: None
    where they are real ones, of whom more may come while the run goes on. Nothing else changes.
    """

    experiment: Experiment
    base: Base
    method: Method
    clients: Population
    largest: Mapping[str, int]
    unseen: Sequence[str]
    place: Workplace | None
    questions: Sequence[Question]
    prompt: Prompt

    @property
    def workplace(self) -> Workplace:
        """Where clients train in this process.

        Raises:
            ValueError: they do not, as they are real ones.
        """
        if self.place is None:
            raise ValueError("The clients of this run are on machines of their own.")
        return self.place

    def fresh(self) -> Adapter:
        """The adapter before training: the largest ranks, ``B`` zero, ``A`` LoRA's start."""
        return Fresh(self.base.shapes, self.experiment.seed).common(self.largest)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every module that anybody trains."""
        return {m: shape for m, shape in self.base.shapes.items() if m in self.largest}

    @property
    def wire_dtype(self) -> torch.dtype:
        """The kind of numbers that adapters travel in."""
        return dtype(self.experiment.federation.wire_dtype)

    @property
    def cohort_size(self) -> int:
        """How many clients a round asks: a fraction is of the population, at least one."""
        federation = self.experiment.federation
        if federation.cohort is not None:
            return federation.cohort
        return max(int((federation.fraction or 0) * len(self.clients) + 1e-9), 1)


def prepare(
    experiment: Experiment,
    corpus: Corpus | None = None,
    train: bool = True,
    base: Base | None = None,
) -> Ready:
    """Read the data, load the model and assign the ranks; any fault is found here.

    ``corpus`` replaces the one that the config names; ``base`` is the config's model, if it
    is loaded already. Without ``train`` nothing is tokenised for training.

    Raises:
        ValueError: the data, the model or the combination of choices cannot be used.
    """
    torch.set_num_threads(experiment.run.threads or torch.get_num_threads())
    method = method_of(experiment)
    data = experiment.data
    cache = Path(data.cache) if data.cache else smollm2.cache() / "tokens"
    corpus = (
        dealing.read(experiment, cache) if corpus is None else dealing.chosen(corpus, experiment)
    )
    unseen, corpus, rows = dealing.dealt(corpus, experiment)
    # Ranks and refusals come before the model: they are quick to check.
    assignment = _ranks(experiment.ranks, list(rows), experiment.seed)
    method = _among(method, assignment)
    base = experiment.model.load() if base is None else base
    modules = list(base.shapes)
    by_type = {name: kind.by_module(modules) for name, kind in assignment.types.items()}
    for name in set(assignment.of.values()):
        if not by_type[name]:
            raise ValueError(
                f"Clients of type {name!r} train nothing: {assignment.types[name]} names no rank "
                f"for any of the adapted modules, {modules[:3]} and so on; look at model.targets."
            )
    encoded = corpus if train else corpus.select([])
    store = TokenStore.build(encoded, base.tokenizer, data.prompt, data.max_tokens, cache)
    workplace = Workplace(
        base=base,
        store=store,
        rows=rows,
        method=method,
        training=experiment.training,
        wire_dtype=dtype(experiment.federation.wire_dtype),
        seed=experiment.seed,
    )
    clients = Clients(rows, assignment.of, by_type)
    return Ready(
        experiment=experiment,
        base=base,
        method=method,
        clients=clients,
        largest=_largest(modules, clients.kinds.values()),
        unseen=unseen,
        place=workplace,
        questions=dealing.questions(corpus, rows, unseen, experiment),
        prompt=named(data.prompt, base.tokenizer),
    )


def served(
    experiment: Experiment, base: Base, clients: Population, largest: Mapping[str, int]
) -> Ready:
    """The server's side of a run whose clients are real: no row of theirs is here.

    The config's data, if it has any, is the server's own and serves evaluation alone.

    Raises:
        ValueError: the data or the combination of choices cannot be used.
    """
    method = method_of(experiment)
    return Ready(
        experiment=experiment,
        base=base,
        # Who will come with which modules is not known.
        method=targeted(method) if method.by_module else method,
        clients=clients,
        largest=largest,
        unseen=[],
        place=None,
        questions=dealing.asked_of(experiment, clients),
        prompt=named(experiment.data.prompt, base.tokenizer),
    )


def dtype(name: str) -> torch.dtype:
    """The kind of numbers of this name."""
    found: torch.dtype = getattr(torch, name)
    return found


def composed(
    method: Mapping[str, Any],
    server_optimizer: Mapping[str, Any] | None,
    regularizer: Mapping[str, Any] | None,
    training: Training,
) -> Method:
    """The method of a config's section, within a server optimiser and a regulariser.

    Raises:
        ValueError: they do not go together.
    """
    options = {key: value for key, value in method.items() if key != "name"}
    made = methods.make(str(method.get("name")), options)
    if server_optimizer is not None:
        made = Optimized(made, server_optimizers.make(dict(server_optimizer)))
    if regularizer is not None:
        made = regularizers.make(dict(regularizer)).around(made, training)
    return made


def method_of(experiment: Experiment) -> Method:
    """The method that a config names, composed."""
    return composed(
        experiment.method, experiment.server_optimizer, experiment.regularizer, experiment.training
    )


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
        ValueError: it cannot be used among them.
    """
    used = {assignment.types[name] for name in assignment.of.values()}
    if several(used) and not method.mixed_ranks:
        raise ValueError(
            f"{method.title} needs one rank for all clients, but the clients have "
            f"{assignment.histogram}; set ranks.rank, or use method 'flexlora'."
        )
    return targeted(method) if len({kind.targets for kind in used}) > 1 else method


def _largest(modules: Sequence[str], kinds: Collection[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each module that anybody trains."""
    most = {m: max((ranks.get(m, 0) for ranks in kinds), default=0) for m in modules}
    return {module: rank for module, rank in most.items() if rank}
