"""The laws that every method must obey, whatever it does.

Each law is a function of a ``Case`` that raises ``Violation`` where the method breaks it. All
sizes differ pairwise, so that no transpose can hide, and all numbers are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora import wire
from flexlora.errors import FlexloraError
from flexlora.federation import checkpoint
from flexlora.federation.client_store import ClientStore
from flexlora.laws import rounds
from flexlora.laws.dense import best, product, relative_error
from flexlora.laws.rounds import SHAPES, ClientTurn, Learn
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Download,
    Feature,
    Method,
    RoundContext,
    State,
    Upload,
    partial_step,
)
from flexlora.model import FlatAdapter
from flexlora.seeds import rng
from flexlora.wire import validate

ROUNDING = 1e-9
"""The relative error allowed in float64: of an SVD the null space costs some digits."""


class Violation(AssertionError):
    """A method breaks a law; the text says how."""


@dataclass(frozen=True)
class Case:
    """A method among three clients, with a past of two rounds and the uploads of the third.

    ``folder`` is empty and may be written to.
    """

    method: Method
    folder: Path

    @cached_property
    def clients(self) -> list[Client]:
        """Three clients, of mixed ranks where the method supports them."""
        return rounds.clients_of(self.method)

    @cached_property
    def state(self) -> State:
        """The state after two rounds in which every client learnt something."""
        return rounds.after_rounds(self.method, self.clients, 2, self.noise)

    @cached_property
    def context(self) -> RoundContext:
        """That of the third round."""
        return rounds.context_of(3, self.clients)

    @cached_property
    def turns(self) -> list[ClientTurn]:
        """The third round of every client."""
        return [
            rounds.client_turn(self.method, self.state, client, self.context, self.noise(3))
            for client in self.clients
        ]

    @property
    def uploads(self) -> list[Upload]:
        """The uploads of the third round."""
        return [turn.upload for turn in self.turns]

    @property
    def has_parameters_of_its_own(self) -> bool:
        """Whether clients train other parameters than the factors in the third round."""
        return self.method.parametrize(self.turns[0].start) is not None

    def noise(self, number: int) -> Learn:
        """Training as noise, other noise in every round."""
        return rounds.noise(self.method, number)

    def update(self, uploads: Sequence[Upload]) -> Adapter:
        """The update after aggregation; of personal models what is shared, as an update."""
        after = rounds.aggregated(self.method, self.state, uploads, self.context)
        if Feature.PERSONAL not in self.method.features:
            return self.method.global_adapter(after, self.context)
        return Adapter({m: _with_ones(f) for m, f in after.model.items()})


@dataclass(frozen=True)
class Law:
    """A law by name; ``applies`` says whether it means anything for a method.

    A method that a law exempts by design names it, with the reason, in ``Info.exempt``.
    """

    name: str
    statement: str
    check: Callable[[Case], None]
    applies: Callable[[Case], bool] = lambda case: True


def _with_ones(f: Factors) -> Factors:
    return Factors(torch.ones(f.shape[0], f.rank, dtype=f.A.dtype), f.A)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise Violation(sentence)


def _require_same(
    value: Mapping[str, Factors], expected: Mapping[str, Factors], tolerance: float = ROUNDING
) -> None:
    for module in expected:
        error = relative_error(product(value[module]), product(expected[module]))
        _require(error < tolerance, f"{module}: the products differ by {error:.3g}")


def order_is_irrelevant(case: Case) -> None:
    """The order of clients does not matter."""
    _require_same(case.update(case.uploads[::-1]), case.update(case.uploads))


def weights_are_relative(case: Case) -> None:
    """Three times as many examples everywhere change nothing."""
    heavier = [replace(upload, examples=3 * upload.examples) for upload in case.uploads]
    _require_same(case.update(heavier), case.update(case.uploads))


def equal_clients_are_a_fixed_point(case: Case) -> None:
    """One client, or three equal ones, of full rank: the update is their model."""
    method = replace(case.method, **case.method.info.lossless)  # type: ignore[type-var]
    client = case.clients[1]
    state = rounds.after_rounds(method, [client], 1, lambda number: rounds.noise(method, number))
    context = rounds.context_of(2, [client])
    turn = rounds.client_turn(method, state, client, context, rounds.noise(method, 2))
    expected = turn.model(rounds.base_updates(state))
    for count in (1, 3):
        uploads = [replace(turn.upload, client=f"c{number}") for number in range(count)]
        after = rounds.aggregated(method, state, uploads, context)
        update = method.global_adapter(after, context)
        for module, model in expected.items():
            error = relative_error(product(update[module]), model)
            _require(error < 1e-6, f"{module}, {count} clients: the update is off by {error:.3g}")


def exactness_is_as_declared(case: Case) -> None:
    """Against the dense float64 mean of the clients' whole models, cut to the rank kept."""
    update = case.update(case.uploads)
    errors = [
        relative_error(product(f), best(_dense_mean(case, module), f.rank))
        for module, f in update.items()
    ]
    exact = case.method.info.exact
    _require(
        max(errors) < ROUNDING if exact else max(errors) > 1e-3,
        f"declared exact={exact}, but the relative error is {max(errors):.3g}",
    )


