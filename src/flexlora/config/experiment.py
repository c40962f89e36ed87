"""The sections of a config and their checks, made before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flexlora.config import faults, ranks
from flexlora.config.faults import Places
from flexlora.data import Columns, check_name, fields_of, template_text
from flexlora.errors import ConfigError
from flexlora.evaluation import Evaluation
from flexlora.model import Source
from flexlora.training import Training

Section = TypeVar("Section", bound=BaseModel)

CLOSED = ConfigDict(extra="forbid", frozen=True)


class PartitionSettings(BaseModel):
    """How training rows are partitioned among clients; ``natural`` uses the client column."""

    model_config = CLOSED
    kind: Literal["natural", "iid", "dirichlet", "shards", "category"] = "natural"
    clients: int | None = Field(None, ge=1)
    alpha: float = Field(0.5, gt=0)
    shards_per_client: int = Field(2, ge=1)


class DataSettings(BaseModel):
    """The corpus, its prompt format and its partition.

    The format "remote" is for `flexlora serve`: training rows stay with the clients, and
    ``path`` is the server's own table for evaluation, or missing. ``source`` says in words
    where to get the data; it is printed where there is nothing at ``path``.
    """

    model_config = CLOSED
    format: str = "table"
    path: str | None = None
    source: str | None = None
    columns: Columns = Columns()
    encoding: str | None = None
    prompt: str = "alpaca"
    max_tokens: int = Field(512, ge=8)
    clients: int | None = Field(None, ge=1)
    unseen_clients: int = Field(0, ge=0)
    partition: PartitionSettings = Field(default_factory=PartitionSettings)  # type: ignore[arg-type]
    share: float = Field(0.1, gt=0, le=1)
    families: tuple[str, ...] | None = None
    examples: int = Field(80, ge=10)
    cache: str | None = None

    @field_validator("prompt")
    @classmethod
    def _template_text(cls, prompt: str) -> str:
        """The prompt's name, or the text of a template, read from its file."""
        prompt = template_text(prompt)
        check_name(prompt)
        fields_of(prompt)
        return prompt


class RankTypeSettings(BaseModel):
    """A rank type: the ranks of attention and feed-forward layers; 0 for layers not trained."""

    model_config = CLOSED
    attention: int = Field(ge=0)
    feed_forward: int = Field(ge=0)


class Ranks(BaseModel):
    """The clients' ranks: one ``rank`` for all, or rank types and their shares."""

    model_config = CLOSED
    rank: int | None = Field(None, ge=1)
    types: dict[str, RankTypeSettings] | None = None
    distribution: str | dict[str, float] | None = None
    clients: dict[str, str] = {}
    table: str | None = None


class FederationSettings(BaseModel):
    """The number of rounds, the clients in each, and how long the server waits for them.

    A round needs ``cohort`` uploads, or those of a ``fraction`` of the clients. It invites a
    share of ``over_selection`` more clients and uses the first uploads. After
    ``deadline_seconds`` it continues with the uploads that have arrived, if there are at least
    ``quorum``; otherwise it invites other clients, in at most ``attempts`` attempts.
    ``most_examples`` caps a client's weight, because a real client reports its own number of
    examples; ``most_share`` caps its share of the cohort's weights, whatever they are. An upload
    whose change is more than ``clip_factor`` times the median change is scaled down to that, and
    one of more than ``refuse_factor`` times is refused; 0 turns either off.
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
    most_share: float = Field(0.2, gt=0, le=1)
    clip_factor: float = Field(3.0, ge=0)
    refuse_factor: float = Field(100.0, ge=0)
    wire_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class RunSettings(BaseModel):
    """The run's folder, its number of threads, and how many clients train at a time.

    ``clients_at_once`` is measured if not given; it changes results only by rounding.
    ``trackers`` receive the events of the run: tensorboard, mlflow, wandb.
    """

    model_config = CLOSED
    folder: str | None = None
    keep_adapters: Literal["all", "last"] = "all"
    threads: int | None = Field(None, ge=1, le=1024)
    clients_at_once: int | None = Field(None, ge=1, le=10_000)
    trackers: tuple[str, ...] = ()


class Experiment(BaseModel):
    """A complete description of one federation."""

    model_config = CLOSED
    seed: int = Field(0, ge=0)
    model: Source
    data: DataSettings
    ranks: Ranks
    method: dict[str, Any] = {"name": "flexlora"}
    server_optimizer: dict[str, Any] | None = None
    regularizer: dict[str, Any] | None = None
    averager: dict[str, Any] | None = None
    training: Training = Training()
    federation: FederationSettings
    evaluation: Evaluation = Evaluation()
    run: RunSettings = Field(default_factory=RunSettings)  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """The method's hyperparameters."""
        return {key: value for key, value in self.method.items() if key != "name"}


