"""An experiment as a TOML file: what may stand in it, checked before anything runs."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.config import ranks
from flexlora.data.corpora.table import Columns
from flexlora.errors import ConfigError
from flexlora.evaluation import Evaluation
from flexlora.model import Source
from flexlora.training import Training

Lines = Mapping[tuple[str, ...], int]
"""The line on which each key of a file stands."""

Section = TypeVar("Section", bound=BaseModel)

CLOSED = ConfigDict(extra="forbid", frozen=True)


class Partition(BaseModel):
    """How training rows are dealt to clients; ``natural`` is by the client column."""

    model_config = CLOSED
    kind: Literal["natural", "iid", "dirichlet", "shards", "category"] = "natural"
    clients: int | None = Field(None, ge=1)
    alpha: float = Field(0.5, gt=0)
    shards_per_client: int = Field(2, ge=1)


class Data(BaseModel):
    """The corpus, its prompt and how it is dealt out.

    The format "remote" is for `flexlora serve`: training rows stay with the clients, and
    ``path`` is a table of the server's own, to evaluate on, or missing.
    """

    model_config = CLOSED
    format: str = "table"
    path: str | None = None
    columns: Columns = Columns()
    prompt: Literal["alpaca", "chat", "plain"] = "alpaca"
    max_tokens: int = Field(512, ge=8)
    clients: int | None = Field(None, ge=1)
    unseen_clients: int = Field(0, ge=0)
    partition: Partition = Field(default_factory=Partition)  # type: ignore[arg-type]
    share: float = Field(0.1, gt=0, le=1)
    families: tuple[str, ...] | None = None
    examples: int = Field(80, ge=10)
    cache: str | None = None


class Type(BaseModel):
    """A rank type: a rank for each of the two kinds of layers; 0 for one that is not trained."""

    model_config = CLOSED
    attention: int = Field(ge=0)
    feed_forward: int = Field(ge=0)


class Ranks(BaseModel):
    """Who trains what at which rank: one ``rank`` for all, or types and their shares."""

    model_config = CLOSED
    rank: int | None = Field(None, ge=1)
    types: dict[str, Type] | None = None
    distribution: str | dict[str, float] | None = None
    clients: dict[str, str] = {}
    table: str | None = None


class Rounds(BaseModel):
    """How many rounds, how many clients in each, and how long they are waited for.

    A round wants ``cohort`` uploads, or those of a ``fraction`` of the clients. It asks
    ``over_selection`` times as many more and goes on with the first that come. Once
    ``deadline_seconds`` are over it goes on with those it has, if they are ``quorum``; else it
    asks others, at most so many times as there are ``attempts``. No client weighs more than
    ``most_examples``: a real one's count is its own word.
    """

    model_config = CLOSED
    rounds: int = Field(ge=1)
    cohort: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    over_selection: float = Field(0.0, ge=0, le=10)
    deadline_seconds: float | None = Field(None, gt=0)
    quorum: int = Field(1, ge=1)
    attempts: int = Field(3, ge=1)
    most_examples: int | None = Field(None, ge=1)
    wire_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Run(BaseModel):
    """Where the run lies, on how many threads it computes, how many clients train at a time.

    ``clients_at_once`` is measured when it is not given; results differ by rounding. ``trackers``
    are told what happens: tensorboard, mlflow.
    """

    model_config = CLOSED
    folder: str | None = None
    keep_adapters: Literal["all", "last"] = "all"
    threads: int | None = Field(None, ge=1)
    clients_at_once: int | None = Field(None, ge=1)
    trackers: tuple[str, ...] = ()


class Experiment(BaseModel):
    """One federation, wholly described."""

    model_config = CLOSED
    seed: int = Field(0, ge=0)
    model: Source
    data: Data
    ranks: Ranks
    method: dict[str, Any] = {"name": "flexlora"}
    server_optimizer: dict[str, Any] | None = None
    regularizer: dict[str, Any] | None = None
    averager: dict[str, Any] | None = None
    training: Training = Training()
    federation: Rounds
    evaluation: Evaluation = Evaluation()
    run: Run = Field(default_factory=Run)  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """The method's hyper-parameters."""
        return {key: value for key, value in self.method.items() if key != "name"}


def load(path: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file, with ``a.b=value`` changes applied.

    ``data.path`` and ``ranks.table`` are relative to the file, other paths to the working folder.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or ill-typed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"The config {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}.") from error
    for change in changes:
        _apply(content, change)
    _anchor(content, path.parent)
    return parse(content, str(path), _lines(text))


def parse(content: Mapping[str, Any], place: str, lines: Lines | None = None) -> Experiment:
    """The experiment that a nested table describes.

    Raises:
        ConfigError: a key is unknown or ill-typed; names all such keys, with their lines.
    """
    experiment = _validated(Experiment, content, place, lines or {})
    try:
        if isinstance(experiment.ranks.distribution, str):
            ranks.distribution(experiment.ranks.distribution)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {error}") from error
    _cross_check(experiment, place)
    return experiment


