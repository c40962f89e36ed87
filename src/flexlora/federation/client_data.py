"""The rows of every client: a config's corpus, partitioned; and the questions of evaluation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flexlora.config import DataSettings, Experiment
from flexlora.data import Corpus, fields_of, partition, sources_of, split_rows
from flexlora.data.corpora import (
    hub,
    mapped,
    natural_instructions,
    objects,
    procedural,
    table,
)
from flexlora.errors import ConfigError, DataError
from flexlora.evaluation import Question, pick
from flexlora.federation import corpora
from flexlora.federation.holdout import drawn
from flexlora.model import smollm2
from flexlora.seeds import rng


def cache_of(data: DataSettings) -> Path:
    """Where converted corpora and tokens are kept from run to run: ``data.cache`` or the user's."""
    cache = data.cache
    folder = Path(cache) if cache else smollm2.cache() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}"
        if any(path.is_file() for path in (folder, *folder.parents)):
            reason = "it or one of its parents is a file"
        key = "data.cache" if cache else "the environment variable FLEXLORA_CACHE"
        raise ConfigError(
            f"The cache {str(folder)[:200]} cannot be made: {reason}; set {key} to another folder."
        ) from error
    return folder


def read(experiment: Experiment, cache: Path) -> Corpus:
    """The rows of the clients that the config chooses, memory-mapped where possible."""
    return read_data(experiment.data, experiment.seed, _needs(experiment), cache)


def read_data(data: DataSettings, seed: int, needs: list[str], cache: Path) -> Corpus:
    """The rows that a section ``data`` chooses, memory-mapped where possible.

    ``needs`` are optional columns that must be there.

    Raises:
        DataError: they cannot be read.
    """
    if data.format == "remote":
        raise DataError(
            "data.format 'remote' says that the rows are with real clients: start it by "
            "`flexlora serve`, or name a format that can be simulated."
        )
    if reader := corpora.installed(data.format):
        return limited(reader(data.path, data.columns, seed), data, seed)
    if data.format == "procedural":
        families = data.families or procedural.FAMILIES
        generated = procedural.generate(families, examples=data.examples, seed=seed)
        return limited(generated, data, seed)
    if data.format == "hub":
        return limited(hub.read(str(data.path), data.columns), data, seed)
    path = Path(str(data.path))
    if data.source and not path.exists() and not any(c in str(path) for c in "*?["):
        raise DataError(f"There is no {path}, which data.path names. {data.source}")
    # All that decides which rows are read, apart from the files.
    settings: dict[str, Any] = {"clients": data.clients and [data.clients, seed]}
    if data.format == "natural-instructions":
        sources = sorted(path.glob("task*.json"))
        settings |= {"format": data.format, "share": data.share, "seed": seed}
        make = partial(natural_instructions.read, path, share=data.share, seed=seed)
    else:
        files = sources_of(path, data.encoding)
        sources = [source.path for source in files]
        settings |= {
            "format": [[source.format, dict(source.constants)] for source in files],
            "columns": asdict(data.columns),
            "encoding": data.encoding,
            "needs": needs,
            "fields": (fields := fields_of(data.prompt)),
            "place": str(path),
        }
        make = partial(
            table.read_sources, files, data.columns, place=f"'{path}'", needs=needs, fields=fields
        )
    if not sources:
        return limited(make(), data, seed)  # which says what is missing
    return mapped.kept(cache, sources, settings, lambda: limited(make(), data, seed))


def rows_of(experiment: Experiment, cache: Path, rows: object | None) -> Corpus:
    """The rows of the clients: those of the config, or these, in any form that a corpus may have.

    Raises:
        DataError: they cannot be used.
    """
    if rows is None:
        return read(experiment, cache)
    data = experiment.data
    if isinstance(rows, str | Path):
        return read(experiment.model_copy(update={"data": _table_at(data, rows)}), cache)
    corpus = objects.read(
        rows, data.columns, needs=_needs(experiment), fields=fields_of(data.prompt)
    )
    return limited(corpus, data, experiment.seed)


def _table_at(data: DataSettings, path: str | Path) -> DataSettings:
    return data.model_copy(update={"format": "table", "path": str(path)})


