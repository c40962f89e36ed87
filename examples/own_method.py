"""A federated method of one's own: FedIT with changes clipped to a maximal norm.

    flexlora laws examples/own_method.py                        # check it against the laws
    flexlora run CONFIG.toml --plugin examples/own_method.py    # use it in a run

The file needs nothing of the library but what ``flexlora.method`` offers. To install the method
under a name, put the class into a package of your own and name it in its pyproject.toml:

    [project.entry-points."flexlora.methods"]
    clipped = "my_package.own_method:Clipped"
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Cohort,
    Download,
    Feature,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Turn,
    Weights,
    changes,
    parameter_norm,
)


@dataclass(frozen=True)
class Clipped(Method):
    """The mean of the clients' changes, each of at most ``max_norm``."""

    info = Info(
        "Clipped FedIT",
        paper="an example",
        exempt={
            "gauge": "changes of factors are clipped and averaged",
            "fixed point": "a clipped change is not the client's own",
        },
    )
    features = frozenset({Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

    max_norm: float = 1.0
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ConfigError(f"max_norm is above 0, got {self.max_norm}.")

    def upload_from(self, turn: Turn) -> Adapter:
        """What training changed in each factor, scaled down where it is too much."""
        change = changes(turn.start.adapter, turn.trained)
        scale = min(1.0, self.max_norm / max(parameter_norm(change), 1e-12))
        return Adapter({m: Factors(f.B * scale, f.A * scale) for m, f in change.items()})

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """Nothing: changes are sent. The server bounds uploads by how far they are from it."""
        return Adapter({})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The model plus the mean change of each factor."""
        model = {}
        for module, last in state.model.items():
            change = cohort.factors(module)
            model[module] = Factors(last.B + change.B, last.A + change.A).to(last.B.dtype)
        return replace(state, model=Adapter(model))
