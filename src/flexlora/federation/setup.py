"""A config made ready to run: the base model, the rows of every client, their ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from flexlora.config import Assignment, Experiment
from flexlora.data import Corpus, Prompt, TokenStore, named
from flexlora.federation import assignment, client_data, compose, notes
from flexlora.federation.client_turn import ClientRuntime
from flexlora.federation.prepared import PreparedRun, dtype
from flexlora.journal import Meter
from flexlora.method import Method
from flexlora.model import Base


def prepare(
    experiment: Experiment,
    rows: object | None = None,
    train: bool = True,
    base: Base | None = None,
    method: Method | None = None,
    meter: Meter | None = None,
) -> PreparedRun:
    """Read the data, load the model and assign the ranks; any fault of the config appears here.

    ``rows`` replace the config's: a corpus, a list of dicts, a table of pandas, Polars, PyArrow or
    datasets, or a file's path; ``data.columns`` names their columns. ``base`` is the config's model
    if it is loaded, ``method`` replaces the config's. Without ``train`` no rows are tokenised.
    ``meter`` tells what is going on.

    Raises:
        ConfigError: the model or the combination of choices cannot be used.
        DataError: the data cannot be used.
    """
    torch.set_num_threads(experiment.run.threads or torch.get_num_threads())
    experiment, chosen = _with_precision(experiment, base)
    experiment, method = _with_method(experiment, method)
    data, cache, meter = experiment.data, client_data.cache_of(experiment.data), meter or Meter()
    meter.begin("reading the data")
    corpus = client_data.rows_of(experiment, cache, rows)
    unseen, corpus, partition, holdout = client_data.partitioned(corpus, experiment)
    # Ranks and refusals come before the model: they are quick to check.
    assigned = assignment.assigned(experiment.ranks, list(partition), experiment.seed, unseen)
    method = assignment.suited(method, assigned)
    averager = compose.averager_for(method, experiment, list(partition))
    meter.begin("loading the model")
    base = experiment.model.load() if base is None else base
    clients = assignment.clients_of(assigned, partition, list(base.shapes))
    prompt, trained = named(data.prompt, base.tokenizer), corpus if train else corpus.select([])
    store = TokenStore.build(trained, base.tokenizer, data.prompt, data.max_tokens, cache, meter)
    runtime = ClientRuntime(
        base=base,
        store=store,
        rows=partition,
        method=method,
        training=experiment.training,
        wire_dtype=dtype(experiment.federation.wire_dtype),
        seed=experiment.seed,
        holdout=holdout,
    )
    meter.end()
    prepared = PreparedRun(
        experiment=experiment,
        base=base,
        method=method,
        averager=averager,
        clients=clients,
        ranks=assignment.largest(list(base.shapes), clients.kinds.values()),
        unseen=unseen,
        local=runtime,
        questions=client_data.questions(corpus, partition, unseen, experiment),
        prompt=prompt,
        notices=(*chosen, *_notices(base, assigned, corpus, prompt, data.max_tokens, store)),
    )
    return dataclasses.replace(prepared, notices=notes.of(prepared)) if train else prepared


def _notices(
    base: Base,
    assigned: Assignment,
    corpus: Corpus,
    prompt: Prompt,
    max_tokens: int,
    store: TokenStore,
) -> tuple[str, ...]:
    """What the user must know of the model, the ranks, the data and the prompts."""
    of_ranks = assignment.unused_ranks(assigned, list(base.shapes))
    return (*base.notices, *of_ranks, *corpus.notices, *prompt.notices, *store.notices(max_tokens))


def _with_precision(experiment: Experiment, base: Base | None) -> tuple[Experiment, Sequence[str]]:
    """The experiment with its model's precision, and what there is to say if it was chosen here.

    It is that of the ``base`` that is loaded. A run that is resumed, or has workers on other
    machines, keeps it.
    """
    model, notices = experiment.model.chosen()
    if notices and base is not None:
        dtype = str(base.model.dtype).removeprefix("torch.")
        model = dataclasses.replace(model, dtype=dtype)  # type: ignore[arg-type]
    return experiment.model_copy(update={"model": model}), notices


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