def _needs(experiment: Experiment) -> list[str]:
    """The optional columns without which the rows cannot be assigned to clients."""
    data = experiment.data
    natural = data.partition.kind == "natural" or data.unseen_clients or data.clients
    categories = data.partition.kind in ("dirichlet", "shards", "category")
    return ["client"] * bool(natural) + ["category"] * categories


def limited(corpus: Corpus, data: DataSettings, seed: int) -> Corpus:
    """The corpus of at most as many clients as ``data.clients`` says."""
    most = data.clients
    if most is None or "client" not in corpus.columns:
        return corpus
    codes, owners = corpus.codes("client")
    if most >= len(owners):
        return corpus
    names = sorted(owners)
    drawn = rng(seed, "clients").choice(len(names), most, replace=False)
    remaining = {names[i] for i in drawn}
    return corpus.select(np.array([owner in remaining for owner in owners])[codes])


def partitioned(
    corpus: Corpus, experiment: Experiment
) -> tuple[list[str], Corpus, partition.Partition, Mapping[str, Any]]:
    """The clients held out, the corpus with clients and splits, and the clients' rows.

    First the training rows of each client, then those that it holds out of its training.
    """
    seed = experiment.seed
    natural = "client" in corpus.columns
    if not natural:
        _check_no_client_is_needed(experiment)
    unseen, inside = _held_out(corpus, experiment) if natural else ([], np.arange(len(corpus)))
    partitioned = _partition(corpus, inside, experiment).within(inside)
    if not natural:
        owner = np.empty(len(corpus), np.int32)
        owner[partitioned.rows] = np.repeat(np.arange(len(partitioned)), partitioned.sizes)
        owners = pa.DictionaryArray.from_arrays(owner, pa.array(list(partitioned), pa.string()))
        corpus = corpus.with_column("client", owners)
    if not (has_splits := "split" in corpus.columns):
        corpus = split_rows(corpus, seed)
    if not partitioned.where(_in_split(corpus, "train")):
        raise DataError("No client has a training row; look at the data's split column.")
    return unseen, corpus, *_without_holdout(corpus, partitioned, has_splits, experiment)


def _without_holdout(
    corpus: Corpus, everything: partition.Partition, has_splits: bool, experiment: Experiment
) -> tuple[partition.Partition, Mapping[str, Any]]:
    """The training rows of each client without those it holds out, and the latter by client.

    ``everything`` has the clients' rows of all splits; ``has_splits`` is whether the splits are
    the data's own. A client whose data marks rows as "validation" holds out these.
    """
    rows = everything.where(_in_split(corpus, "train"))
    share, seed = experiment.evaluation.client_share, experiment.seed
    if not share:
        return rows, {}
    marked = everything.where(_in_split(corpus, "validation")) if has_splits else {}
    held_out = np.zeros(len(corpus), np.bool_)
    for client in rows:
        own = rows[client]
        held = marked.get(client)
        held_out[own[drawn(len(own), share, seed, client)] if held is None else held] = True
    return rows.where(~held_out), everything.where(held_out)


def _check_no_client_is_needed(experiment: Experiment) -> None:
    """Refuse settings that choose among the data's own clients.

    Raises:
        DataError: names those that the config sets.
    """
    data = experiment.data
    chosen = {"data.unseen_clients": data.unseen_clients, "data.clients": data.clients}
    given = [f"{key} = {value}" for key, value in chosen.items() if value]
    if data.partition.kind == "natural":
        raise DataError(
            "The rows do not say which client they belong to: they have no column 'client'. Set "
            "data.columns.client to the name of the column that says it, or assign the rows to "
            'simulated clients: data.partition = { kind = "iid", clients = 4 }'
            + (f", without {' and '.join(given)}." if given else ".")
        )
    if given:
        raise DataError(
            f"The data has no client column, so {' and '.join(given)} cannot choose among its "
            f"clients; remove {'it' if len(given) == 1 else 'them'}, or set data.columns.client."
        )


