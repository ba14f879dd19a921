"""One line on the terminal that says how far a long job is."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from chandra.memory.device import format_size

COUNTS = 10_000  # what is less in all is a number of things (kernels), not of bytes


class ProgressLine:
    """Call it with (phase, done, total) in bytes, or in things if there are few; it redraws at most ten times a second.

    On something other than a terminal it prints one line per phase, so that logs stay readable.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.phase = ""
        self.started = self.drawn = 0.0
        self.first = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self._clear()
            self.phase, self.started, self.first, self.drawn = phase, now, done, 0.0
            if not self.terminal:
                print(phase, file=self.stream, flush=True)
        if self.terminal and (now - self.drawn >= 0.1 or done == total):
            self.drawn = now
            self.stream.write(f"\r\x1b[2K{describe(phase, done, total, done - self.first, now - self.started)}")
            self.stream.flush()

    def _clear(self) -> None:
        if self.terminal and self.phase:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()


def describe(phase: str, done: int, total: int, moved: int, seconds: float) -> str:
    """`pulling x  45 %  44.1 MiB of 98.0 MiB  12.3 MiB/s  4 s left`; what is not known is left out."""
    words = [phase]
    if 0 < total < COUNTS:
        return f"{phase}  {done} of {total}"
    if total > 0:
        words += [f"{100 * done // total:3d} %", f"{format_size(done)} of {format_size(total)}"]
    elif done > 0:
        words.append(format_size(done))
    if moved > 0 and seconds > 0.5:
        rate = moved / seconds
        words.append(f"{format_size(rate)}/s")
        if total > done:
            words.append(f"{(total - done) / rate:.0f} s left")
    return "  ".join(words)
