"""A tracker: a second place that records a run beside its journal, such as TensorBoard."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from flexlora.errors import ConfigError
from flexlora.journal import Event, Journal, mean_scores
from flexlora.reporting.tables import energy_table
from flexlora.storage.untrusted import one_line

_LONGEST_REASON = 300
PATIENCE_SECONDS = 30.0
"""The longest time that the end of a run waits for a tracker that is behind."""


class Tracker(ABC):
    """Receives every event of one run's journal, in order, in a thread of its own.

    A kind is a class in a file of its own under ``trackers/``. It receives the whole journal again
    each time that the run is resumed, so it must not store the same event twice.
    """

    title: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, folder: Path) -> Tracker:
        """The tracker of the run in ``folder``; nothing is opened or written yet.

        Raises:
            ConfigError: a package that it needs is not installed.
        """

    @property
    def view(self) -> str:
        """Where people look at what it records: an address or a command; empty if unknown."""
        return ""

    @abstractmethod
    def on(self, event: Event) -> None:
        """Record the next event; an exception ends the tracker, not the run."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left and release all resources; called once, after the last event."""


def following(
    events: Iterable[Event], trackers: Sequence[Tracker], folder: Path
) -> Generator[Event, None, None]:
    """The events of the run in ``folder`` as they come, while the trackers follow its journal.

    Trackers never delay the run, except its end, by at most ``PATIENCE_SECONDS``. The error of one
    that fails is printed to stderr and it receives no more events. Close the iterator if it is not
    read to its end.
    """
    followers = [_Follower(tracker, folder) for tracker in trackers]
    try:
        for event in events:
            for follower in followers:
                follower.wake()
            yield event
    finally:
        for follower in followers:
            follower.finish()
        for follower in followers:
            follower.await_end()


class _Follower:
    """One tracker and the thread that reads the journal to it."""

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        self.tracker, self.folder, self.journal = tracker, folder, Journal(folder)
        self.woken, self.over = threading.Event(), False
        name = f"flexlora-{tracker.title}"
        self.thread = threading.Thread(target=self._follow, name=name, daemon=True)

    def wake(self) -> None:
        """Announce a new event; the first call starts the thread.

        By then a resumed run has cut its journal back.
        """
        if self.thread.ident is None:
            self.thread.start()
        self.woken.set()

    def finish(self) -> None:
        """Let the tracker reach the end of the journal, then close it."""
        self.over = True
        self.woken.set()

    def await_end(self) -> None:
        """Wait until it has; a tracker that never started has nothing to close."""
        if self.thread.ident is None:
            return
        self.thread.join(PATIENCE_SECONDS)
        if self.thread.is_alive():
            self._complain(f"it was still behind {PATIENCE_SECONDS:.0f} s after the last event")

    def _follow(self) -> None:
        try:
            over = False
            while not over:
                self.woken.wait()
                self.woken.clear()
                # Read before the journal, so that every event before the end is delivered.
                over = self.over
                for event in self.journal.news():
                    if event is None:
                        # A server that died was replaced: the journal starts again.
                        self.tracker.close()
                        self.tracker = self.tracker.of(self.folder)
                    else:
                        self.tracker.on(event)
            self.tracker.close()
        # No error of a tracker may end hours of training, and even SystemExit would end the thread
        # without a message.
        except BaseException as error:
            self._complain(one_line(f"{type(error).__name__}: {error}", _LONGEST_REASON))
            with suppress(Exception):
                self.tracker.close()

    def _complain(self, reason: str) -> None:
        print(
            f"warning: {self.tracker.title} is disabled for the rest of this run: "
            f"{reason.rstrip('.')}. The run continues; {self.journal.path} contains every event, "
            f"and {self.tracker.title} receives all of them when the run is resumed.",
            file=sys.stderr,
        )


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by name, for its round; empty for most types of events.

    Losses are in nats per token, scores and energies in percent, bytes of all clients together.
    """
    match event["event"]:
        case "round":
            return _round(event)
        case "evaluation":
            return {
                f"evaluation/{name}/{event['adapter']}/{group}": mean
                for group, seen in (("seen", True), ("unseen", False))
                if (rows := [row for row in event["clients"] if row["seen"] is seen])
                for name, mean in mean_scores(rows).items()
                if name != "examples"
            }
        case "client_evaluation" if event["clients"]:
            names = ("loss", "loss_min", "loss_max", "loss_std")
            return {f"client_evaluation/{name}": float(event[name]) for name in names}
        case "spectrum" if event["energy"]:
            blocks = energy_table([event])
            return {f"energy/ranks_{_plain(row.block)}": row.share for row in blocks}
    return {}


def _round(event: Event) -> dict[str, float]:
    numbers = {
        "clients/asked": len(event["cohort"]),
        "clients/received": event["received"],
        "bytes/up": event["bytes_up"],
        "bytes/down": event["bytes_down"],
        "seconds/round": event["seconds"],
        "seconds/server": event["aggregate_seconds"],
        "training/update_norm": event["update_norm"],
    }
    if event["loss_tokens"]:
        numbers["training/loss"] = event["loss_total"] / event["loss_tokens"]
    if event["seconds"]:
        numbers["training/tokens_per_second"] = event["tokens"] / event["seconds"]
    return {name: float(value) for name, value in numbers.items()}


def _plain(block: str) -> str:
    return block.replace("–", "-").replace(" ", "_")


def require(title: str, *packages: str, extra: str = "track") -> None:
    """Check that the packages a tracker needs are installed, without importing them.

    ``extra`` is the extra of flexlora that installs them.

    Raises:
        ConfigError: one of them is not.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(
                f"The tracker {title} needs the package {package!r}; install it with: "
                f"pip install 'flexlora[{extra}]'."
            )
