"""The server's side of a run whose clients are real."""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.config import Experiment
from flexlora.data import named
from flexlora.federation import client_data, compose
from flexlora.federation.population import Population
from flexlora.federation.prepared import PreparedRun
from flexlora.method import Feature, for_mixed_modules
from flexlora.model import Base


def served(
    experiment: Experiment, base: Base, clients: Population, ranks: Mapping[str, int]
) -> PreparedRun:
    """The server's side of a run whose clients are real: no row of theirs is here.

    The config's data, if it has any, is the server's own and serves only evaluation.

    Raises:
        ConfigError: the combination of choices cannot be used.
        DataError: the data cannot be used.
    """
    method = compose.method_of(experiment)
    prompt = named(experiment.data.prompt, base.tokenizer)
    return PreparedRun(
        experiment=experiment,
        base=base,
        # Which clients will come with which modules is not known yet.
        method=for_mixed_modules(method) if Feature.PER_MODULE in method.features else method,
        averager=compose.averager_for(method, experiment),
        clients=clients,
        ranks=ranks,
        unseen=[],
        local=None,
        questions=client_data.server_questions(experiment, clients),
        prompt=prompt,
        notices=(*base.notices, *prompt.notices),
    )
