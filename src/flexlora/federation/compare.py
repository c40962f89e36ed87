"""Several methods on one config: one run per method and seed, all else being equal.

The cohort of a round, the order of a client's rows, the evaluation questions and the initial
values of new ranks are drawn from the seed and never by a method; bytes are counted where
messages are encoded. So the cells of one seed differ only in their method.
"""

from __future__ import annotations

import re
import tomllib
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flexlora import methods
from flexlora.config import ComparisonSettings, Experiment
from flexlora.data import Corpus
from flexlora.data.corpora import hub, procedural
from flexlora.errors import ConfigError, FlexloraError, sentence
from flexlora.federation import checkpoint, compose, rounds, setup
from flexlora.federation.identity import differing
from flexlora.federation.prepared import PreparedRun
from flexlora.journal import Event, Meter, Record
from flexlora.method import Feature, UnsupportedFeature
from flexlora.model import Base, Source
from flexlora.storage import DamagedFile, locked, make_private

ALL = "all"
CELLS = "cells"
FILES = ("comparison.md", "comparison.json", "comparison.html")
"""The files of a comparison in its folder, beside its cells."""

NEUTRAL = {"method": {"name": "flexlora"}, "server_optimizer": None, "regularizer": None}
"""Sections that accept every config, so that an error raised with them is the config's."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed, run in ``folder``.

    ``variant`` is the name of the variant of the config, if several are compared, and ``changes``
    are its values by dotted key; ``own`` are those of the method.
    """

    method: str
    seed: int
    folder: Path
    experiment: Experiment
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method, and the variant if there are several."""
        return f"{self.method}, {self.variant}" if self.variant else self.method


@dataclass(frozen=True)
class Outcome:
    """The end of a cell, with the ``reason`` if it was refused or failed.

    ``refused``: the method cannot be used with this config; ``lacks`` is the feature that it would
    need, if that is the reason. ``open``: not finished yet.
    """

    cell: Cell
    state: Literal["finished", "refused", "failed", "open"]
    reason: str = ""
    lacks: Feature | None = None


Watch = Callable[[Cell, Iterator[Event]], object]
"""Takes a cell's events as they come."""


def chosen(names: str) -> list[str]:
    """The methods that ``all`` or ``a,b,c`` names, each once, in this order.

    Raises:
        ConfigError: a method does not exist (the nearest is named), or none is named.
    """
    if names.strip().lower() == ALL:
        return methods.names()
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise ConfigError(f"--methods names no method ({names!r}); give {ALL}, or a,b,c.")
    return list(dict.fromkeys(map(methods.resolve, listed)))


