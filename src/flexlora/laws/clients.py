"""Laws of what clients start from, train and keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexlora import wire
from flexlora.federation import ClientStore, checkpoint
from flexlora.federation.influence.measure import kinds_of
from flexlora.laws import rounds
from flexlora.laws.case import Case, is_equal, require
from flexlora.laws.dense import product
from flexlora.laws.rounds import SHAPES
from flexlora.lowrank import Adapter, parameter_change, product_change
from flexlora.method import Download, Feature, State, comparable

UNTRAINED = 1e-6
"""How far an upload without training may be from what the server expects: bases and rotations
are made in float32."""


def a_start_is_trainable(case: Case) -> None:
    """A start has the base's shapes and the client's rank, and no dead component."""
    first = rounds.first_state(case.method, case.clients)
    for state, number in ((first, 1), (case.state, 3)):
        context = rounds.context_of(number, case.clients)
        for client in case.clients:
            start = rounds.opened(case.method, state, client, context)
            for module, f in start.adapter.items():
                require(f.shape == SHAPES[module], f"{module} starts with the shape {f.shape}")
            if case.method.parametrize(start) is not None:
                continue
            require(_is_trainable(start), f"{client.id} starts with dead components")
            if Feature.PROBES not in case.method.features:
                ranks = start.adapter.ranks
                require(ranks == dict(client.ranks), f"{client.id} starts at the ranks {ranks}")


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
        require(0 < trained <= most, f"{turn.client.id} trains {trained} parameters of {most}")


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
    require(equal, "a tensor of the state or of an upload has changed")


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
        require(getattr(loaded, name) == getattr(state, name), f"State.{name} is not the same")
    require(loaded.merge_log.merged_until == state.merge_log.merged_until, "the log differs")
    for client in case.clients:
        downloads = [
            wire.encode_download(case.method.handout(s, client, case.context), torch.float32)
            for s in (state, loaded)
        ]
        require(downloads[0] == downloads[1], f"the download of {client.id} differs")
    updates = [
        case.method.global_adapter(
            rounds.aggregated(case.method, s, case.uploads, case.context), case.context
        )
        for s in (loaded, state)
    ]
    for module in updates[0]:
        require(is_equal(updates[0][module], updates[1][module]), f"{module} is not the same")


def _in_float32(state: State) -> State:
    log = state.merge_log
    updates = {round: update.to(torch.float32) for round, update in log.updates.items()}
    return replace(
        state,
        model=state.model.to(torch.float32),
        memory={name: a.to(torch.float32) for name, a in state.memory.items()},
        merge_log=replace(log, updates=updates),
    )


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
    require(bases[0].keys() == bases[1].keys(), "the bases have updates of other modules")
    equal = all(torch.equal(bases[0][m], bases[1][m]) for m in bases[0])
    require(equal, "the bases differ")
    count = len(always.updates_before(4))
    require(count == len(state.merge_log.updates), f"{count} updates were merged")


def _dense_total(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for m, f in adapter.items():
            total[m] = total[m] + product(f) if m in total else product(f)
    return total


def equal_ranks_get_the_same(case: Case) -> None:
    """Two clients of the same ranks get the same download, to the byte."""
    client = case.clients[1]
    twin = replace(client, id="twin", examples=client.examples + 1)
    messages = [
        wire.encode_download(case.method.handout(case.state, c, case.context), torch.float32)
        for c in (client, twin)
    ]
    require(messages[0] == messages[1], "clients of equal ranks get different downloads")


def an_untrained_upload_is_known(case: Case) -> None:
    """The server knows what a client would send that learnt nothing, and so how far it went."""
    method, still = case.method, rounds.noise(case.method, size=0.0)
    in_products, _ = kinds_of(method)
    for client in case.clients:
        turn = rounds.client_turn(method, case.state, client, case.context, still)
        download = method.handout(case.state, client, case.context)
        start = method.untrained(download, case.context)
        for module, f in turn.upload.adapter.items():
            base = comparable(f, start, module)
            if in_products and all(f.shape):
                moved = product_change(f, base).norm
            else:
                moved = parameter_change(f, base)
            size = parameter_change(f)
            require(
                moved <= UNTRAINED * (1 + size**2),
                f"{client.id} learns nothing and is {moved:.3g} away from its start in {module}",
            )
