"""Many adapters of different ranks and settings, trained in one pass on one base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from flexlora import peft_format
from flexlora.data import TokenStore, named
from flexlora.errors import ConfigError, DataError
from flexlora.journal import Meter
from flexlora.model import Base, Source
from flexlora.seeds import rng
from flexlora.storage import expanded, locked
from flexlora.training import finished
from flexlora.training.finished import JobResult
from flexlora.training.job import Job
from flexlora.training.loop import ClientTask, Trained, train_in_turn


def train_adapters(
    base: str | Path | Source | Base,
    jobs: Sequence[Job],
    out: str | Path | None = None,
    *,
    at_once: int | None = None,
    cache: str | Path | None = None,
    meter: Meter | None = None,
) -> list[JobResult]:
    """Train an adapter for each job, several at a time, on one base model that is loaded once.

    ``base`` is the name or folder of a model, a ``Source`` with its precision and device, or a
    model that is loaded, which is unchanged afterwards. Each row of tokens that the model
    computes has those of several jobs, and each job keeps its own rank, loss, clipping, schedule
    and optimiser: its adapter is the one that it would get alone, up to rounding, whatever the
    other jobs are.

    With ``out`` the adapter of a job is written to ``out/NAME`` as a PEFT directory as soon as
    its training is over, with a record, ``job.json``. A job whose adapter is there already is not
    trained again, so that a call that was killed goes on where it was, and jobs can be added.

    As many jobs train at a time as fill a row of ``training.pack_tokens`` tokens with one step of
    each, or ``at_once``; in both cases no more than fit in half of the free memory, at 24 bytes
    per parameter with AdamW. Jobs with other values of ``pack_tokens`` or ``recompute_above``
    train one after the other. Tokens are kept in the folder ``cache`` for later calls, if it is
    given. ``meter`` tells what is going on.

    The results are in the order of the jobs. A job whose loss is no longer finite does not stop
    the others; its result has a ``failure``.

    Raises:
        ConfigError: the model or a setting cannot be used, targets or ranks do not fit the model,
            or two jobs have the same name.
        DataError: the rows of a job cannot be used, or there are none.
        AdapterError: the folder of a job holds something else than its adapter.
        ProtocolError: another process trains in ``out``.
    """
    results = {
        result.name: result
        for result in trained_adapters(base, jobs, out, at_once=at_once, cache=cache, meter=meter)
    }
    return [results[job.name] for job in jobs]


def trained_adapters(
    base: str | Path | Source | Base,
    jobs: Sequence[Job],
    out: str | Path | None = None,
    *,
    at_once: int | None = None,
    cache: str | Path | None = None,
    meter: Meter | None = None,
) -> Iterator[JobResult]:
    """As ``train_adapters``, but each result as soon as its job is over."""
    meter = meter or Meter()
    _check_jobs(jobs, at_once)
    folder = None if out is None else expanded(out, "The folder of the adapters")
    if folder is not None:
        _check_folder(folder, jobs)
    meter.begin("reading the data")
    corpora = [job.corpus() for job in jobs]
    meter.begin("loading the model")
    model = _loaded(base)
    ranks = [job.ranks(model) for job in jobs]
    stores = dict[tuple[str, str, int], TokenStore]()
    planned = []
    for job, corpus, its_ranks in zip(jobs, corpora, ranks, strict=True):
        key = (corpus.fingerprint(), job.template, job.max_tokens)
        if key not in stores:
            place = None if cache is None else expanded(cache, "The cache")
            stores[key] = TokenStore.build(
                corpus, model.tokenizer, job.template, job.max_tokens, place, meter
            )
        notices = (
            *model.notices,
            *corpus.notices,
            *named(job.template, model.tokenizer).notices,
            *stores[key].notices(job.max_tokens),
        )
        planned.append(_Planned(job, its_ranks, stores[key], notices))
    meter.end()
    if folder is None:
        yield from _trained(model, planned, at_once, meter)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield from _written(model, planned, folder, at_once, meter)


@dataclass(frozen=True, eq=False)
class _Planned:
    """A job, the ranks of its modules, and its tokens."""

    job: Job
    ranks: dict[str, int]
    store: TokenStore
    notices: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The optimiser steps of the training."""
        return self.job.training.steps(len(self.store))

    @property
    def work(self) -> float:
        """About how many tokens the training takes."""
        examples = self.steps * min(self.job.training.batch_examples, len(self.store))
        return examples * len(self.store.ids) / len(self.store)

    def task(self, base: Base) -> ClientTask:
        """What the training loop takes."""
        return ClientTask(
            self.job.label,
            self.job.start(base, self.ranks),
            range(len(self.store)),
            rng(self.job.seed, "order"),
            store=self.store,
            settings=self.job.training,
        )

    def result(self, outcome: Trained | DataError) -> JobResult:
        """The result of the training, which is nowhere but in memory."""
        if isinstance(outcome, DataError):
            return JobResult(
                self.job.name, None, None, 0, 0, 0, math.nan, (), 0.0, True, str(outcome)
            )
        return JobResult(
            name=self.job.name,
            adapter=outcome.adapter,
            path=None,
            steps=outcome.steps,
            examples=outcome.examples,
            tokens=outcome.tokens,
            loss=outcome.loss_total / max(outcome.loss_tokens, 1),
            losses=outcome.step_losses,
            seconds=outcome.seconds,
            notices=self.notices,
        )