def _dense_mean(case: Case, module: str) -> Tensor:
    turns, total = case.turns, torch.zeros(SHAPES[module], dtype=torch.float64)
    if not case.method.info.by_component:
        examples = sum(turn.client.examples for turn in turns)
        for turn in turns:
            model = turn.model(rounds.base_updates(case.state))[module]
            total += turn.client.examples / examples * model
        return total
    for component in range(max(turn.factors[module].rank for turn in turns)):
        trainers = [turn for turn in turns if turn.factors[module].rank > component]
        examples = sum(turn.client.examples for turn in trainers)
        for turn in trainers:
            f = turn.factors[module]
            outer = torch.outer(f.B[:, component], f.A[component])
            total += turn.client.examples / examples * outer
    return total


def a_start_is_trainable(case: Case) -> None:
    """A start has the base's shapes and the client's rank, and no dead component."""
    first = rounds.first_state(case.method, case.clients)
    for state, number in ((first, 1), (case.state, 3)):
        context = rounds.context_of(number, case.clients)
        for client in case.clients:
            start = rounds.opened(case.method, state, client, context)
            for module, f in start.adapter.items():
                _require(f.shape == SHAPES[module], f"{module} starts with the shape {f.shape}")
            if case.method.parametrize(start) is not None:
                continue
            _require(_is_trainable(start), f"{client.id} starts with dead components")
            if Feature.PROBES not in case.method.features:
                ranks = start.adapter.ranks
                _require(ranks == dict(client.ranks), f"{client.id} starts at the ranks {ranks}")


def _is_trainable(start: Download) -> bool:
    for f in start.adapter.values():
        alive_A, alive_B = (f.A != 0).any(1), (f.B != 0).any(0)
        alive = {"BA": alive_A | alive_B, "B": alive_A, "A": alive_B}
        if not bool(alive[start.factors].all()):
            return False
    return True


def ranks_bound_the_training(case: Case) -> None:
    """A client trains no more parameters than its ranks allow."""
    for turn in case.turns:
        factors = turn.start.factors
        trained = sum(
            f.B.numel() * ("B" in factors) + f.A.numel() * ("A" in factors)
            for f in turn.start.adapter.values()
        )
        most = sum(rank * sum(SHAPES[m]) for m, rank in turn.client.ranks.items())
        if Feature.PROBES in case.method.features:
            widest = max(max(shape) for shape in SHAPES.values())
            most = widest * sum(turn.client.ranks.values())
        _require(0 < trained <= most, f"{turn.client.id} trains {trained} parameters of {most}")


def the_gauge_is_irrelevant(case: Case) -> None:
    """(B R, R^-1 A) is the same update; a mean of factors needs one R for all clients."""
    method, exact = case.method, case.method.info.exact
    ranks = None if exact else [case.clients[1].ranks] * 3
    clients = rounds.clients_of(method, ranks)
    state = rounds.after_rounds(method, clients, 2, case.noise)
    context, learn = rounds.context_of(3, clients), case.noise(3)

    def rotated(client: Client, start: Download) -> Adapter:
        salt = clients.index(client) if exact else 0
        return Adapter({m: _rotated(f, salt) for m, f in learn(client, start).items()})

    straight, turned = (
        [rounds.client_turn(method, state, c, context, each).upload for c in clients]
        for each in (learn, rotated)
    )
    updates = [
        method.global_adapter(rounds.aggregated(method, state, uploads, context), context)
        for uploads in (straight, turned)
    ]
    _require_same(updates[1], updates[0], 1e-8)