def _rank_faults(rank: Ranks) -> list[str]:
    """What in a choice of ranks excludes each other, or is missing."""
    faults = []
    if rank.rank is not None and (rank.types or rank.clients):
        faults.append("ranks.rank is for all clients; leave out ranks.types and ranks.clients")
    faults += [
        f"ranks.types.{name} trains neither attention nor feed_forward; one must be at least 1"
        for name, kind in (rank.types or {}).items()
        if kind.attention == kind.feed_forward == 0
    ]
    given = [name for name in ("rank", "distribution", "table") if getattr(rank, name) is not None]
    if len(given) > 1 or (not given and not rank.clients):
        faults.append(
            f"give one of ranks.rank, ranks.distribution and ranks.table, or ranks.clients "
            f"(given: {given or 'none'})"
        )
    return faults


def rank_table(path: Path, clients: Mapping[str, str]) -> Ranks:
    """The ranks in a TOML file of their own, checked as the config's; ``clients`` are added.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or ill-typed.
    """
    content = _without_empty_names({"ranks": ranks.read_table(path)})
    table = {**content["ranks"], "clients": {**clients, **content["ranks"].get("clients", {})}}
    if "table" in table:
        raise ConfigError(f"{path}: 'table' has no place in a rank table.")
    # Checked as a config's section, so that a key is named by its place in the file.
    found = _validated(Ranks, table, str(path), {})
    if faults := _rank_faults(found):
        raise ConfigError(f"{path}: {'; '.join(faults)}.")
    return found


def _validated(
    kind: type[Section], content: Mapping[str, Any], place: str, lines: Lines
) -> Section:
    """A section from its table; all faults at once, each a sentence."""
    content = _without_empty_names(content)
    try:
        # As JSON, in which lists may become tuples though types are strict.
        return kind.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        faults = [_sentence(kind, fault, place, lines) for fault in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(faults))) from error


def _without_empty_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: a column or a rank distribution named "" is one that is not there."""
    ranks = content.get("ranks")
    if isinstance(ranks, dict):
        content = {**content, "ranks": {k: v for k, v in ranks.items() if v != ""}}
    data = content.get("data")
    columns = data.get("columns") if isinstance(data, dict) else None
    if not isinstance(columns, dict):
        return dict(content)
    named = {key: value if value != "" else None for key, value in columns.items()}
    return {**content, "data": {**data, "columns": named}}  # type: ignore[dict-item]


def _cross_check(experiment: Experiment, place: str) -> None:
    """What single fields cannot say of themselves."""
    federation, data, rank = experiment.federation, experiment.data, experiment.ranks
    faults = []
    if (federation.cohort is None) == (federation.fraction is None):
        faults.append("give either federation.cohort or federation.fraction")
    if federation.cohort is not None and federation.quorum > federation.cohort:
        faults.append(
            f"federation.quorum {federation.quorum} is more than a round wants, "
            f"federation.cohort {federation.cohort}"
        )
    if data.format in ("table", "natural-instructions", "hub") and data.path is None:
        faults.append(f"data.format {data.format!r} needs data.path")
    if data.partition.kind in ("iid", "dirichlet", "shards") and data.partition.clients is None:
        faults.append(f"data.partition.kind {data.partition.kind!r} needs data.partition.clients")
    faults += _rank_faults(rank)
    if faults:
        raise ConfigError(f"{place}: {'; '.join(faults)}.")


def _sentence(kind: type[BaseModel], fault: Any, place: str, lines: Lines) -> str:
    """One of pydantic's faults as a sentence with its line and the nearest valid key."""
    path = tuple(str(part) for part in fault["loc"])
    key = ".".join(path)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{place}, line {line}" if line else place
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, 1, 0.5)
        hint = f" Did you mean {'.'.join((*path[:-1], near[0]))!r}?" if near else ""
        return f"{where}: unknown key {key!r}.{hint} Valid here: {', '.join(known)}."
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: {key!r} is missing."
    return f"{where}: {key!r} is {fault['input']!r}; {_lower(fault['msg'])}."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def _keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The valid keys of the section at ``path``."""
    section: Any = kind
    for part in path:
        if get_origin(section) is dict:
            section = get_args(section)[1]
            continue
        if isinstance(section, type) and issubclass(section, BaseModel):
            annotation: Any = section.model_fields[part].annotation
        elif is_dataclass(section):
            annotation = next((f.type for f in fields(section) if f.name == part), None)
        else:
            return []
        if get_origin(annotation) in (types.UnionType, Union):
            annotation = next(a for a in get_args(annotation) if a is not types.NoneType)
        section = annotation
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return [f.name for f in fields(section)] if is_dataclass(section) else []


_TABLE = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$")
_KEY = re.compile(r"""^\s*([A-Za-z0-9_\-."']+)\s*=""")


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """The line on which each table and key of a TOML text stands."""
    table: tuple[str, ...] = ()
    found: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _parts(header[1])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            found.setdefault((*table, *_parts(key[1])), number)
    return found


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _apply(content: dict[str, Any], change: str) -> None:
    """Apply one ``a.b=value``; the value is TOML, or else a string."""
    dotted, equals, text = change.partition("=")
    keys = _parts(dotted)
    if not equals or not all(keys):
        raise ConfigError(f"--set takes KEY=VALUE with a dotted key, not {change!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = content
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {change!r}: {key!r} is a value, not a section.")
    table[keys[-1]] = value


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of a config file absolute."""
    for section, key in (("data", "path"), ("ranks", "table")):
        table = content.get(section)
        if not isinstance(table, dict) or not isinstance(table.get(key), str):
            continue
        if section == "data" and table.get("format") == "hub":
            continue
        table[key] = str((folder / table[key]).resolve())