def _trained(
    base: Base, planned: Sequence[_Planned], at_once: int | None, meter: Meter
) -> Iterator[JobResult]:
    """The results of these jobs; those with the same settings of rows train together."""
    meter.begin("training", sum(plan.steps for plan in planned), "steps")
    groups = dict[tuple[int, int | None], list[_Planned]]()
    for plan in planned:
        training = plan.job.training
        groups.setdefault((training.pack_tokens, training.recompute_above), []).append(plan)
    for group in groups.values():
        # The longest first, so that at the end no long one trains alone.
        ordered = sorted(group, key=lambda plan: -plan.work)
        by_name = {plan.job.label: plan for plan in ordered}
        tasks = (plan.task(base) for plan in ordered)
        settings = group[0].job.training
        for task, outcome in train_in_turn(base, tasks, settings, at_once, meter):
            yield by_name[task.name].result(outcome)
    meter.end()


def _written(
    base: Base, planned: Sequence[_Planned], folder: Path, at_once: int | None, meter: Meter
) -> Iterator[JobResult]:
    """The results of these jobs, with their adapters in ``folder``: those that are there first."""
    weights = finished.sampled_weights(base)
    identities = {
        plan.job.name: finished.identity(plan.job, weights, plan.ranks, plan.store)
        for plan in planned
    }
    results = dict[str, JobResult]()
    for plan in planned:
        name = plan.job.name
        if result := finished.stored(folder / name, name, identities[name]):
            results[name] = replace(result, notices=plan.notices)
    yield from list(results.values())
    remaining = [plan for plan in planned if plan.job.name not in results]
    version = metadata.version("flexlora")
    _write_summary(folder, planned, results)
    for result in _trained(base, remaining, at_once, meter):
        if result.adapter is not None:
            target = folder / result.name
            finished.write(result, target, base, identities[result.name], version)
            result = replace(result, path=target, adapter=peft_format.read(target).adapter)
        results[result.name] = result
        _write_summary(folder, planned, results)
        yield result


def _write_summary(
    folder: Path, planned: Sequence[_Planned], results: Mapping[str, JobResult]
) -> None:
    names = (plan.job.name for plan in planned)
    finished.write_summary(folder, [results[name] for name in names if name in results])


def _loaded(base: str | Path | Source | Base) -> Base:
    if isinstance(base, str | Path):
        base = Source(str(base))
    if isinstance(base, Source):
        return base.load()
    if not isinstance(base, Base):
        raise ConfigError(
            f"The base model is a {type(base).__name__}; give the name or folder of a model, or a "
            "flexlora.Source."
        )
    return base


def _check_jobs(jobs: Sequence[Job], at_once: int | None) -> None:
    """Refuse no jobs, and jobs that would be written to the same folder.

    Raises:
        ConfigError: naming them.
    """
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ConfigError(f"at_once is {at_once!r}; give a whole number of at least 1.")
    if not len(jobs):
        raise ConfigError("There are no jobs; give at least one.")
    seen = set[str]()
    for job in jobs:
        if not isinstance(job, Job):
            raise ConfigError(f"A job is a {type(job).__name__}; give flexlora.Job(...).")
        # Where file names are the same in capitals and small letters, so are folders.
        name = job.name.casefold()
        if name in seen:
            raise ConfigError(
                f"Two jobs are named {job.name!r}, apart from capitals; give each a name of its "
                "own, which is the folder of its adapter."
            )
        if name == finished.SUMMARY:
            raise ConfigError(f"A job is named {job.name!r}, as the file of results is; rename it.")
        seen.add(name)


def _check_folder(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse a folder that cannot be one, or in which there is something else.

    Raises:
        ConfigError, AdapterError: it cannot be used.
    """
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ConfigError(
            f"The folder {folder} cannot be made: it or one of its parents is a file; give another "
            "folder for the adapters."
        )
    for job in jobs:
        finished.refuse_others(folder / job.name)
