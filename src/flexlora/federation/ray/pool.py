"""The exchange with workers: a free worker takes the next group of clients."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from flexlora.errors import ConfigError
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.ray.partial_step import Step
from flexlora.federation.ray.queue import Group, JobQueue
from flexlora.federation.ray.worker import Build, Worker
from flexlora.federation.transport import Lost, Reply, WaitPolicy
from flexlora.journal import LossKind
from flexlora.method import Cohort, Method, RoundContext, State, partial_step

ATTEMPTS: Final = 3
"""After how many deaths of its workers a group of clients is lost itself."""

_DEATHS: Final = (
    RayActorError,
    NodeDiedError,
    OutOfMemoryError,
    WorkerCrashedError,
    ObjectLostError,
)
_SECONDS_TO_CLEAR: Final = 5.0


@dataclass
class _Place:
    """A place for a worker: its actor, the result of building it, and the files it was sent."""

    actor: Any = None
    opened: Any = None
    ready: bool = False
    files: set[str] = field(default_factory=set)

    def unsent(self, group: Group) -> Iterator[Any]:
        """The group's downloads; None for a shared one that the worker has on its disk.

        Every call takes twice as long if Ray has to look for a download in its store.
        """
        for each, data in zip(group.turns_queued, group.downloads, strict=True):
            yield None if each.file in self.files else data
            if each.file is not None:
                self.files.add(each.file)


class RayTransport:
    """A transport to workers of a Ray cluster that is connected already.

    ``resources`` are those of one worker, as Ray names them. A worker that dies is replaced, and
    its group is the next to begin; an error in local training is raised, not a lost client.
    """

    def __init__(
        self,
        build: Build,
        workers: int,
        resources: Mapping[str, float],
        clients_at_once: int = 1,
        scratch: Path | None = None,
    ) -> None:
        self._make = ray.remote(Worker).options(**resources, max_restarts=0)
        self._build = build
        self._clients_at_once = clients_at_once
        # A relative folder is on the worker's machine, among its temporary files.
        self._scratch = scratch or Path(f"flexlora-{uuid.uuid4().hex}")
        self._places = [_Place() for _ in range(workers)]
        self._unbuilt = self._exchanges = 0
        self._spawn()

    @property
    def clients_at_once(self) -> int:
        """How many consecutive requests one worker takes at a time."""
        return self._clients_at_once

    def present(self, clients: Collection[str]) -> list[str]:
        """All of them."""
        return list(clients)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply | Lost]:
        """The replies as they come. Seconds count from when all workers are built.

        One group is drawn ahead. Workers that are still busy when the round
        goes on without them are stopped and replaced.

        Raises:
            ConfigError: workers die before they are built; and what is raised in a worker.
        """
        self._spawn()
        while opening := self._opening():
            self._on_ready(ray.wait(opening)[0][0])
        self._exchanges += 1
        for place in self._places:
            place.files.clear()
        queue = JobQueue(iter(jobs), self.clients_at_once)
        busy: dict[Any, tuple[_Place, Group]] = {}
        started = time.monotonic()
        try:
            while not patience.enough():
                self._dispatch(busy, queue)
                # First, as it draws: the next free worker then does not wait for a download.
                if not queue.left and not busy:
                    break
                left = None
                if patience.seconds is not None:
                    left = max(0.0, started + patience.seconds - time.monotonic())
                done, _ = ray.wait([*busy, *self._opening()], timeout=left)
                if done and done[0] in busy:
                    yield from self._replies(*busy.pop(done[0]), done[0], queue)
                elif done:
                    self._on_ready(done[0])
                else:
                    yield from _late(busy, queue, patience.seconds)
                    break
        finally:
            for place, _ in busy.values():
                self._kill(place)
        self._spawn()

    def aggregate(
        self, method: Method, state: State, cohort: Cohort, context: RoundContext
    ) -> State:
        """The method's aggregate, to the bit; by module where it can, made by the workers.

        A free worker takes the next part, if it sees the run's files; workers that are not built
        yet are not waited for. The part of a worker that dies is computed again, and parts that
        no worker takes are computed in this process.
        """
        step = Step.of(method, state, cohort, context)
        ready = [place for place in self._places if place.ready]
        left = deque(step.split(len(ready)))
        if len(left) < 2:
            return method.aggregate(state, cohort, context)
        stored, parts = ray.put(step), []
        busy: dict[Any, tuple[_Place, list[str] | None]] = {
            place.actor.hold.remote(stored): (place, None) for place in ready
        }
        try:
            while busy:
                done = ray.wait([*busy])[0][0]
                place, part = busy.pop(done)
                try:
                    made = ray.get(done)
                except RayTaskError as error:
                    raise _cause(error) from error
                except _DEATHS:
                    self._kill(place)
                    left.extendleft([part] if part else [])
                    continue
                if left and (part or made):
                    following = left.popleft()
                    busy[place.actor.part.remote(following)] = place, following
                if part:
                    parts.append(made.part())
        finally:
            for place, _ in busy.values():
                self._kill(place)
        self._spawn()
        parts += [
            partial_step.aggregate(method, state, cohort, context, modules) for modules in left
        ]
        return partial_step.joined(state, parts, context)

    def close(self) -> None:
        """Stop the workers."""
        if cleared := [place.actor.close.remote() for place in self._places if place.actor]:
            ray.wait(cleared, num_returns=len(cleared), timeout=_SECONDS_TO_CLEAR)
        for place in self._places:
            self._kill(place)

    def _dispatch(self, busy: dict[Any, tuple[_Place, Group]], queue: JobQueue) -> None:
        """Send every free worker a group, as long as there are any."""
        taken = {id(place) for place, _ in busy.values()}
        for place in self._places:
            if place.ready and id(place) not in taken and queue.left:
                group = queue.drawn.popleft()
                downloads = place.unsent(group)
                ref = place.actor.turns.remote(self._exchanges, group.turns_queued, *downloads)
                busy[ref] = place, group

    def _replies(
        self, place: _Place, group: Group, ref: Any, queue: JobQueue
    ) -> Iterator[Reply | Lost]:
        """The replies of a group; one whose worker died is the next to begin."""
        try:
            uploads = ray.get(ref)
        except RayTaskError as error:
            raise _cause(error) from error
        except _DEATHS as death:
            self._kill(place)
            self._spawn()
            group.deaths += 1
            if group.deaths < ATTEMPTS:
                queue.drawn.appendleft(group)
                return
            why = f"{ATTEMPTS} workers died while training it, the last with: {_line(death)}"
            kind = LossKind.WORKER_DIED
            yield from (Lost(each.client, why, kind) for each in group.turns_queued)
            return
        for each, upload in zip(group.turns_queued, uploads, strict=True):
            yield Reply(each.client, upload.tobytes())

    def _opening(self) -> list[Any]:
        """The pending results of workers that are not built yet."""
        return [place.opened for place in self._places if place.actor and not place.ready]

    def _on_ready(self, opened: Any) -> None:
        """Use a worker that is built, or spawn another one in its place.

        Raises:
            ConfigError: too many have died before they were built; and what ``build`` raises.
        """
        (place,) = (place for place in self._places if place.opened == opened)
        try:
            ray.get(opened)
        except RayTaskError as error:
            raise _cause(error) from error
        except _DEATHS as death:
            self._kill(place)
            if isinstance(death, RayActorError) and death.actor_init_failed:
                raise ConfigError(
                    f"A worker could not be started: {str(death).strip().splitlines()[-1]}. All "
                    "machines need flexlora, Ray and Python in the same versions."
                ) from death
            self._unbuilt += 1
            if self._unbuilt >= ATTEMPTS:
                raise ConfigError(
                    f"{self._unbuilt} workers died before they had loaded the base model, the last "
                    f"with: {_line(death)} Give fewer --workers if memory is short."
                ) from death
            self._spawn()
            return
        place.ready, self._unbuilt = True, 0

    def _spawn(self) -> None:
        """Spawn a worker in every empty place."""
        for number, place in enumerate(self._places):
            if place.actor is None:
                place.actor = self._make.remote(self._build, str(self._scratch / str(number)))
                place.opened = place.actor.open.remote()

    def _kill(self, place: _Place) -> None:
        """Stop a worker, even in the middle of its work."""
        if place.actor is not None:
            ray.kill(place.actor)
        place.actor, place.opened, place.ready = None, None, False
        place.files.clear()


def _late(
    busy: Mapping[Any, tuple[_Place, Group]], queue: JobQueue, seconds: float | None
) -> Iterator[Lost]:
    for _, group in busy.values():
        for each in group.turns_queued:
            reason = f"Its local training was not over after {seconds:g} s."
            yield Lost(each.client, reason, LossKind.NO_ANSWER)
    for client in queue.clients():
        reason = f"Its local training had not begun after {seconds:g} s."
        yield Lost(client, reason, LossKind.NOT_BEGUN)


def _cause(error: RayTaskError) -> Exception:
    """What was raised in the worker, its notes included, rather than Ray's report of it."""
    return error.cause if isinstance(error.cause, Exception) else error


def _line(death: Exception) -> str:
    """Ray's account of a death, many lines, as one that ends with a full stop."""
    return " ".join(str(death).split())[:400].rstrip(".") + "."
