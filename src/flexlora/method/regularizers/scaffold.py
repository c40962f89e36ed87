"""SCAFFOLD (arXiv 1910.06378, option II): clients correct their gradients for their own drift.

Client i has a control ``c_i``, the mean gradient of its last round, and the server their mean
``c``. Every step's gradient gains ``c - c_i``. After K steps from x to y at learning rates eta

``c_i' = c_i - c + (x - y) / sum(eta)``,

of which the change is sent. Controls are gradients in the effective factors: a client of LoRA
scale s optimises ``B / s``, so B moves by ``s^2 eta`` times its gradient, which is divided out.

A mean of gradients in the factors needs factors that are the same for all clients and from round
to round: methods that decompose products anew, refresh ``A``, rotate or alternate are refused,
and unequal ranks. Steps must be a learning rate times the gradient: AdamW, momentum and weight
decay are refused. Steps that ``training.clip_norm`` shortens count as they were taken.

Differs: ``c`` is the mean over the clients heard of so far, by examples where the method
averages by examples, so that with everybody present corrections cancel; the paper's counts
clients never heard of as zeros. A client without a control yet is not corrected, where the
paper would add all of ``c`` to its gradient. A change that is lost with its upload is never
made up for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method.averager import Cohort, Mean
from flexlora.method.averaging import factor_means
from flexlora.method.features import require
from flexlora.method.interface import (
    Client,
    Download,
    Feature,
    FreshAdapters,
    Method,
    RoundContext,
    State,
    Turn,
    UploadSpec,
)
from flexlora.method.regularizer import Regularizer
from flexlora.method.wrapper import MethodWrapper
from flexlora.training import Training

CONTROL = "control"
"""The name of a control in the server's memory, in messages, and in what a client keeps."""
OWN = "own control"
"""The name of the client's own control beside a download, once it is completed."""
HEARD = "control weights"
"""By client: its weight when it last sent a control."""


@dataclass(frozen=True)
class Scaffold(Regularizer):
    """SCAFFOLD; it has no options. Messages and what clients keep are twice as large."""

    title = "SCAFFOLD: gradients corrected for drift"
    paper = "arXiv 1910.06378"

    def wrap(self, method: Method, training: Training) -> Method:
        """The method with controls beside its factors."""
        require(
            method,
            Feature.COMMON_FACTORS,
            "SCAFFOLD averages gradients in the factors, which must keep their meaning from client "
            "to client and round to round; use method 'fedit' or 'ffalora', or regularizer "
            "'fedprox'",
        )
        for name, wanted in (("optimizer", "sgd"), ("momentum", 0), ("weight_decay", 0)):
            if getattr(training, name) != wanted:
                raise ConfigError(
                    f"SCAFFOLD computes gradients from the displacement of the parameters, but "
                    f"training.{name} is {getattr(training, name)!r}; set it to {wanted!r}."
                )
        return WithScaffold(method, training)


@dataclass(frozen=True)
class WithScaffold(MethodWrapper):
    """A method whose clients correct their gradients for their own drift."""

    inner: Method
    training: Training

    @property
    def wrapped(self) -> Method:
        """The method inside."""
        return self.inner

    @property
    def label(self) -> str:
        """SCAFFOLD."""
        return "SCAFFOLD"

    @property
    def features(self) -> frozenset[Feature]:
        """The inner method's, but for mixed ranks and modules: all clients share one control."""
        lost = {Feature.MIXED_RANKS, Feature.PER_MODULE}
        return self.inner.features - lost

    @property
    def needs(self) -> frozenset[Mean]:
        """The inner method's, and that of the controls."""
        return self.inner.needs | {Mean.AUX_FACTORS}

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The method's download, and the mean control once there is one."""
        download = self.inner.handout(state, client, context)
        if CONTROL not in state.memory:
            return download
        return replace(download, aux={**download.aux, CONTROL: state.memory[CONTROL]})

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """The method's start, beside the mean control the client's own."""
        start = self.inner.prepare(download, private, fresh)
        if CONTROL not in private:
            return start
        return replace(start, aux={**start.aux, OWN: private[CONTROL]})

    def penalty(self, current: Mapping[str, Factors], start: Download) -> Tensor | None:
        """The method's own penalty, and one whose gradient is the correction."""
        penalty = self.inner.penalty(current, start)
        terms = [] if penalty is None else [penalty]
        for module, f in (_correction(start) or {}).items():
            at, device = current[module], current[module].B.device
            if "B" in start.factors:
                terms.append((f.B.to(device) * at.B).sum())
            if "A" in start.factors:
                terms.append((f.A.to(device) * at.A).sum())
        return torch.stack(terms).sum() if terms else None

    def aux_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """What the method sends beside its upload, and the change of the client's control."""
        control, own = self._control(turn), turn.start.aux.get(OWN)
        if own is not None:
            control = _sum(control, own, -1)
        return {**self.inner.aux_from(turn), CONTROL: control}

    def private_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """What the method keeps, and the client's control."""
        return {**self.inner.private_from(turn), CONTROL: self._control(turn)}

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """The same of a control as of the factors that are sent."""
        spec = self.inner.upload_spec(state, client, context)
        return UploadSpec(spec.modules, {**spec.aux, CONTROL: spec.modules})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The method's aggregate, and the mean of all controls after their changes."""
        memory = {name: a for name, a in state.memory.items() if name != CONTROL}
        before = replace(state, memory=memory)
        after = self.inner.aggregate(before, cohort, context)
        heard = state.per_client.get(HEARD, {})
        weights = {**heard, **cohort.weights}
        total = sum(weights.values())
        arrived, earlier = sum(cohort.weights.values()) / total, sum(heard.values()) / total
        controls = {}
        for module, last in state.model.items():
            terms = [(arrived, cohort.aux_factors(CONTROL, module))]
            if CONTROL in state.memory:
                terms.append((earlier, state.memory[CONTROL][module]))
            controls[module] = factor_means(terms).to(last.B.dtype)
        return replace(
            after,
            memory={**after.memory, CONTROL: Adapter(controls)},
            per_client={**after.per_client, HEARD: weights},
        )

    def _control(self, turn: Turn) -> Adapter:
        """The client's control after its training, of the factors that it trained."""
        start, steps = turn.start, turn.steps
        rates = [self.training.rate(step, steps, turn.round) for step in range(steps)]
        distance = start.learning_rate_factor * sum(rates)
        gradients = {}
        for module, y in turn.trained.items():
            x, scale = start.adapter[module], self.training.scale(y.rank)
            gradient = Factors((x.B - y.B) / (scale**2 * distance), (x.A - y.A) / distance)
            gradients[module] = gradient.restricted(start.factors)
        correction, control = _correction(start), Adapter(gradients)
        return control if correction is None else _sum(control, correction, -1)


def _correction(start: Download) -> Adapter | None:
    """What every gradient of the training gains: the mean control without the client's own."""
    if OWN not in start.aux:
        return None
    own = start.aux[OWN]
    if CONTROL not in start.aux:
        return Adapter({m: Factors(-f.B, -f.A) for m, f in own.items()})
    return _sum(start.aux[CONTROL], own, -1)


def _sum(one: Adapter, other: Adapter, weight: float) -> Adapter:
    """``one + weight * other``, factor by factor."""
    return Adapter(
        {m: Factors(f.B + weight * other[m].B, f.A + weight * other[m].A) for m, f in one.items()}
    )
