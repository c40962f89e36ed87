"""Rounds of any method without a model: what training would do is done by ``learn``.

Everything else is the real thing: handout, wire, receive, shares, aggregate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlora import methods, wire
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.lowrank.parametrization import column
from flexlora.method import averaging
from flexlora.method.handout import chosen_of
from flexlora.method.interface import Client, Download, Fresh, Upload
from flexlora.seeds import rng
from support.oracle import product

SHAPES = {"model.q": (11, 7), "model.up": (13, 5)}
EXAMPLES = [13, 17, 29]
MIXED = [
    {"model.q": 2, "model.up": 1},
    {"model.q": 3, "model.up": 4},
    {"model.q": 6, "model.up": 3},
]
SAME = [{"model.q": 3, "model.up": 2}] * 3
SEED = 5

Learn = Callable[[Client, Download], Adapter]


def made(name, **options):
    return methods.make(name, options)


def clients_of(method, ranks=None):
    """Three clients, of mixed ranks where the method takes them."""
    ranks = ranks or (MIXED if method.mixed_ranks else SAME)
    return [
        Client(f"c{i}", each, f"type{i}", n)
        for i, (each, n) in enumerate(zip(ranks, EXAMPLES, strict=True))
    ]


def started(method, clients, shapes=SHAPES):
    """The first state, in float64, at the largest ranks of these clients."""
    top = {m: max(c.ranks[m] for c in clients) for m in clients[0].ranks}
    return method.start(Fresh(shapes, SEED).common(top).to(torch.float64))


def fresh(client, round, shapes=SHAPES):
    return Fresh(shapes, SEED, client.id, round)


def draw_of(round):
    return lambda name: rng(SEED, "handout", round, name)


@dataclass(frozen=True)
class Turn:
    """A client's turn: its completed start, what it learnt, and what it sent.

    ``trained`` are the parameters where the method trains others than the factors.
    """

    client: Client
    start: Download
    trained: Adapter
    factors: Adapter
    upload: Upload
    kept: Adapter | None

    def model(self, merged=()) -> dict[str, torch.Tensor]:
        """The client's whole update of the base at the end of its turn, dense."""
        found = {m: product(self.factors[m]) for m in SHAPES}
        for adapter in [*merged, *([self.start.rest] if self.start.rest else [])]:
            for module, factors in adapter.items():
                found[module] = found[module] + product(factors)
        return found


def opened(method, state, client, round, kept=None, shapes=SHAPES) -> Download:
    """What the client makes of its handout after a journey over the wire."""
    handed = method.handout(state, client, draw_of(round))
    there = wire.decode_download(wire.encode_download(handed, torch.float64))
    start = method.receive(there, kept, fresh(client, round, shapes))
    return replace(start, adapter=start.adapter.to(torch.float64))


def turn(method, state, client, round, learn: Learn, kept=None, shapes=SHAPES) -> Turn:
    start = opened(method, state, client, round, kept, shapes)
    if method.probes:
        start = chosen_of(start, method.choose(start, learn(client, start)))
    trained = learn(client, start)
    sent = method.shares(start, trained)
    upload = Upload(client.id, round, sent, client.examples, {}, start.terms)
    form, factors = method.form(start), trained
    if form is not None:
        factors = Adapter({m: form[m].factors(f.B[:, 0]) for m, f in trained.items()})
    return Turn(client, start, trained, factors, upload, method.keeps(start, trained))


def jolt(salt=0, own=True, size=1.0, method=None) -> Learn:
    """Training as noise on what is trained: each client's own, or the same for all.

    Where a method trains parameters of its own form, the noise is on those.
    """

    def learn(client, start):
        address = (client.id,) if own else ()
        form = None if method is None else method.form(start)
        if form is not None:
            return _formed(form, rng(SEED, "jolt", salt, *address), size)
        modules = {}
        for module, f in start.adapter.items():
            noise = rng(SEED, "jolt", salt, *address, module)
            B, A = (size * torch.from_numpy(noise.normal(size=x.shape)) for x in (f.B, f.A))
            modules[module] = Factors(
                f.B + B * ("B" in start.halves), f.A + A * ("A" in start.halves)
            )
        return Adapter(modules)

    return learn


def _formed(form, noise: np.random.Generator, size):
    modules = {}
    for module, each in form.items():
        values = each.parameters
        noised = values + size * torch.from_numpy(noise.normal(size=values.shape)).to(values)
        modules[module] = column(noised)
    return Adapter(modules)


def still(client, start):
    """No training at all."""
    return start.adapter


def played(method, clients, rounds, learn_of, state=None):
    """The state after some rounds in which all clients take part."""
    state = started(method, clients) if state is None else state
    kept = dict.fromkeys(c.id for c in clients)
    first = state.facts.get("played", 0) + 1
    for number in range(first, first + rounds):
        turns = [turn(method, state, c, number, learn_of(number), kept[c.id]) for c in clients]
        kept = {t.client.id: t.kept for t in turns}
        state = method.aggregate(state, [t.upload for t in turns])
    return state


def merged(state):
    """What every client has merged that starts from this state."""
    return list(averaging.log(state).values())