def _rotated(f: Factors, salt: int) -> Factors:
    generator = rng(rounds.SEED, "gauge", f.rank, salt)
    R = torch.linalg.qr(torch.from_numpy(generator.normal(size=(f.rank, f.rank)))).Q
    return Factors(f.B @ R, R.T @ f.A)


def inputs_are_not_changed(case: Case) -> None:
    """No hook writes into what it is given."""
    method, state, context = case.method, case.state, case.context
    before = _values(case)
    for turn in case.turns:
        method.handout(state, turn.client, context)
        method.upload_from(turn.turn)
        method.private_from(turn.turn)
    after = rounds.aggregated(method, state, case.uploads, context)
    method.global_adapter(after, context)
    equal = all(torch.equal(x, y) for x, y in zip(before, _values(case), strict=True))
    _require(equal, "a tensor of the state or of an upload has changed")


def _values(case: Case) -> list[Tensor]:
    state = case.state
    adapters = [state.model, *state.memory.values(), *state.merge_log.updates.values()]
    for turn in case.turns:
        adapters += [turn.upload.adapter, turn.trained, turn.start.adapter]
    return [x.clone() for a in adapters for f in a.values() for x in (f.B, f.A)]


def a_state_survives_saving(case: Case) -> None:
    """To the bit in float32, which a checkpoint has: a resumed run is the same run."""
    state = _in_float32(case.state)
    loaded = checkpoint.save(case.folder, 2, 0, state).state
    for name in ("per_module", "per_client"):
        _require(getattr(loaded, name) == getattr(state, name), f"State.{name} is not the same")
    _require(loaded.merge_log.merged_until == state.merge_log.merged_until, "the log differs")
    for client in case.clients:
        downloads = [
            wire.encode_download(case.method.handout(s, client, case.context), torch.float32)
            for s in (state, loaded)
        ]
        _require(downloads[0] == downloads[1], f"the download of {client.id} differs")
    updates = [
        case.method.global_adapter(
            rounds.aggregated(case.method, s, case.uploads, case.context), case.context
        )
        for s in (loaded, state)
    ]
    for module in updates[0]:
        _require(_is_equal(updates[0][module], updates[1][module]), f"{module} is not the same")


def _in_float32(state: State) -> State:
    log = state.merge_log
    updates = {round: update.to(torch.float32) for round, update in log.updates.items()}
    return replace(
        state,
        model=state.model.to(torch.float32),
        memory={name: a.to(torch.float32) for name, a in state.memory.items()},
        merge_log=replace(log, updates=updates),
    )


def _is_equal(one: Factors, other: Factors) -> bool:
    return torch.equal(one.B, other.B) and torch.equal(one.A, other.A)


def bytes_are_parameters(case: Case) -> None:
    """A message's length beside its header is four bytes for each parameter that it carries."""
    sparse = Feature.SPARSE_MESSAGES in case.method.features
    for client, upload in zip(case.clients, case.uploads, strict=True):
        download = case.method.handout(case.state, client, case.context)
        adapters = [download.adapter, *download.base_updates.values(), *download.aux.values()]
        adapters += [download.frozen] if download.frozen else []
        down = sum(adapter.parameters for adapter in adapters)
        up = sum(adapter.parameters for adapter in (upload.adapter, *upload.aux.values()))
        for data, count in (
            (wire.encode_download(download, torch.float32, sparse), down),
            (wire.encode_upload(upload, torch.float32, sparse), up),
        ):
            body = len(data) - 8 - int.from_bytes(data[:8], "little")
            fits = body <= 4 * count if sparse else body == 4 * count
            _require(fits, f"a message of {count} parameters has {body} bytes")


def only_the_expected_is_accepted(case: Case) -> None:
    """An upload passes validation; one of other ranks, shapes or modules does not."""
    for client, upload in zip(case.clients, case.uploads, strict=True):
        expected = case.method.upload_spec(case.state, client, case.context)
        sent = replace(
            upload,
            adapter=upload.adapter.to(torch.float32),
            aux={name: adapter.to(torch.float32) for name, adapter in upload.aux.items()},
        )
        validate.upload(sent, client, 3, expected, client.examples)
        for change in (_larger, _wider, _fewer_modules):
            wrong = replace(sent, adapter=change(sent.adapter))
            try:
                validate.upload(wrong, client, 3, expected, client.examples)
            except FlexloraError:
                continue
            raise Violation(f"an upload that is{change.__name__.replace('_', ' ')} is accepted")


