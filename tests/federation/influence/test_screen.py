"""What one upload can do to a round, by every method, without a model: laws in many cases."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexlora import methods
from flexlora.config.experiment import FederationSettings
from flexlora.federation.influence.bounds import Accepted, Medians
from flexlora.federation.influence.measure import PRODUCT
from flexlora.federation.influence.screen import Screen
from flexlora.laws.rounds import (
    client_turn,
    context_of,
    first_state,
    noise,
)
from flexlora.lowrank import Adapter, Factors, LowRankSum, parameter_change
from flexlora.method import Client, Cohort, Mean, Method, State, Upload, averagers
from flexlora.training import Training
from flexlora.wire import RefusedMessage

CASES = int(os.environ.get("FLEXLORA_INFLUENCE_CASES", "40"))
"""How many cases the law of influence is tried in; a thousand in the long form."""

EXAMPLES = (13, 17, 29, 11, 23, 19)
RANKS = {"model.q": 3, "model.up": 2}
SIZE = 0.05


class Federation:
    """Six clients of a method after two rounds, and what screens the uploads of the third."""

    def __init__(self, method: Method, folder: Path, **federation: float) -> None:
        self.method, self.folder = method, folder
        self.clients = [Client(f"c{n}", RANKS, "all", e) for n, e in enumerate(EXAMPLES)]
        self.state: State = first_state(method, self.clients)
        self.private: dict[str, dict[str, Adapter]] = {c.id: {} for c in self.clients}
        settings = FederationSettings(rounds=3, cohort=6, **federation)
        experiment = SimpleNamespace(training=Training(scaling="none"), federation=settings)
        self.prepared = SimpleNamespace(
            method=method,
            clients={client.id: client for client in self.clients},
            shapes=context_of(0, self.clients).shapes,
            context=lambda number: context_of(number, self.clients),
            wire_dtype=torch.float64,
            experiment=experiment,
        )
        self.earlier = Accepted()
        for number in (1, 2):
            uploads = self.uploads(number)
            screen = self.screen(number)
            for upload in uploads.values():
                screen.measure(upload, self.state)
            self.earlier = screen.accepted(list(uploads.values()))
            self.state = method.aggregate(
                self.state, self.cohort(uploads, number), context_of(number, self.clients)
            )

    def uploads(self, number: int) -> dict[str, Upload]:
        found = {}
        context, learn = context_of(number, self.clients), noise(self.method, number, size=SIZE)
        for client in self.clients:
            turn = client_turn(
                self.method, self.state, client, context, learn, self.private[client.id]
            )
            self.private[client.id] = dict(turn.private)
            found[client.id] = turn.upload
        return found

    def screen(self, number: int) -> Screen:
        return Screen(
            self.prepared, number, self.earlier, self.folder / "clipped", self.folder / "down"
        )

    def cohort(self, uploads: dict[str, Upload], number: int = 3) -> Cohort:
        plain = averagers.make({"name": "plain"})
        context = context_of(number, self.clients)
        made = plain.cohort(list(uploads.values()), self.method.weights, context)
        return made.limited(self.prepared.experiment.federation.most_share)

    def screened(self, uploads: dict[str, Upload]) -> tuple[dict[str, Upload], Screen, Medians]:
        """The uploads that are used, as they are used, and what they were compared with."""
        screen, used = self.screen(3), dict(uploads)
        for id, upload in uploads.items():
            try:
                screen.measure(upload, self.state)
            except RefusedMessage:
                del used[id]
        for id in screen.refused(used):
            del used[id]
        medians = Medians.of([screen.changes[id] for id in used], self.earlier)
        used |= {clip.upload.client: clip.upload for clip in screen.clip(used, self.state)}
        return used, screen, medians


def changed(upload: Upload, change: Callable[[str, Factors], Factors]) -> Upload:
    def whole(adapter: Adapter) -> Adapter:
        return Adapter({m: change(m, f) for m, f in adapter.items()})

    aux = {name: whole(adapter) for name, adapter in upload.aux.items()}
    return replace(upload, adapter=whole(upload.adapter), aux=aux)


def hostile(upload: Upload, kind: str, size: float, draw: np.random.Generator) -> Upload:
    """An upload of this kind, ``size`` times as large as an honest one in some sense."""

    def drawn(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(draw.normal(size=tuple(x.shape))).to(x) * SIZE * size

    def change(module: str, f: Factors) -> Factors:
        match kind:
            case "scaled":
                return Factors(f.B * size, f.A)
            case "flipped":
                return Factors(f.B * -size, f.A)
            case "noise":
                return Factors(f.B + drawn(f.B), f.A + drawn(f.A))
            case "one module":
                return Factors(f.B * size, f.A * size) if module == "model.up" else f
            case "gauge":
                return Factors(f.B * size, f.A / size)
            case "cancelling" if f.rank > 1:
                B, A = f.B.clone(), f.A.clone()
                B[:, 0], B[:, 1] = size * B[:, 1], -size * B[:, 1] + SIZE * B[:, 0]
                A[0] = A[1]
                return Factors(B, A)
            case "nothing":
                return Factors(f.B * 0, f.A * 0)
        return f

    return changed(upload, change)


KINDS = ("scaled", "flipped", "noise", "one module", "gauge", "cancelling", "nothing")


def moved(one: dict[str, Factors], other: dict[str, Factors], products: bool) -> float:
    """How far apart two means are, all modules together."""
    squares = []
    for module, f in one.items():
        g = other[module]
        if products:
            squares.append(LowRankSum.of([(1.0, f), (-1.0, g)]).norm() ** 2)
        else:
            squares.append(parameter_change(f, g) ** 2)
    return math.sqrt(math.fsum(squares))


def mean(cohort: Cohort, of: Mean) -> dict[str, Factors]:
    read = {
        Mean.PRODUCTS: lambda m: cohort.products(m).stacked(torch.float64),
        Mean.PRODUCTS_BY_COMPONENT: lambda m: cohort.products_by_component(m).stacked(
            torch.float64
        ),
        Mean.FACTORS: cohort.factors,
    }[of]
    return {module: read(module) for module in RANKS}


LAWFUL = [
    (name, each)
    for name in methods.names()
    for each in sorted(methods.make(name).needs)
    if each in (Mean.PRODUCTS, Mean.PRODUCTS_BY_COMPONENT, Mean.FACTORS)
]


@pytest.mark.parametrize(("name", "of"), LAWFUL)
def test_one_client_moves_a_mean_by_its_share_of_two_changes(name, of, tmp_path):
    """``|mean with it - mean without it| <= 2 C w / sum w``, whatever it sends.

    C is the largest change of an upload that is used; all start from the same.
    """
    federation = Federation(methods.make(name), tmp_path)
    honest = federation.uploads(3)
    draw = np.random.default_rng(len(name))
    in_products = of is not Mean.FACTORS
    for case in range(max(CASES // len(LAWFUL), len(KINDS))):
        size = 10 ** draw.uniform(0, 7)
        sent = {**honest, "c2": hostile(honest["c2"], KINDS[case % len(KINDS)], size, draw)}
        used, screen, _ = federation.screened(sent)
        assert set(honest) - {"c2"} <= set(used)
        if "c2" not in used:
            continue
        both = federation.cohort(used)
        others = {id: upload for id, upload in used.items() if id != "c2"}
        # The share that it has, with the others at the weights that they have beside it.
        without = replace(
            federation.cohort(others),
            raw_weights=tuple(both.weights[id] for id in others),
        )
        kinds = (
            [PRODUCT] if in_products else [k for k in screen.changes["c2"].norms if k != PRODUCT]
        )
        largest = max(
            math.sqrt(math.fsum(n**2 for k in kinds for n in screen.changes[id].norms[k].values()))
            for id in used
        )
        share = both.weights["c2"] / sum(both.weights.values())
        step = moved(mean(both, of), mean(without, of), in_products)
        assert step <= 2 * largest * share * (1 + 1e-6), KINDS[case % len(KINDS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_no_upload_outgrows_the_clip(name, tmp_path):
    """What is used of a hostile upload is within the bound, by every kind that the method uses."""
    federation = Federation(methods.make(name), tmp_path, refuse_factor=0)
    honest = federation.uploads(3)
    draw = np.random.default_rng(3)
    for kind in KINDS:
        sent = {**honest, "c2": hostile(honest["c2"], kind, 50.0, draw)}
        used, screen, medians = federation.screened(sent)
        if "c2" not in used:
            continue
        change = screen.changes["c2"]
        assert change.bounding
        for each in change.bounding:
            assert medians.ratio(change, each) <= 3 * (1 + 1e-5), (kind, each)
        for id in honest:
            if id != "c2":
                assert used[id] is sent[id], "an honest upload is left as it is"
        after = federation.method.aggregate(
            federation.state, federation.cohort(used), context_of(3, federation.clients)
        )
        for f in [f for a in (after.model, *after.memory.values()) for f in a.values()]:
            assert f.B.isfinite().all() and f.A.isfinite().all()
