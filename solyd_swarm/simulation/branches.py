"""Several futures of one run: forming a large swarm takes longer than what then happens to it."""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from solyd_swarm.simulation.children import end_with_parent, shielded

T = TypeVar("T")


def _child(function: Callable[[], T], pipe: Connection) -> None:
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
