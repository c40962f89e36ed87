"""A config made ready to run: the base model, the rows of every client, their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flexlora import methods, smollm2
from flexlora.adapter import Adapter, Factors
from flexlora.client import Workplace
from flexlora.config import Experiment, Ranks, rank_table
from flexlora.data import partition
from flexlora.data.corpora import hub, natural_instructions, procedural, table
from flexlora.data.corpus import Corpus, split_rows
from flexlora.data.prompt import Prompt, named
from flexlora.data.tokens import TokenStore
from flexlora.method import Client, Method
from flexlora.model import Base
from flexlora.ranks import PAPER_TYPES, Assignment, RankType, assign, distribution
from flexlora.seeds import rng
from flexlora.task import Question, pick

Rows = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Ready:
    """Everything a run needs in memory; none of it changes while the run goes on."""

    experiment: Experiment
    base: Base
    method: Method
    clients: Mapping[str, Client]
    ranks: Assignment
    unseen: Sequence[str]
    workplace: Workplace
    questions: Sequence[Question]
    prompt: Prompt

    @property
    def largest(self) -> dict[str, int]:
        """The largest rank of any client, by module."""
        types = {self.ranks.of[id]: client.ranks for id, client in self.clients.items()}
        return {m: max(ranks[m] for ranks in types.values()) for m in self.base.shapes}

    def fresh(self) -> Adapter:
        """The adapter before training: the largest ranks, ``B`` zero, ``A`` LoRA's start."""
        ranks, seed = self.largest, self.experiment.seed
        return Adapter(
            {
                module: Factors(torch.zeros(out, 0), torch.zeros(0, in_)).widened(
                    ranks[module], rng(seed, "start", module)
                )
                for module, (out, in_) in self.base.shapes.items()
            }
        )

    @property
    def cohort_size(self) -> int:
        """How many clients a round asks: a fraction is of the population, at least one."""
        federation = self.experiment.federation
        if federation.cohort is not None:
            return federation.cohort
        return max(int((federation.fraction or 0) * len(self.clients) + 1e-9), 1)


def prepare(experiment: Experiment, corpus: Corpus | None = None, train: bool = True) -> Ready:
    """Read the data, load the model and assign the ranks; any fault is found here.

    ``corpus`` replaces the one that the config names. Without ``train`` nothing is tokenised
    for training.

    Raises:
        ValueError: the data, the model or the combination of choices cannot be used.
    """
    torch.set_num_threads(experiment.run.threads or torch.get_num_threads())
    method = methods.make(str(experiment.method["name"]), experiment.options())
    corpus = _corpus(experiment) if corpus is None else corpus
    unseen, corpus, rows = _dealt(corpus, experiment)
    # Ranks and refusals come before the model: they are quick to check.
    assignment = _ranks(experiment.ranks, list(rows), experiment.seed)
    _check_ranks(method, assignment)
    base = experiment.model.load()
    modules = list(base.shapes)
    by_type = {name: kind.by_module(modules) for name, kind in assignment.types.items()}
    clients = {
        id: Client(id, by_type[assignment.of[id]], assignment.of[id], len(held))
        for id, held in rows.items()
    }
    data = experiment.data
    cache = Path(data.cache) if data.cache else smollm2.cache() / "tokens"
    encoded = corpus if train else corpus.select([])
    store = TokenStore.build(encoded, base.tokenizer, data.prompt, data.max_tokens, cache)
    workplace = Workplace(
        base=base,
        store=store,
        rows=rows,
        method=method,
        training=experiment.training,
        wire_dtype=getattr(torch, experiment.federation.wire_dtype),
        seed=experiment.seed,
    )
    return Ready(
        experiment=experiment,
        base=base,
        method=method,
        clients=clients,
        ranks=assignment,
        unseen=unseen,
        workplace=workplace,
        questions=_questions(corpus, rows, unseen, experiment),
        prompt=named(data.prompt, base.tokenizer),
    )


def _corpus(experiment: Experiment) -> Corpus:
    data, seed = experiment.data, experiment.seed
    if data.format == "procedural":
        families = data.families or procedural.FAMILIES
        return procedural.generate(families, examples=data.examples, seed=seed)
    path = str(data.path)
    if data.format == "natural-instructions":
        return natural_instructions.read(Path(path), share=data.share, seed=seed)
    if data.format == "hub":
        return hub.read(path, data.columns)
    return table.read(Path(path), data.columns)


