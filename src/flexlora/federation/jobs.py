"""The jobs of a file made ready to train: the rows of each are read as those of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flexlora.config import JobFile, JobSettings
from flexlora.errors import ConfigError, FlexloraError
from flexlora.federation import client_data, corpora
from flexlora.training.job import Job


def prepared(file: JobFile) -> tuple[list[Job], Path]:
    """The jobs of a file, and the folder in which their tokens are kept for the next call.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: rows cannot be read.
    """
    caches = {settings.data.cache for settings in file.jobs}
    if len(caches) > 1:
        raise ConfigError(
            f"{file.place}: data.cache differs from job to job ({', '.join(map(str, caches))}); "
            "give one for all of them, in [defaults.data]."
        )
    return list(_jobs(file)), client_data.cache_of(file.jobs[0].data)


def _jobs(file: JobFile) -> Iterator[Job]:
    for settings in file.jobs:
        try:
            yield _job(settings)
        except FlexloraError as error:
            raise type(error)(f"{file.place}, job {settings.name!r}: {error}") from error


def _job(settings: JobSettings) -> Job:
    data = settings.data
    corpora.check(data.format)
    rows = client_data.read_data(
        data, settings.seed, list(settings.where), client_data.cache_of(data)
    )
    return Job(
        name=settings.name,
        rows=rows,
        rank=settings.rank,
        rank_pattern=settings.rank_pattern,
        targets=settings.targets,
        training=settings.training,
        seed=settings.seed,
        prompt=data.prompt,
        max_tokens=data.max_tokens,
        where=settings.where,
    )
