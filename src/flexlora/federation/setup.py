"""A config made ready to run: the base model, the rows of every client, their ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from flexlora.federation.compose import method_of
from flexlora.federation.population import Clients, Population
from flexlora.lowrank import Adapter
from flexlora.method import (
    Fresh,
    Method,
    targeted,
)
from flexlora.model import Base, smollm2
from flexlora.seeds import rng


@dataclass(frozen=True)
class PreparedRun:
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
    place: ClientRuntime | None
    questions: Sequence[Question]
    prompt: Prompt

    @property
    def workplace(self) -> ClientRuntime:
        """Where clients train in this process.

        Raises:
            ConfigError: they do not, as they are real ones.
        """
        if self.place is None:
            raise ConfigError("The clients of this run are on machines of their own.")
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
) -> PreparedRun:
    """Read the data, load the model and assign the ranks; any fault is found here.

    ``corpus`` replaces the one that the config names; ``base`` is the config's model, if it
    is loaded already. Without ``train`` nothing is tokenised for training.

    Raises:
        ConfigError: the data, the model or the combination of choices cannot be used.
    """
    torch.set_num_threads(experiment.run.threads or torch.get_num_threads())
    method = method_of(experiment)
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
    base = experiment.model.load() if base is None else base
    modules = list(base.shapes)
    by_type = {name: kind.by_module(modules) for name, kind in assignment.types.items()}
    for name in set(assignment.of.values()):
        if not by_type[name]:
            raise ConfigError(
                f"Clients of type {name!r} train nothing: {assignment.types[name]} names no rank "
                f"for any of the adapted modules, {modules[:3]} and so on; look at model.targets."
            )
    encoded = corpus if train else corpus.select([])
    store = TokenStore.build(encoded, base.tokenizer, data.prompt, data.max_tokens, cache)
    workplace = ClientRuntime(
        base=base,
        store=store,
        rows=rows,
        method=method,
        training=experiment.training,
        wire_dtype=dtype(experiment.federation.wire_dtype),
        seed=experiment.seed,
    )
    clients = Clients(rows, assignment.of, by_type)
    return PreparedRun(
        experiment=experiment,
        base=base,
        method=method,
        clients=clients,
        largest=_largest(modules, clients.kinds.values()),
        unseen=unseen,
        place=workplace,
        questions=client_data.questions(corpus, rows, unseen, experiment),
        prompt=named(data.prompt, base.tokenizer),
    )


def served(
    experiment: Experiment, base: Base, clients: Population, largest: Mapping[str, int]
) -> PreparedRun:
    """The server's side of a run whose clients are real: no row of theirs is here.

    The config's data, if it has any, is the server's own and serves evaluation alone.

    Raises:
        ConfigError: the data or the combination of choices cannot be used.
    """
    method = method_of(experiment)
    return PreparedRun(
        experiment=experiment,
        base=base,
        # Who will come with which modules is not known.
        method=targeted(method) if method.by_module else method,
        clients=clients,
        largest=largest,
        unseen=[],
        place=None,
        questions=client_data.asked_of(experiment, clients),
        prompt=named(experiment.data.prompt, base.tokenizer),
    )


def dtype(name: str) -> torch.dtype:
    """The kind of numbers of this name."""
    found: torch.dtype = getattr(torch, name)
    return found


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
    if several(used) and not method.mixed_ranks:
        raise ConfigError(
            f"{method.title} needs one rank for all clients, but the clients have "
            f"{assignment.histogram}; set ranks.rank, or use method 'flexlora'."
        )
    return targeted(method) if len({kind.targets for kind in used}) > 1 else method


def _largest(modules: Sequence[str], kinds: Collection[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each module that anybody trains."""
    most = {m: max((ranks.get(m, 0) for ranks in kinds), default=0) for m in modules}
    return {module: rank for module, rank in most.items() if rank}