def _dealt(corpus: Corpus, experiment: Experiment) -> tuple[list[str], Corpus, Rows]:
    """The clients held out, the corpus with clients and splits, and each client's rows."""
    data, seed = experiment.data, experiment.seed
    natural = "client" in corpus.columns
    if not natural and (data.partition.kind == "natural" or data.unseen_clients or data.clients):
        raise ValueError(
            "The data has no client column, so data.partition.kind 'natural', data.clients and "
            "data.unseen_clients do not apply; give data.columns.client or another partition."
        )
    unseen: list[str] = []
    if natural:
        corpus, unseen = _held_out(corpus, data.clients, data.unseen_clients, seed)
    outside = np.isin(corpus.keys("client"), unseen) if unseen else np.zeros(len(corpus), bool)
    inside = np.flatnonzero(~outside)
    dealt = {id: inside[held] for id, held in _partition(corpus, inside, experiment).items()}
    if not natural:
        owner = np.empty(len(corpus), object)
        for id, held in dealt.items():
            owner[held] = id
        corpus = corpus.with_column("client", owner.tolist())
    if "split" not in corpus.columns:
        corpus = split_rows(corpus, seed)
    training = corpus.keys("split") == "train"
    rows = {id: held[training[held]] for id, held in dealt.items()}
    rows = {id: held for id, held in rows.items() if len(held)}
    if not rows:
        raise ValueError("No client has a training row; look at the data's split column.")
    return unseen, corpus, rows


def _held_out(corpus: Corpus, most: int | None, unseen: int, seed: int) -> tuple[Corpus, list[str]]:
    """The corpus of at most so many clients, and which of them never train."""
    owners = corpus.keys("client")
    everybody = sorted(set(owners))
    kept = everybody
    if most is not None and most < len(everybody):
        chosen = rng(seed, "clients").choice(len(everybody), most, replace=False)
        kept = [everybody[i] for i in sorted(chosen)]
        corpus = corpus.select(np.isin(owners, kept))
    if unseen >= len(kept):
        raise ValueError(
            f"data.unseen_clients is {unseen} of {len(kept)} clients; some must train."
        )
    order = rng(seed, "unseen").permutation(len(kept))[:unseen]
    return corpus, [kept[i] for i in sorted(order)]


def _partition(corpus: Corpus, inside: np.ndarray, experiment: Experiment) -> partition.Partition:
    """Positions within ``inside`` by training client."""
    how, draw = experiment.data.partition, rng(experiment.seed, "partition")
    clients = how.clients or 1
    if how.kind == "iid":
        return partition.iid(len(inside), clients, draw)
    if how.kind == "natural":
        return partition.by_key(corpus.keys("client")[inside])
    if "category" not in corpus.columns:
        raise ValueError(f"data.partition.kind {how.kind!r} needs data.columns.category.")
    labels = corpus.keys("category")[inside]
    if how.kind == "dirichlet":
        return partition.dirichlet(labels, clients, how.alpha, draw)
    if how.kind == "shards":
        return partition.shards(labels, clients, how.shards_per_client, draw)
    return partition.by_key(labels)


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


def _check_ranks(method: Method, assignment: Assignment) -> None:
    used = {assignment.types[name] for name in assignment.of.values()}
    if len(used) > 1 and not method.mixed_ranks:
        raise ValueError(
            f"{method.title} needs one rank for all clients, but the clients have "
            f"{assignment.histogram}; set ranks.rank, or use method 'flexlora'."
        )


def _questions(
    corpus: Corpus, rows: Rows, unseen: list[str], experiment: Experiment
) -> list[Question]:
    """The test rows of some clients that train and of some that never do."""
    how, seed = experiment.evaluation, experiment.seed
    owners = corpus.keys("client")
    tested = set(owners[corpus.keys("split") == "test"])
    trained = set(owners[np.concatenate([np.asarray(held) for held in rows.values()])])
    groups = [
        (True, sorted(tested & trained), how.seen_clients),
        (False, sorted(tested & set(unseen)), how.unseen_clients),
    ]
    found = []
    for seen, clients, count in groups:
        draw = rng(seed, "evaluated", "seen" if seen else "unseen")
        chosen = [clients[i] for i in draw.permutation(len(clients))[:count]]
        if chosen:
            found += pick(corpus, chosen, seen, how.rows_per_client, seed)
    return found
