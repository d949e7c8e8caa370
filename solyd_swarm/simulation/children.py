"""What processes owe the one that started them: Ctrl-C is for that one to deal with, and they do not outlive it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started meanwhile inherit the mask: Ctrl-C, which the terminal sends to them too, is for us to deal with."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """For a child: it ends when its parent does, however that ends, also if it is killed. Nobody wants its result then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent's end", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