def parse(
    content: Mapping[str, Any], place: str | Path, places: Places | None = None
) -> Experiment:
    """The experiment that nested tables describe; ``place`` is their source, for errors.

    ``places`` says of single keys where they were given.

    Raises:
        ConfigError: a key is unknown or has a wrong type; names all such keys and their places.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{place}: a config is given as nested tables, not as {content!r:.60}, a "
            f"{type(content).__name__}; to read a file call load(path)."
        )
    experiment = validated(Experiment, content, place, places or {})
    _check_distribution(experiment.ranks, place)
    if contradictions := _contradictions(experiment):
        raise ConfigError(f"{place}: {'; '.join(contradictions)}.")
    return experiment


def parse_ranks(content: Mapping[str, Any], place: str | Path) -> Ranks:
    """The section ``ranks`` from its table, checked as in a config.

    Raises:
        ConfigError: a key is unknown, has a wrong type, or contradicts another one.
    """
    content = {key: value for key, value in content.items() if value != ""}
    settings = validated(Ranks, content, place, {})
    _check_distribution(settings, place)
    if contradictions := _rank_contradictions(settings):
        raise ConfigError(f"{place}: {'; '.join(contradictions)}.")
    return settings


def validated(
    section: type[Section], content: Mapping[str, Any], place: str | Path, places: Places
) -> Section:
    """A section from its table; the error has one line for each fault."""
    if unusable := list(faults.unusable(content, str(place), places)):
        raise ConfigError("\n".join(unusable))
    content = _without_empty_ranks(content)
    method = content.get("method")
    if isinstance(method, Mapping):
        content["method"] = {"name": "flexlora", **method}
    try:
        # As JSON, in which lists may become tuples although types are strict.
        return section.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(faults.sentences(section, error, str(place), places))
        ) from error


def _without_empty_ranks(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without empty keys of ``ranks``: TOML has no null, so ``""`` stands for it."""
    section = content.get("ranks")
    if isinstance(section, dict):
        content = {**content, "ranks": {k: v for k, v in section.items() if v != ""}}
    return dict(content)


def _contradictions(experiment: Experiment) -> list[str]:
    """Contradictions between fields, and fields that others require."""
    federation, data = experiment.federation, experiment.data
    found = []
    if (federation.cohort is None) == (federation.fraction is None):
        found.append("give either federation.cohort or federation.fraction")
    if federation.cohort is not None and federation.quorum > federation.cohort:
        found.append(
            f"federation.quorum {federation.quorum} is more than federation.cohort "
            f"{federation.cohort}, the uploads of a round; lower federation.quorum"
        )
    if data.format in ("table", "natural-instructions", "hub") and data.path is None:
        found.append(f"data.format {data.format!r} needs data.path")
    if data.partition.kind in ("iid", "dirichlet", "shards") and data.partition.clients is None:
        found.append(f"data.partition.kind {data.partition.kind!r} needs data.partition.clients")
    return found + _rank_contradictions(experiment.ranks)


def _rank_contradictions(settings: Ranks) -> list[str]:
    """Contradictions between the keys of ``ranks``, and keys that are missing."""
    found = []
    others = {"types": "{}", "clients": "{}", "distribution": '""', "table": '""'}
    given = [name for name in others if getattr(settings, name)]
    if settings.rank is not None and given:
        unset = " and ".join(f"ranks.{name} to {others[name]}" for name in given)
        return [f"ranks.rank is {settings.rank} for all clients; set {unset}, or leave it out"]
    found += [
        f"ranks.types.{name} trains neither attention nor feed_forward; one must be at least 1"
        for name, rank_type in (settings.types or {}).items()
        if rank_type.attention == rank_type.feed_forward == 0
    ]
    choices = ("rank", "distribution", "table")
    given = [name for name in choices if getattr(settings, name) is not None]
    if len(given) > 1 or (not given and not settings.clients):
        found.append(
            f"give one of ranks.rank, ranks.distribution and ranks.table, or ranks.clients "
            f"(given: {', '.join(given) or 'none'})" + ('; set the other to ""' if given else "")
        )
    return found


def _check_distribution(settings: Ranks, place: str | Path) -> None:
    if isinstance(settings.distribution, str):
        try:
            ranks.distribution(settings.distribution)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
