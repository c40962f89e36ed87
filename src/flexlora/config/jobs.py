"""A file of jobs: the adapters to train on one base model, with defaults that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, Field

from flexlora.config.experiment import CLOSED, DataSettings, validated
from flexlora.config.toml import apply_changes, lines_of, make_paths_absolute, read_toml
from flexlora.data import SELECTABLE
from flexlora.errors import ConfigError
from flexlora.model import Source
from flexlora.training import Training

Key = tuple[str, ...]

_MERGED: Final = ("data", "columns", "training")
"""Sections of which a job gives only the keys that differ from those of ``defaults``."""

_OF_CLIENTS: Final = ("clients", "unseen_clients", "partition")
"""Keys of ``data`` that divide rows among clients, of which a job has none."""


class JobSettings(BaseModel):
    """One job: an adapter, and how it is trained; see ``flexlora.Job``."""

    model_config = CLOSED
    name: str
    rank: int = Field(8, ge=1)
    rank_pattern: dict[str, int] = {}
    targets: tuple[str, ...] | str | None = None
    where: dict[str, str] = {}
    seed: int = Field(0, ge=0)
    data: DataSettings
    training: Training = Training()


class JobsRunSettings(BaseModel):
    """Where the adapters go, the number of threads, and how many jobs train at a time."""

    model_config = CLOSED
    folder: str | None = None
    threads: int | None = Field(None, ge=1, le=1024)
    at_once: int | None = Field(None, ge=1, le=10_000)


class _File(BaseModel):
    """The top level of a file of jobs; defaults and jobs are checked when they are merged."""

    model_config = CLOSED
    model: Source
    defaults: dict[str, Any] = {}
    job: tuple[dict[str, Any], ...]
    run: JobsRunSettings = Field(default_factory=JobsRunSettings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class JobFile:
    """The jobs in a file, complete, with their base model; ``place`` is the file."""

    place: str
    model: Source
    jobs: tuple[JobSettings, ...]
    run: JobsRunSettings


def load_jobs(path: Path | str, changes: Sequence[str] = ()) -> JobFile:
    """The jobs in a TOML file, with ``a.b=value`` changes of all but single jobs applied.

    A job has the keys of the table ``defaults`` that it does not give itself. Paths are relative
    to the file, or in a change to the working folder.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or has a wrong type, or a job has
            no name; names all such keys, with their lines.
    """
    path = Path(path)
    text, content = read_toml(path, "file of jobs")
    lines = {key: f"{path}, line {line}" for key, line in lines_of(text).items()}
    _check_form(content, path)
    changed = apply_changes(content, changes)
    _check_form(content, path)
    top = {**content, "defaults": {}, "job": [{}]}  # what is in these is checked when merged
    file = validated(_File, top, path, lines | changed)
    defaults, of_defaults = content.get("defaults", {}), _below(lines | changed, "defaults")
    set_keys = [key[1:] for key in changed if key[0] == "defaults"]
    relative = {k for k in _keys(defaults, ()) if any(k[: len(key)] == key for key in set_keys)}
    jobs, faults = [], list[str]()
    for number, table in enumerate(content["job"]):
        place = lines.get(("job", str(number)), f"{path}, job {number + 1}")
        merged, own = _merged(defaults, table), list(_keys(table, ()))
        places = of_defaults | _places_of(own, _below(lines, "job", str(number)))
        try:
            _resolve_paths(merged, path, relative.difference(own), place)
            job = validated(JobSettings, merged, place, places)
            jobs.append(job)
            faults += [f"{place}: {fault}." for fault in _contradictions(job)]
        except ConfigError as error:
            faults += str(error).splitlines()
    if faults:
        # A fault in the defaults is the same in every job.
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return JobFile(str(path), file.model, tuple(jobs), file.run)


def _resolve_paths(job: dict[str, Any], path: Path, changed: set[Key], place: str) -> None:
    """Make the paths of a job absolute, in place."""
    try:
        make_paths_absolute(job, path.parent, changed)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _places_of(keys: Sequence[Key], places: Mapping[Key, str]) -> dict[Key, str]:
    """The place of each key: of one in an inline table, that of the table."""
    found = {}
    for key in keys:
        above = (key[:end] for end in range(len(key), -1, -1))
        if place := next((places[k] for k in above if k in places), None):
            found[key] = place
    return found


def _keys(content: Any, path: Key) -> Iterator[Key]:
    """All keys of a table, those of tables in it as well."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield (*path, name)
            yield from _keys(value, (*path, name))


def _below(places: Mapping[Key, str], *table: str) -> dict[Key, str]:
    """The places of the keys of a table, relative to it."""
    size = len(table)
    return {key[size:]: place for key, place in places.items() if key[:size] == table}


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a job with the defaults of what it does not give."""
    merged = {**defaults, **own}
    for key in _MERGED:
        before, after = defaults.get(key), own.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            merged[key] = _merged(before, after)
        elif isinstance(merged.get(key), Mapping):
            merged[key] = dict(merged[key])
    return merged


def _check_form(content: Mapping[str, Any], path: Path) -> None:
    """Refuse what is no file of jobs at all.

    Raises:
        ConfigError: with how one is written.
    """
    jobs, defaults = content.get("job"), content.get("defaults", {})
    if "federation" in content:
        raise ConfigError(
            f"{path} is the config of a run, as it has a section federation; start it with: "
            f"flexlora run {path}"
        )
    if isinstance(jobs, Mapping):
        raise ConfigError(f"{path}: a job begins with [[job]], in two pairs of brackets.")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(j, Mapping) for j in jobs):
        raise ConfigError(
            f'{path} has no jobs; begin each with the line [[job]], and a line name = "..." below '
            "it."
        )
    if not isinstance(defaults, Mapping):
        raise ConfigError(f"{path}: defaults is {defaults!r:.80}; give a section [defaults].")
    if "name" in defaults:
        raise ConfigError(f"{path}: defaults.name is given; each job has a name of its own.")


def _contradictions(job: JobSettings) -> Iterator[str]:
    """What does not go together in a job, and what has no effect."""
    for key in _OF_CLIENTS:
        if key in job.data.model_fields_set:
            yield (
                f"data.{key} divides rows among clients, and job {job.name!r} trains on all of "
                'its rows; leave it out, or choose rows with where = { client = "..." }'
            )
    for column in job.where:
        if column not in SELECTABLE:
            yield (
                f"where of job {job.name!r} names the column {column!r:.80}; give one of "
                f"{', '.join(SELECTABLE)}"
            )
    if job.data.format == "remote":
        yield f"data.format of job {job.name!r} is 'remote'; a job needs rows on this machine"
    if job.data.format in ("table", "natural-instructions", "hub") and job.data.path is None:
        yield f"data.format {job.data.format!r} needs data.path"