def plan(
    settings: Experiment,
    names: Sequence[str],
    seeds: int,
    folder: Path,
    options: Sequence[str] = (),
    compared: ComparisonSettings | None = None,
) -> list[Cell]:
    """The cells of a comparison in ``folder``, seed by seed; nothing is written.

    The seeds are the config's and those that follow it. ``options`` are texts
    ``METHOD.KEY=VALUE``, of options of the method or, if the key has a dot, of the config; the
    method that the config names also has the config's options. ``compared`` has settings by
    method, and variants of the config, with each of which every method is run.

    Raises:
        ConfigError: ``seeds`` is below 1, an option or a variant is wrong, or the folder holds
            other files or the cells of another config.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; give at least 1, and 3 or more to see a spread.")
    compared = compared or ComparisonSettings()
    given = _settings(names, options, compared.settings)
    sections = _sections(settings, names, given)
    cells = []
    for variant, changes in (compared.variants or {"": {}}).items():
        changed = compose.with_values(settings, changes, f"variant {variant!r}")
        for name in names:
            own = {key: value for key, value in given[name].items() if "." in key}
            experiment = compose.with_values(changed, own, f"settings of {name}")
            place = folder / CELLS / _file_name(variant) / name
            cells += [
                Cell(
                    name,
                    seed,
                    place / f"seed-{seed}",
                    _of(experiment, sections[name], seed),
                    variant,
                    changes,
                    own,
                )
                for seed in range(settings.seed, settings.seed + seeds)
            ]
    cells.sort(key=lambda cell: cell.seed)
    _refuse_something_else(folder)
    for cell in cells:
        _refuse_another_config(cell)
    return cells


def run(cells: Sequence[Cell], watch: Watch, meter: Meter | None = None) -> Iterator[Outcome]:
    """Run the unfinished cells one after the other, yielding the outcome of every cell.

    An interrupted cell resumes from its last checkpoint. The model is loaded once. The base
    model's scores do not depend on the method, so it is evaluated in one cell of each seed (and
    variant). The
    first cell measures how many clients train at a time, and the others use the same number.
    Unless the config says otherwise, a cell keeps only the adapter of its last round.

    Raises:
        ConfigError: the data or the model cannot be used with any method.
    """
    base: Base | None = None
    source: Source | None = None
    clients_at_once: int | None = None
    corpora: dict[tuple[int, str], Corpus | None] = {}
    with_base: set[tuple[int, str]] = set()
    for cell in cells:
        outcome = Outcome(cell, "finished")
        if not is_finished(cell.folder):
            data = (cell.seed, cell.experiment.data.model_dump_json())
            if data not in corpora:
                corpora = {data: _corpus(cell.experiment)}
            if base is None or source != cell.experiment.model:
                neutral = cell.experiment.model_copy(update=NEUTRAL)
                base = setup.prepare(neutral, corpora[data], train=False, meter=meter).base
                source = cell.experiment.model
            is_base_due = (cell.seed, cell.variant) not in with_base
            settings = _settled(cell, clients_at_once, is_base_due)
            outcome = _run(cell, settings, corpora[data], base, watch, meter)
        for event in Record(cell.folder).events("start", "evaluation"):
            if event["event"] == "start":
                clients_at_once = clients_at_once or event["clients_at_once"]
            elif event["adapter"] == "base":
                with_base.add((cell.seed, cell.variant))
        yield outcome


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder has finished, as far as its journal can be read."""
    try:
        return any(Record(folder).events("finish"))
    except DamagedFile:
        return False


def _run(
    cell: Cell,
    settings: Experiment,
    corpus: Corpus | None,
    base: Base,
    watch: Watch,
    meter: Meter | None,
) -> Outcome:
    """Run one cell to its end, or give the reason why it has none."""
    note = cell.folder.with_name(f"{cell.folder.name}.error.txt")
    note.unlink(missing_ok=True)
    try:
        try:
            ready = setup.prepare(settings, corpus, base=base, meter=meter)
        except FlexloraError as error:
            lacks = error.feature if isinstance(error, UnsupportedFeature) else None
            return Outcome(cell, "refused", str(error), lacks)
        _watched(cell, ready, watch, meter)
    # A failure of one method must not stop the others.
    except Exception as error:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(cell, "failed", sentence(error) or f"{type(error).__name__}: {error}")
    return Outcome(cell, "finished")


def _watched(cell: Cell, ready: PreparedRun, watch: Watch, meter: Meter | None) -> None:
    make_private(cell.folder)
    with locked(cell.folder):
        begun = _begun(cell.folder)
        if not begun:
            compose.store(ready.experiment, cell.folder)
        watch(cell, rounds.run_locked(ready, cell.folder, resume=begun, meter=meter))


def _settled(cell: Cell, clients_at_once: int | None, evaluate_base: bool) -> Experiment:
    """The experiment with the settings that the comparison decides; a begun cell keeps its own."""
    if _begun(cell.folder):
        return _stored(cell.folder)
    settings = cell.experiment
    changes: dict[str, Any] = {"threads": torch.get_num_threads()}
    if "keep_adapters" not in settings.run.model_fields_set:
        changes["keep_adapters"] = "last"
    if clients_at_once is not None:
        changes["clients_at_once"] = clients_at_once
    evaluation = settings.evaluation
    if evaluation.base and not evaluate_base:
        evaluation = replace(evaluation, base=False)
    run_settings = settings.run.model_copy(update=changes)
    return settings.model_copy(update={"run": run_settings, "evaluation": evaluation})


