"""A progress bar on a terminal, for runs that take a while."""

import threading
import time
from types import TracebackType
from typing import Self, TextIO

FIRST = 1.0
"""Seconds before it is drawn at all."""
PERIOD = 0.25
"""Seconds between two drawings."""
WIDTH = 30


class Bar:
    """Draws itself from a thread of its own, so that the clock goes on while nothing is told; ``with`` ends the thread.

    Args:
        stream: None for no bar. Nor is there one where this is no terminal.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None and stream.isatty() else None
        self._share = 0.0
        self._start = time.monotonic()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, share: float) -> None:
        """Told which share (0 to 1) is done. It never goes back."""
        self._share = max(self._share, min(1.0, share))

    def __enter__(self) -> Self:
        if self._stream is not None:
            self._thread = threading.Thread(target=self._draw, args=(self._stream,), name="progress bar", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _draw(self, stream: TextIO) -> None:
        if self._is_over.wait(FIRST):
            return
        while True:
            stream.write(f"\r{line(self._share, time.monotonic() - self._start)}\x1b[K")
            stream.flush()
            if self._is_over.wait(PERIOD):
                break
        stream.write("\r\x1b[K")
        stream.flush()


def line(share: float, seconds: float) -> str:
    """The bar: what is done, and the time since the start."""
    full = int(share * WIDTH)
    return f"[{'#' * full}{'.' * (WIDTH - full)}] {int(100 * share):3d} %  {int(seconds) // 60}:{int(seconds) % 60:02d}"