def _larger(adapter: Adapter) -> Adapter:
    return Adapter(
        {
            m: Factors(
                torch.cat([f.B, f.B.new_ones(f.B.shape[0], 40)], 1),
                torch.cat([f.A, f.A.new_ones(40, f.A.shape[1])], 0),
            )
            for m, f in adapter.items()
        }
    )


def _wider(adapter: Adapter) -> Adapter:
    return Adapter(
        {
            m: Factors(torch.cat([f.B, f.B.new_ones(f.B.shape[0] + 1, f.rank)]), f.A)
            for m, f in adapter.items()
        }
    )


def _fewer_modules(adapter: Adapter) -> Adapter:
    return adapter.only(list(adapter)[1:])


def missed_rounds_are_made_up_for(case: Case) -> None:
    """Through the files that a client keeps: always present, or only in the last round."""
    method, clients = case.method, case.clients
    state = rounds.first_state(method, clients)
    stores = always, late = ClientStore(case.folder / "a"), ClientStore(case.folder / "b")
    for number in (1, 2, 3):
        context = rounds.context_of(number, clients)
        turns = [
            rounds.client_turn(method, state, c, context, case.noise(number)) for c in clients[:2]
        ]
        always.add_updates(method.handout(state, clients[0], context).base_updates)
        state = rounds.aggregated(method, state, [turn.upload for turn in turns], context)
    for store, client in ((always, clients[0]), (late, clients[2])):
        context = rounds.context_of(4, clients)
        store.add_updates(method.handout(state, client, context).base_updates)
    bases = [_dense_total(store.updates_before(4)) for store in stores]
    _require(bases[0].keys() == bases[1].keys(), "the bases have updates of other modules")
    equal = all(torch.equal(bases[0][m], bases[1][m]) for m in bases[0])
    _require(equal, "the bases differ")
    count = len(always.updates_before(4))
    _require(count == len(state.merge_log.updates), f"{count} updates were merged")


