"""SCAFFOLD (arXiv 1910.06378, option II): clients correct their gradients for their own drift.

Client i holds a control ``c_i``, the mean gradient of its last turn, and the server their mean
``c``. Every step's gradient gains ``c - c_i``. After K steps from x to y at learning rates eta

``c_i' = c_i - c + (x - y) / sum(eta)``,

of which the change is sent. Controls are gradients in the effective factors: a client of LoRA
scale s optimises ``B / s``, so B moves by ``s^2 eta`` times its gradient, which is divided out.

Means of gradients in factors need factors that mean the same to all clients and from round to
round: methods that decompose products anew, refresh ``A``, rotate or alternate are refused,
and unequal ranks. Steps must be a learning rate times the gradient: AdamW, momentum and weight
decay are refused. Steps that ``training.clip_norm`` shortens count as they were taken.

Differs: ``c`` is the mean over the clients heard of so far, by examples where the method
averages by examples, so that with everybody present corrections cancel; the paper's counts
clients never heard of as zeros. A client without a control yet is not corrected, where the
paper would add all of ``c`` to its gradient. A change that is lost with its upload is never
made up for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method.averaging import factor_means
from flexlora.method.interface import Client, Download, Draw, Expected, Fresh, Method, State, Upload
from flexlora.method.regularizer import Regularizer
from flexlora.method.wrapper import MethodWrapper
from flexlora.training import Training

CONTROL, OWN, HEARD = "control", "own control", "heard"
BESIDE = f"{CONTROL}/"
"""What the names of modules begin with where a control travels or is kept beside an adapter."""


@dataclass(frozen=True)
class Scaffold(Regularizer):
    """SCAFFOLD; it has no options. Messages and what clients keep are twice as large."""

    title = "SCAFFOLD: gradients corrected for drift"
    paper = "arXiv 1910.06378"

    def around(self, method: Method, training: Training) -> Method:
        """The method with controls beside its factors."""
        if not method.fixed_frame:
            raise ConfigError(
                f"SCAFFOLD averages gradients in the factors, and those of {method.title!r} do "
                "not keep their meaning from client to client and round to round; use method "
                "'fedit' or 'ffalora', or regularizer 'fedprox'."
            )
        for name, wanted in (("optimizer", "sgd"), ("momentum", 0), ("weight_decay", 0)):
            if getattr(training, name) != wanted:
                raise ConfigError(
                    f"SCAFFOLD measures gradients by the way that a client went, but "
                    f"training.{name} is {getattr(training, name)!r}; set it to {wanted!r}."
                )
        return Controlled(method, training)


@dataclass(frozen=True)
class Controlled(MethodWrapper):
    """A method whose clients correct their gradients for their own drift."""

    training: Training

    def __post_init__(self) -> None:
        MethodWrapper.__post_init__(self)
        object.__setattr__(self, "title", f"{self.method.title}; SCAFFOLD")
        object.__setattr__(self, "mixed_ranks", False)
        object.__setattr__(self, "by_module", False)  # a module's control is not under its name

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The method's download, and the mean control once there is one."""
        download = self.method.handout(state, client, draw)
        if CONTROL not in state.adapters:
            return download
        return replace(download, extra={**download.extra, CONTROL: state.adapters[CONTROL]})

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """The method's start, beside the mean control the client's own."""
        if kept is None:
            return self.method.receive(download, None, fresh)
        theirs, own = _parted(kept)
        start = self.method.receive(download, theirs if len(theirs) else None, fresh)
        return replace(start, extra={**start.extra, OWN: own})

    def penalty(self, now: Mapping[str, Factors], start: Download) -> Tensor | None:
        """The method's own penalty, and one whose gradient is the correction."""
        penalty = self.method.penalty(now, start)
        terms = [] if penalty is None else [penalty]
        for module, f in (_correction(start) or {}).items():
            at, device = now[module], now[module].B.device
            if "B" in start.halves:
                terms.append((f.B.to(device) * at.B).sum())
            if "A" in start.halves:
                terms.append((f.A.to(device) * at.A).sum())
        return torch.stack(terms).sum() if terms else None

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """What the method sends, and the change of the client's control."""
        control, own = self._control(start, trained), start.extra.get(OWN)
        if own is not None:
            control = _sum(control, own, -1)
        return _joined(self.method.shares(start, trained), control)

    def keeps(self, start: Download, trained: Adapter) -> Adapter:
        """What the method keeps, and the client's control."""
        kept = self.method.keeps(start, trained)
        return _joined(kept or Adapter({}), self._control(start, trained))

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """The same of a control as of the factors that are sent."""
        expected = self.method.expects(state, client, shapes)
        return {**expected, **{BESIDE + module: each for module, each in expected.items()}}

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The method's aggregate, and the mean of all controls after their changes."""
        parts = [_parted(upload.adapter) for upload in uploads]
        sent = [replace(u, adapter=theirs) for u, (theirs, _) in zip(uploads, parts, strict=True)]
        adapters = {name: a for name, a in state.adapters.items() if name != CONTROL}
        facts = {name: fact for name, fact in state.facts.items() if name != HEARD}
        found = self.method.aggregate(State(adapters, facts), sent)
        known, heard = state.adapters.get(CONTROL), state.facts.get(HEARD, {})
        weighs = getattr(self.method, "weights", "examples") == "examples"
        weights = {u.client: u.examples if weighs else 1 for u in uploads}
        before, now = sum(heard.values()), {**heard, **weights}
        total = sum(now.values())
        control = {}
        for module, last in state.adapters["global"].items():
            terms = [
                (weights[u.client] / total, changes[module])
                for u, (_, changes) in zip(uploads, parts, strict=True)
            ]
            if known is not None:
                terms.append((before / total, known[module]))
            control[module] = factor_means(terms).to(last.B.dtype)
        return State({**found.adapters, CONTROL: Adapter(control)}, {**found.facts, HEARD: now})

    def _control(self, start: Download, trained: Adapter) -> Adapter:
        """The client's control after its turn, of the halves that it trained."""
        steps, round = start.facts["steps"], start.facts["round"]
        way = start.rate * sum(self.training.rate(i, steps, round) for i in range(steps))
        found = {}
        for module, y in trained.items():
            x, scale = start.adapter[module], self.training.scale(y.rank)
            gradient = Factors((x.B - y.B) / (scale**2 * way), (x.A - y.A) / way)
            found[module] = gradient.half(start.halves)
        correction = _correction(start)
        control = Adapter(found)
        return control if correction is None else _sum(control, correction, -1)


