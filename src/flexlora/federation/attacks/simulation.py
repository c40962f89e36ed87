"""One federation run again and again, with some clients malicious, under several defences.

All is as in the honest run of the same seed: the clients, their rows and ranks, the cohorts, the
order of the rows. A cell differs from it by what its malicious clients send, and by what the
server does about it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flexlora.config import Experiment
from flexlora.data import Corpus
from flexlora.errors import ConfigError, FlexloraError
from flexlora.federation import checkpoint, client_data, compose, rounds, setup
from flexlora.federation.attacks import kinds
from flexlora.federation.attacks.attack import Rows
from flexlora.federation.attacks.poison import poisoned
from flexlora.federation.attacks.settings import RANKS, AttackSettings
from flexlora.federation.attacks.transport import AttackedTransport
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.client_turn import ClientRuntime
from flexlora.federation.holdout import holdout_loss
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.simulated import SimulatedTransport
from flexlora.journal import Event, Meter
from flexlora.lowrank import Adapter, product_gram, squared_distances
from flexlora.method import Feature, space_of
from flexlora.model import Base
from flexlora.seeds import rng
from flexlora.storage import write_atomically

CELLS = "cells"
RESULT = "result.json"
FORMAT = 1
"""Raised whenever results change: those of another format are not read."""

_HOLDOUT = 0.25
"""The share of its rows that a client holds out where the config names none."""
_EVERY_SECOND = 2
"""Of triggered rows: the model must go on answering the others as usual."""


@dataclass(frozen=True)
class Cell:
    """One run: an attack under a defence, at the ranks that malicious clients have."""

    attack: str
    defence: str
    ranks: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What people call it."""
        ranks = "" if self.ranks == RANKS[0] else f", {self.ranks} rank"
        return f"{self.attack} against {self.defence}{ranks}, seed {self.seed}"


@dataclass(frozen=True)
class Scores:
    """What a run has come to, on the held-out rows of clients that are never malicious.

    ``loss`` is in nats per token; ``target`` is the probability of a token of the target, where
    the attack has one: the backdoor's on rows with the trigger, that of poisoned rows on all.
    ``distance`` is that of the global adapter's product to the honest run's, relative to it.
    """

    loss: float | None
    distance: float | None
    target: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The end of a cell; ``reason`` says why it has no scores."""

    cell: Cell
    state: Literal["finished", "stopped", "refused", "open"]
    scores: Scores | None = None
    reason: str = ""


Watch = Callable[[Cell, Iterator[Event]], object]
"""Takes a cell's events as they come."""


def plan(chosen: AttackSettings, first_seed: int, folder: Path) -> list[Cell]:
    """The cells in ``folder``, seed by seed; of each seed and rank the honest run comes first."""
    attacks = list(dict.fromkeys([kinds.NONE, *chosen.attacks]))
    defences = list(dict.fromkeys([chosen.undefended, *chosen.defences]))
    return [
        Cell(
            attack,
            defence,
            ranks,
            seed,
            folder / CELLS / ranks / defence / attack.replace(":", "-") / f"seed-{seed}",
        )
        for seed in range(first_seed, first_seed + chosen.seeds)
        for ranks in chosen.ranks
        for attack in attacks
        for defence in defences
        # The honest run is what others are compared with, also where no defence is not asked for.
        if defence in chosen.defences or attack == kinds.NONE
    ]


def run(
    settings: Experiment,
    chosen: AttackSettings,
    cells: Sequence[Cell],
    watch: Watch,
    meter: Meter | None = None,
) -> Iterator[Outcome]:
    """Run the unfinished cells one after the other, yielding the outcome of every cell.

    An interrupted cell resumes from its last checkpoint. The model is loaded once.

    Raises:
        ConfigError: the config cannot be used without an attack, or a cell is of another config.
        DataError: the data cannot be used.
    """
    simulation = Simulation.of(settings, chosen, meter)
    for cell in cells:
        yield simulation.outcome(cell, watch)


