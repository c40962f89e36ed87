"""Many methods on one config: a federation for each method and seed, all else the same.

The cohort of a round, the order of a client's rows, the questions of an evaluation and the
fresh ranks are drawn from the seed and from no method; bytes are counted where they are
encoded. So cells of one seed differ by their method alone.
"""

from __future__ import annotations

import json
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flexlora import methods
from flexlora.config import Experiment
from flexlora.data import Corpus
from flexlora.data.corpora import hub, procedural
from flexlora.errors import ConfigError, FlexloraError
from flexlora.federation import checkpoint, compose, rounds, setup
from flexlora.federation.prepared import PreparedRun
from flexlora.journal import Event, Record
from flexlora.model import Base
from flexlora.storage.files import write_atomically

ALL = "all"
CELLS = "cells"
FILES = ("comparison.md", "comparison.json", "comparison.html")
"""What a comparison leaves in its folder, beside its cells."""

NEUTRAL = {"method": {"name": "flexlora"}, "server_optimizer": None, "regularizer": None}
"""What refuses no config: what is refused with it, is the config's own fault."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed: a run of its own in ``folder``."""

    method: str
    seed: int
    folder: Path
    experiment: Experiment


@dataclass(frozen=True)
class Outcome:
    """How a cell ended, with the ``reason`` if it was refused or failed; ``open``: not yet."""

    cell: Cell
    state: Literal["finished", "refused", "failed", "open"]
    reason: str = ""


Watch = Callable[[Cell, Iterator[Event], int], object]
"""Takes a cell's events as they come, and how many turns of clients are still to do."""


def chosen(names: str) -> list[str]:
    """The methods that ``all`` or ``a,b,c`` names, each once, in this order.

    Raises:
        ConfigError: there is no such method (the nearest is named), or none is named.
    """
    if names.strip() == ALL:
        return methods.names()
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise ConfigError(f"--methods names no method ({names!r}); give {ALL}, or a,b,c.")
    for name in found:
        methods.kind(name)
    return found


def plan(
    settings: Experiment,
    names: Sequence[str],
    seeds: int,
    folder: Path,
    options: Sequence[str] = (),
) -> list[Cell]:
    """The cells of a comparison in ``folder``, seed by seed; nothing is written.

    The seeds are the config's and those that follow it. ``options`` are texts
    ``METHOD.KEY=VALUE``; the method that the config names also has the config's options.

    Raises:
        ConfigError: there is no seed, an option is wrong, or the folder holds something else.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; give at least 1, and 3 or more to see a spread.")
    given = _options(settings, names, options)
    cells = [
        Cell(name, seed, folder / CELLS / name / f"seed-{seed}", _of(settings, given[name], seed))
        for seed in range(settings.seed, settings.seed + seeds)
        for name in names
    ]
    _refuse_something_else(folder)
    for cell in cells:
        _refuse_another_config(cell)
    return cells


def run(cells: Sequence[Cell], watch: Watch) -> Iterator[Outcome]:
    """Run the cells that are not finished, one after the other, and say how each ended.

    A cell that was interrupted goes on from its last checkpoint. The model is loaded once. As
    it is the same for all methods, the base model is evaluated in one cell of each seed; as
    many clients train at a time in every cell as in the first. Unless the config says
    otherwise a cell keeps the adapter of its last round alone.

    Raises:
        ConfigError: the data or the model cannot be used, whatever the method.
    """
    base: Base | None = None
    clients_at_once: int | None = None
    corpora: dict[int, Corpus | None] = {}
    base_known: set[int] = set()
    for cell in cells:
        outcome = Outcome(cell, "finished")
        if not is_finished(cell.folder):
            if cell.seed not in corpora:
                corpora = {cell.seed: _corpus(cell.experiment)}
            if base is None:
                neutral = cell.experiment.model_copy(update=NEUTRAL)
                base = setup.prepare(neutral, corpora[cell.seed], train=False).base
            settings = _settled(cell, clients_at_once, cell.seed not in base_known)
            outcome = _run(cell, settings, corpora[cell.seed], base, watch)
        for event in Record(cell.folder).events("start", "evaluation"):
            if event["event"] == "start":
                clients_at_once = clients_at_once or event["clients_at_once"]
            elif event["adapter"] == "base":
                base_known.add(cell.seed)
        yield outcome


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder came to its end."""
    return any(Record(folder).events("finish"))


def _run(
    cell: Cell, settings: Experiment, corpus: Corpus | None, base: Base, watch: Watch
) -> Outcome:
    """Run one cell to its end, or say why it has none."""
    note = cell.folder.with_name(f"{cell.folder.name}.error.txt")
    note.unlink(missing_ok=True)
    try:
        try:
            ready = setup.prepare(settings, corpus, base=base)
        except FlexloraError as error:
            return Outcome(cell, "refused", str(error))
        _watched(cell, ready, watch)
    # Whatever goes wrong with one method says nothing of the others.
    except Exception as error:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(traceback.format_exc(), encoding="utf-8")
        kind = "" if isinstance(error, FlexloraError) else f"{type(error).__name__}: "
        return Outcome(cell, "failed", f"{kind}{error}")
    return Outcome(cell, "finished")


