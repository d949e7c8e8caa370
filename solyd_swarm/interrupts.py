"""Ctrl-C does not strike in the middle of what must be whole: a node that is half made has threads and sockets that nobody ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from solyd_swarm import interpreter


@contextmanager
def held_back() -> Iterator[None]:
    """``SIGINT`` waits until the end of the block and is then dealt with as ever, by default as a ``KeyboardInterrupt`` out of the
    ``with`` statement. For blocks of milliseconds.

    Signal masks would not do: threads begun in the block, and the processes begun by those, would keep the mask.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Python calls handlers in the main thread alone; None: a handler that is none of Python's, and cannot be put back.
    if threading.current_thread() is not threading.main_thread() or not callable(handler) or not interpreter.is_main():
        yield
        return
    came = False

    def wait(_number: int, _frame: object) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
