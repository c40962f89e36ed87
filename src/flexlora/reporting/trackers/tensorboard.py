"""TensorBoard: one file of scalars by round in the folder ``tensorboard`` of the run."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from flexlora.journal import Event
from flexlora.reporting.tracker import Tracker, require, scalars

FOLDER = "tensorboard"
_OURS = ".flexlora"


class TensorBoard(Tracker):
    """Event files without TensorFlow; open them with ``tensorboard --logdir``.

    When a run is resumed, a new file is written from the journal and the old one is emptied, so
    that rounds that were undone are in neither.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._writer: Any = None

    @classmethod
    def of(cls, folder: Path) -> TensorBoard:
        """The tracker of the run in ``folder``."""
        require(cls.title, "tensorboard")
        return cls(folder)

    @property
    def view(self) -> str:
        """The command that opens it."""
        return f"tensorboard --logdir {self._folder}"

    def on(self, event: Event) -> None:
        """Write the event's numbers and flush them."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        numbers = scalars(event)
        at = event.get("time", time.time())
        if self._writer is None:
            self._open(at)
        if not numbers:
            return
        values = [summary_pb2.Summary.Value(tag=t, simple_value=v) for t, v in numbers.items()]
        summary = summary_pb2.Summary(value=values)
        self._write(event_pb2.Event(wall_time=at, step=event["round"], summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, at: float) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        before = sorted(self._folder.glob(f"events.out.tfevents.*{_OURS}"))
        # In nanoseconds, so that it sorts after earlier files: TensorBoard reads them in order.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}{_OURS}"
        self._writer = RecordWriter((self._folder / name).open("xb"))
        self._write(event_pb2.Event(wall_time=at, file_version="brain.Event:2"))
        # A running TensorBoard then drops what it has read from the earlier files.
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=at, session_log=log))
        self._writer.flush()
        # A TensorBoard without its data server waits forever at a file that is deleted, but goes on
        # after one that is empty; so the last one stays, empty.
        for path in before[:-1]:
            path.unlink()
        for path in before[-1:]:
            os.truncate(path, 0)

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
