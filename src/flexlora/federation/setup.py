"""A config made ready to run: the base model, the rows of every client, their ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flexlora.config import Experiment
from flexlora.data import Corpus, TokenStore, named
from flexlora.federation import assignment, client_data, compose, notes
from flexlora.federation.client_turn import ClientRuntime
from flexlora.federation.prepared import PreparedRun, dtype
from flexlora.journal import Meter
from flexlora.method import Method
from flexlora.model import Base


def prepare(
    experiment: Experiment,
    corpus: Corpus | None = None,
    train: bool = True,
    base: Base | None = None,
    method: Method | None = None,
    meter: Meter | None = None,
) -> PreparedRun:
    """Read the data, load the model and assign the ranks; any fault of the config appears here.

    ``corpus`` replaces the one that the config names, ``base`` is the config's model if it is
    loaded already, ``method`` replaces the config's. Without ``train`` no rows are tokenised.
    ``meter`` tells what is going on.

    Raises:
        ConfigError: the model or the combination of choices cannot be used.
        DataError: the data cannot be used.
    """
    torch.set_num_threads(experiment.run.threads or torch.get_num_threads())
    experiment, method = _with_method(experiment, method)
    data, meter = experiment.data, meter or Meter()
    meter.begin("reading the data")
    cache = client_data.cache_folder(experiment)
    corpus = _read(experiment, corpus, cache)
    unseen, corpus, rows = client_data.partitioned(corpus, experiment)
    # Ranks and refusals come before the model: they are quick to check.
    assigned = assignment.assigned(experiment.ranks, list(rows), experiment.seed)
    method = assignment.suited(method, assigned)
    averager = compose.averager_for(method, experiment)
    meter.begin("loading the model")
    base = experiment.model.load() if base is None else base
    modules = list(base.shapes)
    clients = assignment.clients_of(assigned, rows, modules)
    rows_read = corpus if train else corpus.select([])
    store = TokenStore.build(rows_read, base.tokenizer, data.prompt, data.max_tokens, cache, meter)
    runtime = ClientRuntime(
        base=base,
        store=store,
        rows=rows,
        method=method,
        training=experiment.training,
        wire_dtype=dtype(experiment.federation.wire_dtype),
        seed=experiment.seed,
    )
    meter.end()
    prepared = PreparedRun(
        experiment=experiment,
        base=base,
        method=method,
        averager=averager,
        clients=clients,
        ranks=assignment.largest(modules, clients.kinds.values()),
        unseen=unseen,
        local=runtime,
        questions=client_data.questions(corpus, rows, unseen, experiment),
        prompt=named(data.prompt, base.tokenizer),
    )
    return dataclasses.replace(prepared, notices=notes.of(prepared)) if train else prepared


def _read(experiment: Experiment, corpus: Corpus | None, cache: Path) -> Corpus:
    """The given corpus, or the config's, of as many clients as the config says."""
    if corpus is None:
        return client_data.read(experiment, cache)
    return client_data.limited(corpus, experiment)


def _with_method(experiment: Experiment, method: Method | None) -> tuple[Experiment, Method]:
    """The method, composed, and the experiment that names it."""
    if method is None:
        return experiment, compose.method_of(experiment)
    experiment = experiment.model_copy(update={"method": _described(method)})
    return experiment, compose.composed_method(method, experiment)


def _described(method: Method) -> dict[str, Any]:
    """A method given as an object, as a config's section would name it."""
    fields = dataclasses.asdict(method)  # type: ignore[call-overload]
    return {**fields, "name": f"{type(method).__module__}:{type(method).__qualname__}"}
