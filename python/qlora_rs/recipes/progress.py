"""What a person sees while a run works: one live line with the time left, and Ctrl-C.

On a terminal the line is redrawn in place; elsewhere (a file, a pipe, CI) a plain line appears
now and then, so that logs stay short. Everything goes to standard error: standard output is for
results. Read next: ``trainer.py``, which calls us.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TextIO

REDRAW_SECONDS = 0.2
PLAIN_SECONDS = 15.0


@dataclass
class Progress:
    """Reports stages, a counted loop with time left, and remarks.

    quiet: show nothing but remarks of ``warn``.

    >>> import io
    >>> out = io.StringIO()
    >>> progress = Progress(out)
    >>> progress.stage("Reading data")
    >>> print(out.getvalue().strip())
    Reading data
    """

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    quiet: bool = False
    _line_open: bool = False
    _shown_at: float = float("-inf")

    def stage(self, text: str) -> None:
        """Announce the next thing the run does."""
        self._close_line()
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Say something that must be seen even when quiet."""
        self._close_line()
        self._print(text)

    def line(self, text: str, last: bool = False) -> None:
        """Show the current state of a loop; calls that come too fast are dropped."""
        if self.quiet:
            return
        now = time.monotonic()
        live = self.stream.isatty()
        if not last and now - self._shown_at < (REDRAW_SECONDS if live else PLAIN_SECONDS):
            return
        self._shown_at = now
        if not live:
            self._print(text)
            if last:
                self._close_line()
            return
        # "\x1b[K" clears what a longer earlier line left behind.
        self.stream.write(f"\r{text}\x1b[K")
        self.stream.flush()
        self._line_open = True
        if last:
            self._close_line()

    def _close_line(self) -> None:
        if self._line_open:
            self.stream.write("\n")
            self._line_open = False
        # The first line of the next loop shows at once.
        self._shown_at = float("-inf")

    def _print(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    """Write a duration the way people say it.

    >>> duration(7.2), duration(95), duration(7265)
    ('7s', '1m35s', '2h01m')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Write a number of bytes in decimal units, as disks and memory are sold.

    >>> size(269_030_016), size(512)
    ('269.0 MB', '512 B')
    """
    if abs(count) < 1000:
        return f"{count:.0f} B"
    units = ["kB", "MB", "GB", "TB"]
    count /= 1000
    while abs(count) >= 999.95 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.1f} {units[0]}"


class StopRequest:
    """Whether the user asked the run to stop, by Ctrl-C (SIGINT) or SIGTERM."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals(progress: Progress, what: str) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a polite StopRequest; the second acts at once.

    what: what happens next, for the message ("saving a checkpoint after this step"). Outside the
    main thread Python cannot set handlers, and signals keep their meaning.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal = number
        progress.warn(f"{signal.Signals(number).name}: {what}; once more stops at once.")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