def _watched(cell: Cell, ready: PreparedRun, watch: Watch) -> None:
    begun = _begun(cell.folder)
    if not begun:
        cell.folder.mkdir(parents=True, exist_ok=True)
        stored = ready.experiment.model_dump_json(indent=1)
        write_atomically(cell.folder / "config.json", stored.encode())
    done = checkpoint.load(cell.folder).round if begun else 0
    left = ready.experiment.federation.rounds - done
    turns = left * min(ready.cohort_size, len(ready.clients))
    watch(cell, rounds.run(ready, cell.folder, resume=begun), turns)


def _settled(cell: Cell, clients_at_once: int | None, evaluate_base: bool) -> Experiment:
    """The experiment with what the comparison decides for it; of a begun cell, as it began."""
    if _begun(cell.folder):
        return _stored(cell.folder)
    settings = cell.experiment
    given = settings.run.model_fields_set
    how: dict[str, Any] = {"threads": torch.get_num_threads()}
    how |= {} if "keep_adapters" in given else {"keep_adapters": "last"}
    how |= {} if clients_at_once is None else {"clients_at_once": clients_at_once}
    evaluation = settings.evaluation
    if evaluation.base and not evaluate_base:
        evaluation = replace(evaluation, base=False)
    here = settings.run.model_copy(update=how)
    return settings.model_copy(update={"run": here, "evaluation": evaluation})


def _of(settings: Experiment, method: Mapping[str, Any], seed: int) -> Experiment:
    """The experiment with another method and seed, in no folder of its own."""
    here = settings.run.model_copy(update={"folder": None})
    return settings.model_copy(update={"method": dict(method), "seed": seed, "run": here})


def _options(
    settings: Experiment, names: Sequence[str], texts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The method section of each method."""
    given: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}
    if settings.method["name"] in given:
        given[settings.method["name"]] |= settings.options()
    for text in texts:
        dotted, equals, value = text.partition("=")
        name, _, key = (part.strip() for part in dotted.partition("."))
        if not equals or not name or not key or key == "name":
            raise ConfigError(
                f"--option takes METHOD.KEY=VALUE, such as hetlora.keep=0.9, not {text!r}."
            )
        methods.kind(name)
        if name not in given:
            raise ConfigError(
                f"--option {text!r} is for a method that is not compared; the methods are "
                f"{', '.join(names)}."
            )
        given[name][key] = _value(value)
        # Here and not in the cell, where it would pass for the method's refusal of the config.
        methods.make(name, {k: v for k, v in given[name].items() if k != "name"})
    return given


def _value(text: str) -> Any:
    """A value as TOML writes it, or else a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _corpus(settings: Experiment) -> Corpus | None:
    """The corpus, where each cell would make or convert it anew; files are mapped, not read."""
    data = settings.data
    if data.format == "procedural":
        families = data.families or procedural.FAMILIES
        return procedural.generate(families, examples=data.examples, seed=settings.seed)
    if data.format == "hub":
        return hub.read(str(data.path), data.columns)
    return None


def _begun(folder: Path) -> bool:
    return (folder / checkpoint.POINTER).exists()


def _stored(folder: Path) -> Experiment:
    """The experiment that the cell in this folder was started with."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{folder} is no cell of a comparison: its config.json cannot be read ({error}); "
            "give another --output."
        ) from error
    return compose.parse(content, str(path))


def _refuse_something_else(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give --output a folder.")
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # Drafts of files start with a dot.
    if others := sorted(name for name in held - {CELLS, *FILES} if not name.startswith(".")):
        raise ConfigError(
            f"{folder} holds something else than a comparison ({', '.join(others[:3])}); give "
            "another --output."
        )


def _refuse_another_config(cell: Cell) -> None:
    """Refuse a cell that was run with another config; its run section may differ."""
    if not cell.folder.exists() or not any(cell.folder.iterdir()):
        return
    stored, wanted = _compared(_stored(cell.folder)), _compared(cell.experiment)
    if keys := list(_differing(stored, wanted)):
        raise ConfigError(
            f"{cell.folder} was run with another config (it differs in {', '.join(keys)}); "
            "give the same config again, or another --output."
        )


def _compared(settings: Experiment) -> dict[str, Any]:
    """What a cell must share with the comparison's config: not where the base is evaluated."""
    content = settings.model_dump(mode="json", exclude={"run"})
    content["evaluation"].pop("base")
    return content


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[str]:
    """The dotted keys of the values that differ."""
    for key in sorted(ours.keys() | theirs.keys()):
        one, other, here = ours.get(key), theirs.get(key), (*path, key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differing(one, other, here)
        elif one != other:
            yield ".".join(here)
