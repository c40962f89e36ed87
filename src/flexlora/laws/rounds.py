"""Rounds of any method without a model: training is replaced by a function.

Everything else is what a run does: handout, wire, prepare, upload, averager, aggregate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora import wire
from flexlora.laws.dense import product
from flexlora.lowrank import Adapter, Factors, Parametrization, as_vector
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    FreshAdapters,
    Method,
    RoundContext,
    State,
    Turn,
    Upload,
    averagers,
    with_components,
)
from flexlora.seeds import rng

Shapes = Mapping[str, tuple[int, int]]

SHAPES: Shapes = {"model.q": (11, 7), "model.up": (13, 5)}
"""Modules whose sizes all differ, so that no transpose can hide."""
EXAMPLES = (13, 17, 29)
MIXED_RANKS = (
    {"model.q": 2, "model.up": 1},
    {"model.q": 3, "model.up": 4},
    {"model.q": 6, "model.up": 3},
)
EQUAL_RANKS = ({"model.q": 3, "model.up": 2},) * 3
SEED = 5
STEPS = 4

Learn = Callable[[Client, Download], Adapter]
"""What stands in for training: from a client and its start to what it has trained."""


def clients_of(method: Method, ranks: Sequence[Mapping[str, int]] | None = None) -> list[Client]:
    """Three clients, of mixed ranks where the method supports them."""
    if ranks is None:
        mixed = Feature.MIXED_RANKS in method.features
        ranks = MIXED_RANKS if mixed else EQUAL_RANKS
    return [
        Client(f"c{number}", each, f"type{number}", examples)
        for number, (each, examples) in enumerate(zip(ranks, EXAMPLES, strict=True))
    ]


def context_of(round: int, clients: Sequence[Client], shapes: Shapes = SHAPES) -> RoundContext:
    """The context of a round among these clients."""
    modules = [module for module in shapes if module in clients[0].ranks]
    largest = {m: max(client.ranks[m] for client in clients) for m in modules}
    return RoundContext(round, SEED, {m: shapes[m] for m in modules}, largest)


def first_state(method: Method, clients: Sequence[Client], shapes: Shapes = SHAPES) -> State:
    """The state before the first round, in float64."""
    context = context_of(0, clients, shapes)
    fresh = FreshAdapters(shapes, SEED).common(context.ranks)
    return method.start(fresh.to(torch.float64), context)


@dataclass(frozen=True)
class ClientTurn:
    """A client's round: its completed start, its training, and what it sends and keeps.

    ``factors`` are the effective factors, where the method trains other parameters too.
    """

    client: Client
    start: Download
    trained: Adapter
    factors: Adapter
    upload: Upload
    private: Mapping[str, Adapter]

    @property
    def turn(self) -> Turn:
        """As the method's hooks see it."""
        return Turn(self.start, self.trained, STEPS, self.upload.round)

    def model(self, base_updates: Sequence[Adapter] = ()) -> dict[str, Tensor]:
        """The client's whole update of the base at the end of its training, dense."""
        update = {module: product(f) for module, f in self.factors.items()}
        for adapter in [*base_updates, *([self.start.frozen] if self.start.frozen else [])]:
            for module, factors in adapter.items():
                update[module] = update[module] + product(factors)
        return update


def opened(
    method: Method,
    state: State,
    client: Client,
    context: RoundContext,
    private: Mapping[str, Adapter] | None = None,
) -> Download:
    """What the client makes of its download after a journey over the wire."""
    download = method.handout(state, client, context)
    received = wire.decode_download(wire.encode_download(download, torch.float64))
    fresh = FreshAdapters(context.shapes, context.seed, client.id, context.round)
    start = method.prepare(received, private or {}, fresh)
    return replace(start, adapter=start.adapter.to(torch.float64))


def client_turn(
    method: Method,
    state: State,
    client: Client,
    context: RoundContext,
    learn: Learn,
    private: Mapping[str, Adapter] | None = None,
) -> ClientTurn:
    """One client's round."""
    start = opened(method, state, client, context, private)
    if Feature.PROBES in method.features:
        start = with_components(start, method.select(start, learn(client, start)))
    trained = learn(client, start)
    turn = Turn(start, trained, STEPS, context.round)
    upload = Upload(
        client.id,
        context.round,
        method.upload_from(turn),
        client.examples,
        {},
        start.component_ids,
        method.aux_from(turn),
    )
    parametrizations, factors = method.parametrize(start), trained
    if parametrizations is not None:
        factors = Adapter({m: parametrizations[m].factors(f.B[:, 0]) for m, f in trained.items()})
    return ClientTurn(client, start, trained, factors, upload, method.private_from(turn))


def noise(method: Method, salt: int = 0, own: bool = True, size: float = 1.0) -> Learn:
    """Training as noise on what is trained: each client's own, or the same for all."""

    def learn(client: Client, start: Download) -> Adapter:
        address = (client.id,) if own else ()
        parametrizations = method.parametrize(start)
        if parametrizations is not None:
            return _noisy_parameters(parametrizations, (salt, *address), size)
        modules = {}
        for module, f in start.adapter.items():
            generator = rng(SEED, "noise", salt, *address, module)
            B, A = (size * torch.from_numpy(generator.normal(size=x.shape)) for x in (f.B, f.A))
            modules[module] = Factors(
                f.B + B * ("B" in start.factors), f.A + A * ("A" in start.factors)
            )
        return Adapter(modules)

    return learn


def _noisy_parameters(
    parametrizations: Mapping[str, Parametrization], address: tuple[str | int, ...], size: float
) -> Adapter:
    generator, modules = rng(SEED, "noise", *address), {}
    for module, each in parametrizations.items():
        values = each.parameters
        draw = torch.from_numpy(generator.normal(size=values.shape)).to(values)
        modules[module] = as_vector(values + size * draw)
    return Adapter(modules)


def no_training(client: Client, start: Download) -> Adapter:
    """No training at all."""
    return start.adapter


def cohort_of(
    method: Method, uploads: Sequence[Upload], context: RoundContext, averager: str = "plain"
) -> Cohort:
    """The uploads as an averager gives them to the method."""
    return averagers.make({"name": averager}).cohort(uploads, method.weights, context)


def aggregated(
    method: Method, state: State, uploads: Sequence[Upload], context: RoundContext
) -> State:
    """The state after these uploads, by plain averaging."""
    return method.aggregate(state, cohort_of(method, uploads, context), context)


def after_rounds(
    method: Method,
    clients: Sequence[Client],
    rounds: int,
    learn_in: Callable[[int], Learn],
    state: State | None = None,
    first: int = 1,
    shapes: Shapes = SHAPES,
) -> State:
    """The state after some rounds, from ``first`` on, in which all clients take part."""
    state = first_state(method, clients, shapes) if state is None else state
    private: dict[str, Mapping[str, Adapter]] = {client.id: {} for client in clients}
    for number in range(first, first + rounds):
        context, learn = context_of(number, clients, shapes), learn_in(number)
        turns = [client_turn(method, state, c, context, learn, private[c.id]) for c in clients]
        private = {turn.client.id: turn.private for turn in turns}
        state = aggregated(method, state, [turn.upload for turn in turns], context)
    return state


def base_updates(state: State) -> list[Adapter]:
    """What every client has merged that starts from this state."""
    return list(state.merge_log.updates.values())