@dataclass(frozen=True)
class Simulation:
    """What all cells share: the base model, and the clients."""

    settings: Experiment
    chosen: AttackSettings
    base: Base
    clients: tuple[str, ...]
    meter: Meter

    @classmethod
    def of(cls, settings: Experiment, chosen: AttackSettings, meter: Meter | None) -> Simulation:
        """Prepared once to learn which clients there are, and that the config can be used."""
        meter = meter or Meter()
        settings = _evaluated_here(settings)
        ready = setup.prepare(settings, train=False, meter=meter)
        if Feature.PERSONAL in ready.method.features:
            raise ConfigError(
                f"{ready.method.title!r} has no global model whose damage could be measured; "
                "choose another method."
            )
        simulation = cls(settings, chosen, ready.base, tuple(ready.clients), meter)
        count = len(simulation.malicious(chosen.most_attackers, settings.seed))
        if 2 * count >= len(simulation.clients):
            raise ConfigError(
                f"{count} of {len(simulation.clients)} clients would be malicious; no defence "
                "works against half of all. Give a smaller --share, or more clients."
            )
        return simulation

    def malicious(self, least: int, seed: int) -> tuple[str, ...]:
        """The malicious clients of a seed: the share of all, and at least so many.

        Those of an attack that takes fewer are among those of one that takes more.
        """
        order = rng(seed, "attackers").permutation(len(self.clients))
        count = max(round(self.chosen.share * len(self.clients)), least)
        return tuple(self.clients[n] for n in order[:count])

    def outcome(self, cell: Cell, watch: Watch) -> Outcome:
        """Run a cell to its end, or read how it ended."""
        experiment = self._experiment(cell)
        described = self._description(cell, experiment)
        if (result := _read(cell.folder / RESULT)) is not None:
            _check_same(cell, result, described)
            scores = result["scores"] and Scores(**result["scores"])
            return Outcome(cell, result["state"], scores, result["reason"])
        cell.folder.mkdir(parents=True, exist_ok=True)
        state: Literal["finished", "stopped", "refused"] = "finished"
        scores, reason = None, ""
        is_honest = cell.attack == kinds.NONE and cell.defence == self.chosen.undefended
        try:
            ready = setup.prepare(experiment, self._corpus(experiment), base=self.base)
        except ConfigError as error:
            if is_honest:
                raise
            state, reason = "refused", str(error)
        else:
            try:
                watch(cell, self._events(cell, ready))
                scores = self._scores(cell, ready)
            except FlexloraError as error:
                # The damage may be that the run cannot go on; of the honest one it is a fault.
                if is_honest:
                    raise
                state, reason = "stopped", str(error)
        content = {
            **described,
            "state": state,
            "reason": reason,
            "scores": None if scores is None else asdict(scores),
        }
        write_atomically(cell.folder / RESULT, json.dumps(content, indent=1).encode())
        return Outcome(cell, state, scores, reason)

    def _events(self, cell: Cell, ready: PreparedRun) -> Iterator[Event]:
        """The run of a cell, begun or resumed."""
        experiment = ready.experiment
        # Clients' own evaluation would end a run whose model has diverged, and is made here.
        silent = dataclasses.replace(experiment.evaluation, client_share=0.0)
        running = dataclasses.replace(
            ready, experiment=experiment.model_copy(update={"evaluation": silent})
        )
        store = ClientStore(cell.folder / PRIVATE, shared=True)
        honest = SimulatedTransport(
            running.with_runtime(clients=store).runtime, experiment.run.clients_at_once or 1
        )
        attack = kinds.named(cell.attack)
        transport: SimulatedTransport | AttackedTransport = honest
        if attack is not None:
            runtime = self._runtime(experiment, attack.rows, _EVERY_SECOND)
            transport = AttackedTransport(
                honest,
                dataclasses.replace(runtime, clients=store),
                frozenset(self.malicious(attack.least, cell.seed)),
                attack,
                space_of(ready.method),
                experiment.federation.clip_factor,
                experiment.federation.rounds,
                running.ranks,
            )
        begun = (cell.folder / checkpoint.POINTER).exists()
        return rounds.run(running, cell.folder, transport, begun, self.meter)

    def _scores(self, cell: Cell, ready: PreparedRun) -> Scores:
        adapter = _adapter(ready, cell.folder)
        never = self._judges(cell.seed)
        honest = self._honest(cell)
        attack = kinds.named(cell.attack)
        target = None
        if attack is not None and attack.rows != "its own":
            loss = _loss(self._runtime(ready.experiment, attack.rows, 1), adapter, never)
            target = None if loss is None else math.exp(-loss)
        return Scores(
            _loss(ready.runtime, adapter, never),
            None if honest == cell.folder else _distance(adapter, _adapter(ready, honest)),
            target,
        )

    def _judges(self, seed: int) -> list[str]:
        """The clients that no attack of this seed uses: the loss is that on their rows."""
        malicious = self.malicious(self.chosen.most_attackers, seed)
        return [id for id in self.clients if id not in malicious]

    def _honest(self, cell: Cell) -> Path:
        """The folder of the run that a cell is compared with."""
        honest = dataclasses.replace(cell, attack=kinds.NONE, defence=self.chosen.undefended)
        place = cell.folder.parents[2] / honest.defence / honest.attack
        return place / f"seed-{cell.seed}"

    def _experiment(self, cell: Cell) -> Experiment:
        """The config of a cell: its seed, the defence, and the ranks of the malicious clients."""
        values = dict(self.chosen.values(cell.defence))
        averager = values.get("averager")
        if isinstance(averager, dict) and "trusted" in averager:
            trusted = self._judges(cell.seed)[-1]
            values["averager"] = {**averager, "trusted": trusted}
        settings = self.settings.model_copy(update={"seed": cell.seed})
        attack = kinds.named(cell.attack)
        least = self.chosen.most_attackers if attack is None else attack.least
        attackers = self.malicious(least, cell.seed)
        if ranks := self.chosen.ranks_of(cell.ranks, settings.ranks, attackers):
            values["ranks"] = ranks
        return compose.with_values(settings, values, f"the defence {cell.defence!r}")

    def _description(self, cell: Cell, experiment: Experiment) -> dict[str, Any]:
        content = experiment.model_dump(mode="json", exclude={"run": {"folder", "trackers"}})
        chosen = {"trigger": self.chosen.trigger, "target": self.chosen.target}
        return {"format": FORMAT, "attack": cell.attack, "config": content, **chosen}

    def _corpus(self, experiment: Experiment) -> Corpus:
        return client_data.rows_of(experiment, client_data.cache_of(experiment.data), None)

    def _runtime(self, experiment: Experiment, rows: Rows, every: int) -> ClientRuntime:
        """Where malicious clients train: on rows of their own making."""
        chosen = self.chosen
        corpus = poisoned(self._corpus(experiment), rows, chosen.trigger, chosen.target, every)
        return setup.prepare(experiment, corpus, base=self.base).runtime