def _dense_total(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for m, f in adapter.items():
            total[m] = total[m] + product(f) if m in total else product(f)
    return total


def the_scale_is_folded(case: Case) -> None:
    """Clients with different LoRA scales but equal products give the same update.

    Through the parameters that a client trains, which have the scale taken out of ``B``.
    """
    uploads = []
    for turn, scale in zip(case.turns, (3.0, 0.7, 1.9), strict=True):
        parameters = FlatAdapter.of(turn.trained, partial(_constant, scale), torch.device("cpu"))
        scaled = replace(turn.turn, trained=parameters.finish().to(torch.float64))
        uploads.append(replace(turn.upload, adapter=case.method.upload_from(scaled)))
    # Parameters in training are float32: a hundred times its rounding.
    _require_same(case.update(uploads), case.update(case.uploads), 1e-5)


def _constant(scale: float, rank: int) -> float:
    return scale


def an_upload_survives_the_wire(case: Case) -> None:
    """To the bit, with its component ids and what travels beside it."""
    for number, upload in enumerate(case.uploads):
        received = _sent(upload, case.folder / str(number), torch.float64)
        ids = {m: tuple(numbers) for m, numbers in upload.component_ids.items()}
        _require(received.component_ids == ids, "the component ids differ")
        _require(received.aux.keys() == upload.aux.keys(), "what travels beside it differs")
        for module, f in upload.adapter.items():
            _require(_is_equal(received.adapter[module], f), f"{module} differs")
            _require(received.adapter.rank(module) == f.rank, f"{module} has another rank")


def _sent(upload: Upload, path: Path, dtype: torch.dtype) -> Upload:
    path.write_bytes(wire.encode_upload(upload, dtype))
    return wire.open_upload(path)


APART: rounds.Shapes = {
    "z.q": (11, 7),
    "z.up": (13, 5),
    "a.q": (12, 9),
    "m.down": (8, 10),
    "b.k": (6, 14),
    "c.v": (15, 4),
}
"""Modules in an order that is not that of their names, in which a checkpoint's are read."""


def parts_are_the_whole(case: Case) -> None:
    """However the modules are split, from memory and from the disk, aggregation is the same."""
    method = case.method
    mixed = ((2, 1, 2, 3, 1, 2), (3, 4, 2, 2, 3, 1), (5, 3, 4, 4, 2, 4))
    ranks = mixed if Feature.MIXED_RANKS in method.features else [mixed[0]] * 3
    clients = rounds.clients_of(method, [dict(zip(APART, each, strict=True)) for each in ranks])
    state = rounds.first_state(method, clients, APART)
    private: dict[str, Mapping[str, Adapter]] = {client.id: {} for client in clients}
    for number in (1, 2, 3, 4):
        context, learn = rounds.context_of(number, clients, APART), case.noise(number)
        turns = [
            rounds.client_turn(method, state, c, context, learn, private[c.id]) for c in clients
        ]
        private = {turn.client.id: turn.private for turn in turns}
        uploads = [_sent(t.upload, case.folder / t.client.id, torch.float32) for t in turns]
        cohort = rounds.cohort_of(method, uploads, context)
        whole, modules = method.aggregate(state, cohort, context), list(context.ranks)
        for split in ([[m] for m in modules], [modules[1::2], modules[::2][::-1]], [modules]):
            parts = [partial_step.aggregate(method, state, cohort, context, part) for part in split]
            _require_equal_states(partial_step.joined(state, parts, context), whole)
        state = whole if number % 2 else checkpoint.save(case.folder, number, 0, whole).state


def _require_equal_states(joined: State, whole: State) -> None:
    pairs: list[tuple[str, Any, Any]] = [
        ("per_module", joined.per_module, whole.per_module),
        ("per_client", joined.per_client, whole.per_client),
        ("merged_until", joined.merge_log.merged_until, whole.merge_log.merged_until),
        ("memory", list(joined.memory), list(whole.memory)),
        ("updates", list(joined.merge_log.updates), list(whole.merge_log.updates)),
    ]
    for name, value, expected in pairs:
        _require(value == expected, f"{name} differs")
    adapters = [(joined.model, whole.model)]
    adapters += [(joined.memory[name], whole.memory[name]) for name in whole.memory]
    updates = whole.merge_log.updates
    adapters += [(joined.merge_log.updates[n], updates[n]) for n in updates]
    for adapter, expected in adapters:
        _require(set(adapter) == set(expected), "the modules differ")
        for module, f in expected.items():
            _require(_is_equal(adapter[module], f), f"{module} differs")


def equal_ranks_get_the_same(case: Case) -> None:
    """Two clients of the same ranks get the same download, to the byte."""
    client = case.clients[1]
    twin = replace(client, id="twin", examples=client.examples + 1)
    messages = [
        wire.encode_download(case.method.handout(case.state, c, case.context), torch.float32)
        for c in (client, twin)
    ]
    _require(messages[0] == messages[1], "clients of equal ranks get different downloads")


def _has(feature: Feature) -> Callable[[Case], bool]:
    return lambda case: feature in case.method.features


def _has_global_model(case: Case) -> bool:
    return Feature.PERSONAL not in case.method.features


def _trains_factors(case: Case) -> bool:
    return not case.has_parameters_of_its_own


def _law(
    name: str, check: Callable[[Case], None], applies: Callable[[Case], bool] = lambda case: True
) -> Law:
    return Law(name, (check.__doc__ or "").partition("\n")[0], check, applies)


LAWS: tuple[Law, ...] = (
    _law("order", order_is_irrelevant),
    _law("weights", weights_are_relative),
    _law("fixed point", equal_clients_are_a_fixed_point, _has_global_model),
    _law("exactness", exactness_is_as_declared, _has_global_model),
    _law("start", a_start_is_trainable),
    _law("rank bound", ranks_bound_the_training, _trains_factors),
    _law("gauge", the_gauge_is_irrelevant, _has_global_model),
    _law("purity", inputs_are_not_changed),
    _law("resume", a_state_survives_saving),
    _law("bytes", bytes_are_parameters),
    _law("validation", only_the_expected_is_accepted),
    _law(
        "missed rounds",
        missed_rounds_are_made_up_for,
        lambda case: bool(case.state.merge_log.updates),
    ),
    _law("scale", the_scale_is_folded, _trains_factors),
    _law("wire", an_upload_survives_the_wire),
    _law("parts", parts_are_the_whole, _has(Feature.PER_MODULE)),
    _law("equal ranks", equal_ranks_get_the_same, _has(Feature.SAME_FOR_EQUAL_RANKS)),
)