def _of(settings: Experiment, method: Mapping[str, Any], seed: int) -> Experiment:
    """The experiment with another method and seed, and without a folder."""
    run_settings = settings.run.model_copy(update={"folder": None})
    return settings.model_copy(update={"method": dict(method), "seed": seed, "run": run_settings})


def _settings(
    names: Sequence[str], texts: Sequence[str], tables: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The settings of each method, from the config's table and from ``METHOD.KEY=VALUE`` texts."""
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for written, values in tables.items():
        name = methods.resolve(written)
        # The file may set more methods than are compared this time.
        if name in given:
            given[name] |= values
    for text in texts:
        dotted, equals, value = text.partition("=")
        written, _, key = (part.strip() for part in dotted.partition("."))
        if not equals or not written or not key or key == "name":
            raise ConfigError(
                "--option takes METHOD.KEY=VALUE, such as hetlora.keep=0.9 or "
                f"hetlora.training.learning_rate=1e-3, not {text!r}."
            )
        name = methods.resolve(written)
        if name not in given:
            raise ConfigError(
                f"--option {text!r} is for a method that is not compared; the methods are "
                f"{', '.join(names)}."
            )
        given[name][key] = _value(value)
    return given


def _sections(
    settings: Experiment, names: Sequence[str], given: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The method section of each method."""
    sections: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}
    if settings.method["name"] in sections:
        sections[settings.method["name"]] |= settings.options()
    for name, values in given.items():
        sections[name] |= {key: value for key, value in values.items() if "." not in key}
        # Checked here: in the cell, a wrong option would look like the method's refusal.
        methods.make(name, {k: v for k, v in sections[name].items() if k != "name"})
    return sections


def _file_name(variant: str) -> str:
    """A folder's name for a variant; different variants have different ones."""
    plain = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", variant)[:60]
    return plain if plain == variant else f"{plain}-{zlib.crc32(variant.encode()):08x}"


def _value(text: str) -> Any:
    """A value in TOML's notation, or else a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _corpus(settings: Experiment) -> Corpus | None:
    """The corpus, if each cell would have to generate or convert it again, else None.

    Files need no corpus here: every cell maps them into memory.
    """
    data = settings.data
    if data.format == "procedural":
        families = data.families or procedural.FAMILIES
        return procedural.generate(families, examples=data.examples, seed=settings.seed)
    if data.format == "hub":
        return hub.read(str(data.path), data.columns)
    return None


def _begun(folder: Path) -> bool:
    return checkpoint.is_begun(folder)


def _stored(folder: Path) -> Experiment:
    """The experiment that the cell in this folder was started with."""
    try:
        return compose.stored(folder)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} is no cell of a comparison that can go on: {error} Or give another --out."
        ) from error


def _refuse_something_else(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give --out a folder.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # Unfinished files start with a dot.
    if others := sorted(name for name in names - {CELLS, *FILES} if not name.startswith(".")):
        raise ConfigError(
            f"{folder} holds something else than a comparison ({', '.join(others[:3])}); give "
            "another --out."
        )


def _refuse_another_config(cell: Cell) -> None:
    """Refuse a cell that was run with another config; its run section may differ."""
    if not cell.folder.exists() or not any(cell.folder.iterdir()):
        return
    stored, wanted = _compared(_stored(cell.folder)), _compared(cell.experiment)
    if keys := list(differing(stored, wanted)):
        raise ConfigError(
            f"{cell.folder} was run with another config (it differs in {', '.join(keys)}); "
            "give the same config again, or another --out."
        )


def _compared(settings: Experiment) -> dict[str, Any]:
    """The settings that a cell must share with the comparison's config.

    Which cell evaluates the base model is not one of them.
    """
    content = settings.model_dump(mode="json", exclude={"run": True, "data": {"source"}})
    content["evaluation"].pop("base")
    return content
