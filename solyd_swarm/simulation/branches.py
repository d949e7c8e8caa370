"""Other processes: what they owe the one that started them, and several futures of one run.

Forming a large swarm takes longer than what then happens to it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TypeVar

T = TypeVar("T")


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


def _child(function: Callable[[], T], pipe: "multiprocessing.connection.Connection") -> None:
    end_with_parent()
    pipe.send(function())
    pipe.close()


def futures(functions: Sequence[Callable[[], T]]) -> list[T]:
    """What each function returns (it must be possible to pickle), all from the state as it is now; one after the other.

    Each runs in a forked process of its own, on its copy of the memory; so this needs an operating system that can fork.

    Raises:
        RuntimeError: a function raised (its traceback is on standard error), or the system cannot fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError("this scenario needs an operating system that can fork a process")
    context = multiprocessing.get_context("fork")
    results: list[T] = []
    for function in functions:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(function, theirs), daemon=True)
        with shielded():
            process.start()
        theirs.close()
        try:
            results.append(ours.recv())
        except EOFError:
            raise RuntimeError("a future of the run has failed") from None
        except BaseException:
            process.terminate()
            raise
        finally:
            ours.close()
            process.join()
    return results