def _correction(start: Download) -> Adapter | None:
    """What every gradient of the turn gains: the mean control without the client's own."""
    if OWN not in start.extra:
        return None
    own = start.extra[OWN]
    if CONTROL not in start.extra:
        return Adapter({m: Factors(-f.B, -f.A) for m, f in own.items()})
    return _sum(start.extra[CONTROL], own, -1)


def _sum(one: Adapter, other: Adapter, weight: float) -> Adapter:
    """``one + weight * other``, factor by factor."""
    return Adapter(
        {m: Factors(f.B + weight * other[m].B, f.A + weight * other[m].A) for m, f in one.items()}
    )


def _joined(adapter: Adapter, control: Adapter) -> Adapter:
    return Adapter({**adapter, **{BESIDE + module: f for module, f in control.items()}})


def _parted(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """An adapter and the control beside it; modules are read when they are asked for."""
    names = {m: m for m in adapter if not m.startswith(BESIDE)}
    beside = {m.removeprefix(BESIDE): m for m in adapter if m.startswith(BESIDE)}
    return Adapter(_Part(adapter, names)), Adapter(_Part(adapter, beside))


@dataclass(frozen=True)
class _Part(Mapping[str, Factors]):
    """Some modules of an adapter, by names of their own."""

    whole: Adapter
    names: Mapping[str, str]

    def __getitem__(self, module: str) -> Factors:
        return self.whole[self.names[module]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
