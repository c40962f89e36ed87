"""The progress of a command: a live line and lasting ones on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from flexlora.cli.sentences import plain, sentences, wrapped
from flexlora.cli.tally import Tally, left_text
from flexlora.journal import Event, Meter, size
from flexlora.storage.untrusted import printable, printable_lines

WIDE = 110
"""From this number of columns on the live line also shows speed and bytes."""

_BAR = 12
_GAP = "  "
_QUIET_SECONDS = 2.0
"""A stage that is over sooner is not named where lines stay."""
_REPEAT_SECONDS = 60.0
"""After this time a stage that lasts is named again, with how far it is."""


class Display:
    """What a command is doing, shown while it does it; a context manager.

    On a terminal the last line moves: it says what is going on, for how long, and the time left.
    Elsewhere a stage that lasts is a line of its own, unless ``lines`` is false. ``meter`` is for
    computations between events.
    """

    def __init__(self, console: Console | None = None, lines: bool = True) -> None:
        self.console, self._lines = console or Console(), lines
        self.meter, self.tally = Meter("starting"), Tally()
        self._began, self._over = time.time(), threading.Event()
        self._live = Live(
            get_renderable=self._now,
            console=self.console,
            refresh_per_second=4,
            transient=True,
        )

    @property
    def is_live(self) -> bool:
        """Whether lines can move."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def __enter__(self) -> Display:
        if self.is_live:
            self._live.start()
        elif self._lines:
            threading.Thread(target=self._name_stages, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Take the live line away; what is printed from now on is all there is."""
        self._over.set()
        self._live.stop()

    def print(self, text: str = "", style: str | None = None) -> None:
        """Print a lasting line, broken between words on a terminal."""
        lines = wrapped(text, self.console.width) if self.console.is_terminal else plain(text)
        lines = _encodable(printable_lines(lines), self.console.encoding)
        self.console.print(lines, style=style, highlight=False, markup=False, soft_wrap=True)

    def follow(self, events: Iterable[Event]) -> list[Event]:
        """Show a run's events as they come and return them."""
        seen: list[Event] = []
        self.meter.end()
        self.tally = self.tally.next_run()
        for event in events:
            seen.append(event)
            self.tally.add(event)
            for text in sentences(event, self.tally):
                if not (self.is_live and event["event"] == "client"):
                    self.print(text)
        return seen

    def _now(self) -> Text:
        width, ascii_only = self.console.width, self.console.options.ascii_only
        now = time.time()
        line = live_line(self.tally, self.meter, now - self._began, now, width, ascii_only)
        line.plain = _encodable(printable(line.plain), self.console.encoding)
        return line

    def _name_stages(self) -> None:
        """Print the stages that last, for those who read lines."""
        stage, since, named = "", time.monotonic(), False
        while not self._over.wait(_QUIET_SECONDS / 4):
            now = time.monotonic()
            if self.meter.stage != stage:
                stage, since, named = self.meter.stage, now, False
            elif stage and now - since >= (_REPEAT_SECONDS if named else _QUIET_SECONDS):
                self.print(self.meter.text)
                since, named = now, True


def show(events: Iterable[Event], console: Console) -> list[Event]:
    """Print a run's events as they come and return them."""
    with Display(console) as display:
        return display.follow(events)


def live_line(
    tally: Tally, meter: Meter, elapsed: float, now: float, width: int, ascii_only: bool = False
) -> Text:
    """What is going on in one line of at most ``width`` columns.

    Where there is no room, the bar is left out first, then the clock, then the time left.
    """
    doing = meter.text or tally.doing
    left = left_text(tally.time_left.left(now, meter.share))
    bar = _bar(tally.share, ascii_only) if tally.now.start else Text()
    parts = [Text(doing), bar, Text(clock(elapsed), "cyan"), Text(left)]
    if width >= WIDE and tally.tokens:
        up, down = (size(tally.now.totals[key]) for key in ("bytes_up", "bytes_down"))
        parts.append(Text(f"{tally.speed:,.0f} tokens/s  up {up}  down {down}"))
    for omitted in (4, 1, 2, 3):
        if _columns(parts) < width:
            break
        if omitted < len(parts):
            parts[omitted] = Text()
    line = Text(_GAP).join(part for part in parts if part)
    line.truncate(max(width - 1, 1), overflow="ellipsis")
    return line


def clock(seconds: float) -> str:
    """A time as hours, minutes and seconds, such as 0:01:07."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _encodable(text: str, encoding: str) -> str:
    """The text with ``?`` for what a terminal or a file of this encoding cannot take."""
    return text.encode(encoding, "replace").decode(encoding, "replace")


def _columns(parts: Iterable[Text]) -> int:
    shown = [part.cell_len for part in parts if part]
    return sum(shown) + len(_GAP) * max(len(shown) - 1, 0)


def _bar(share: float, ascii_only: bool) -> Text:
    filled = round(share * _BAR)
    full, empty = ("#", "-") if ascii_only else ("━", "─")
    return Text.assemble((full * filled, "magenta"), (empty * (_BAR - filled), "bright_black"))