def _evaluated_here(settings: Experiment) -> Experiment:
    """The config with rows held out by clients, and without any evaluation while it runs."""
    share = settings.evaluation.client_share or _HOLDOUT
    evaluation = dataclasses.replace(
        settings.evaluation,
        every=0,
        base=False,
        truncated=False,
        seen_clients=0,
        unseen_clients=0,
        client_share=share,
    )
    threads = settings.run.threads or torch.get_num_threads()
    changes = {"folder": None, "trackers": (), "keep_adapters": "last", "threads": threads}
    run_settings = settings.run.model_copy(update=changes)
    return settings.model_copy(update={"evaluation": evaluation, "run": run_settings})


def _adapter(ready: PreparedRun, folder: Path) -> Adapter:
    """The global adapter at the end of the run in a folder."""
    point = checkpoint.load(folder)
    return ready.method.global_adapter(point.state, ready.context(point.round))


def _loss(runtime: ClientRuntime, adapter: Adapter, clients: Sequence[str]) -> float | None:
    """The mean loss on the rows that these clients hold out; None if it is no number."""
    try:
        losses = [
            holdout_loss(runtime, id, adapter, _ALL) for id in clients if id in runtime.holdout
        ]
    except ConfigError:
        return None
    tokens = sum(loss.loss_tokens for loss in losses)
    return math.fsum(loss.loss_total for loss in losses) / tokens if tokens else None


_ALL = 10**9
"""More rows than any client holds out."""


def _distance(adapter: Adapter, honest: Adapter) -> float | None:
    """The distance of two adapters' products, relative to the second's norm; None if infinite."""
    apart = size = 0.0
    for module, factors in honest.items():
        gram = product_gram([adapter[module], factors])
        apart += float(squared_distances(gram)[0, 1])
        size += float(gram[1, 1])
    relative = math.sqrt(apart / size) if size and math.isfinite(apart) else math.inf
    return relative if math.isfinite(relative) else None


def _read(path: Path) -> dict[str, Any] | None:
    """A result; None where there is none that can be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(content, dict) and content.get("format") == FORMAT
    return content if usable else None


def _check_same(cell: Cell, result: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if any(result.get(key) != value for key, value in wanted.items()):
        raise ConfigError(
            f"{cell.folder} was run with another config, trigger or target; give the same again, "
            "or another --out."
        )