def _in_split(corpus: Corpus, split: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    codes, splits = corpus.codes("split")
    return np.array([name == split for name in splits], np.bool_)[codes]


def _held_out(corpus: Corpus, experiment: Experiment) -> tuple[list[str], np.ndarray]:
    """The clients that never train, and the rows of the others."""
    codes, owners = corpus.codes("client")
    candidates, unseen = sorted(owners), experiment.data.unseen_clients
    if unseen >= len(candidates):
        raise DataError(
            f"data.unseen_clients is {unseen} of {len(candidates)} clients; some must train."
        )
    order = rng(experiment.seed, "unseen").permutation(len(candidates))[:unseen]
    names = [candidates[i] for i in sorted(order)]
    never = set(names)
    return names, np.flatnonzero(np.array([owner not in never for owner in owners])[codes])


def _partition(corpus: Corpus, inside: np.ndarray, experiment: Experiment) -> partition.Partition:
    """Positions within ``inside`` by training client."""
    settings, generator = experiment.data.partition, rng(experiment.seed, "partition")
    clients = settings.clients or 1
    if settings.kind == "iid":
        return partition.iid(len(inside), clients, generator)
    if settings.kind == "natural":
        codes, owners = corpus.codes("client")
        return partition.by_code(codes[inside], owners)
    if "category" not in corpus.columns:
        raise DataError(
            f"data.partition.kind is {settings.kind!r}, which needs a category for every row, but "
            "the data has no column 'category'; set data.columns.category to the name of one, or "
            'data.partition.kind to "iid".'
        )
    labels = corpus.keys("category")[inside]
    if settings.kind == "dirichlet":
        return partition.dirichlet(labels, clients, settings.alpha, generator)
    if settings.kind == "shards":
        return partition.shards(labels, clients, settings.shards_per_client, generator)
    return partition.by_key(labels)


def server_questions(experiment: Experiment, clients: Collection[str]) -> list[Question]:
    """The server's own test rows: of clients that take part, and of others."""
    data, settings = experiment.data, experiment.evaluation
    if data.path is None or not (settings.seen_clients or settings.unseen_clients):
        return []
    fields = fields_of(data.prompt)
    corpus = table.read(data.path, data.columns, encoding=data.encoding, fields=fields)
    if "split" in corpus.columns:
        corpus = corpus.select(_in_split(corpus, "test"))
    owners = sorted(set(corpus.keys("client"))) if "client" in corpus.columns else []
    if not owners:
        raise DataError(
            f"{data.path} has no test row with a client; the server's data needs the columns "
            "data.columns.client and, where it also has training rows, data.columns.split."
        )
    present = set(clients)
    questions: list[Question] = []
    for seen, count in ((True, settings.seen_clients), (False, settings.unseen_clients)):
        group = [owner for owner in owners if (owner in present) is seen]
        generator = rng(experiment.seed, "evaluated", "seen" if seen else "unseen")
        drawn = {group[i] for i in generator.permutation(len(group))[:count]}
        if drawn:
            questions += pick(corpus, drawn, seen, settings.rows_per_client, experiment.seed)
    return questions


def questions(
    corpus: Corpus, rows: partition.Partition, unseen: list[str], experiment: Experiment
) -> list[Question]:
    """The test rows of some clients that train and of some that never do."""
    settings, seed = experiment.evaluation, experiment.seed
    codes, owners = corpus.codes("client")
    test = _in_split(corpus, "test")
    tested = {owners[code] for code in np.unique(codes[test])}
    trained = {owners[code] for code in np.unique(codes[rows.rows])}
    groups = [
        (True, sorted(tested & trained), settings.seen_clients),
        (False, sorted(tested & set(unseen)), settings.unseen_clients),
    ]
    questions: list[Question] = []
    for seen, clients, count in groups:
        generator = rng(seed, "evaluated", "seen" if seen else "unseen")
        drawn = {clients[i] for i in generator.permutation(len(clients))[:count]}
        if drawn:
            # Of a large corpus only these few rows are looked at.
            their_rows = test & np.array([owner in drawn for owner in owners])[codes]
            questions += pick(
                corpus.select(their_rows), drawn, seen, settings.rows_per_client, seed
            )
    return questions
