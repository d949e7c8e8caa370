"""How a script with a swarm ends: the only module that knows ``threading._register_atexit``.

========================================  ==========================================================================
the main thread runs off its end          the process works on until the last owner has left; status 0
Ctrl-C, at any time                       goodbye, ``finally`` and ``atexit`` run, no traceback, exit code 130
an exception in main                      traceback, goodbye, status 1
``sys.exit(n)`` in main                   goodbye, status n
``sys.exit(n)`` in a handler              goodbye, ``atexit`` runs, status n, whatever main does
REPL or kernel exit                       goodbye
a forked child                            nothing
========================================  ==========================================================================

An *owner* is whatever keeps a script alive (a swarm). Goodbye asks every owner to leave and waits for all of
them together, `GOODBYE` seconds at most; a second Ctrl-C meanwhile ends the process at once, with 130 too.

Python shuts its thread pools before it waits for threads or runs ``atexit`` callbacks, so neither is the place to go on
working. Callbacks of ``threading._register_atexit`` run before that, last in, first out, and ours is registered after
that of the pools. Where the function is missing (it is private), ``atexit`` does, without pools.
"""

import atexit
import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn, Protocol

from solyd_swarm import interpreter, terminal
from solyd_swarm.errors import SwarmLeft

log = logging.getLogger("solyd_swarm.lifetime")

GOODBYE = 0.7
"""Seconds that all owners together have to say goodbye."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


GLANCE = 0.2
"""Seconds that the main thread waits at a stretch. A signal that comes in the moment before a wait does not end the wait;
Python would see it with the next event only."""


class Owner(Protocol):
    """Something that keeps the script alive from `register` to `unregister`. Hashable, by identity best."""

    def begin_leave(self, within: float) -> None:
        """Begin to say goodbye, done with it in ``within`` seconds, and call `unregister` then.

        Called from any thread; must not block. May come when leaving has begun already.
        """


class _Life:
    """What is known of this process; a forked child begins a life of its own."""

    def __init__(self) -> None:
        self.owners: dict[Owner, None] = {}
        self.waiters: list[queue.SimpleQueue[None]] = []
        self.had_owners = False
        self.script = interpreter.script_frame()
        self.hook_ran = False
        self.in_atexit = False  # Python runs the callbacks already: none may be run by us as well
        self.leaving = False
        self.deadline = 0.0  # of time.monotonic(), once leaving
        # Held by whoever ends the process. A bare lock, like the simple queues: Ctrl-C can strike between any two lines
        # here, and must not leave a lock behind that the goodbye would then wait for.
        self.exiting = threading.Lock()
        self.go_on: queue.SimpleQueue[None] = queue.SimpleQueue()  # lets a main thread that waits for the exit finish its part

    def changed(self) -> None:
        for waiter in list(self.waiters):
            waiter.put(None)

    def outlast(self) -> None:
        """Wait until there is no owner left, however long that takes."""
        with self._watch() as changes:
            while self.owners:
                with contextlib.suppress(queue.Empty):
                    changes.get(timeout=GLANCE)

    def say_goodbye(self) -> None:
        """Have all owners leave, also those that register meanwhile. Once the time is up, a second call grants no more."""
        if not self.leaving:
            self.deadline = time.monotonic() + GOODBYE
            self.leaving = True
        asked: set[Owner] = set()
        with self._watch() as changes:
            while self.owners and (left := self.deadline - time.monotonic()) > 0:
                for owner in list(self.owners):
                    if owner not in asked:
                        asked.add(owner)
                        _ask_to_leave(owner, left)
                if not self.owners:
                    break
                with contextlib.suppress(queue.Empty):
                    changes.get(timeout=max(0.0, self.deadline - time.monotonic()))
        log.debug("goodbye said, %d of %d owners did not make it", len(self.owners), len(asked))

    @contextlib.contextmanager
    def _watch(self) -> "Iterator[queue.SimpleQueue[None]]":
        changes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.waiters.append(changes)
        try:
            yield changes
        finally:
            self.waiters.remove(changes)


def _ask_to_leave(owner: Owner, within: float) -> None:
    try:
        owner.begin_leave(within)
    except Exception:
        log.exception("%r could not be asked to leave", owner)


def register(owner: Owner) -> None:
    """From now on the script lives until ``owner`` has left. From any thread."""
    life = _life
    life.owners[owner] = None
    if not life.had_owners:
        _begin(life)
    life.changed()


def unregister(owner: Owner) -> None:
    """``owner`` has left. From any thread, any number of times."""
    _life.owners.pop(owner, None)
    _life.changed()


def birth() -> int:
    """Which process this is, in the line of forks: to be kept by what a forked child must not use, for `forked`."""
    return _generation


def forked(birth: int) -> bool:
    """Whether this process is a forked child of the one that `birth` came from. Costs an integer comparison."""
    return birth != _generation


def call_in_child(function: Callable[[], object]) -> None:
    """Have ``function()`` called in each forked child, when `forked` tells the truth already. For whole modules: for good."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def exit_from_handler(reason: SystemExit | KeyboardInterrupt) -> None:
    """End the process because a handler said ``sys.exit``, as that does in main; returns at once, from any thread.

    A thread of its own says goodbye (which needs the thread that calls this), runs ``atexit`` callbacks, flushes and ends the
    process, whatever the main thread is doing. The first reason counts. At a REPL or in a notebook, and in a
    subinterpreter, the owners leave and the process stays: it is not ours to end.
    """
    life = _life
    if interpreter.interactive() or not interpreter.is_main():
        log.warning("%s in a handler: leaving; the interpreter goes on", type(reason).__name__)
        for owner in list(life.owners):
            _ask_to_leave(owner, GOODBYE)
    elif life.exiting.acquire(blocking=False):
        log.debug("%r in a handler", reason)
        status = _status(reason)
        try:
            threading.Thread(target=_exit, args=(life, status), name="solyd_swarm exit", daemon=True).start()
        except RuntimeError:  # Python is ending and starts no thread any more
            _exit(life, status)


# ---- when the main thread is done


def _at_shutdown() -> None:
    """The main thread has come to its end, however it did; thread pools still work."""
    _end(_life)
    _life.hook_ran = True  # not before: Ctrl-C may hit before `_end` is ready to catch it


def _at_exit() -> None:
    """As `_at_shutdown`, where there is no such hook, for owners that came later, or if Ctrl-C hit just before the hook."""
    _life.in_atexit = True
    _end(_life, skipped=_armed_hook and not _life.hook_ran)


def _end(life: _Life, skipped: bool = False) -> None:
    if not life.had_owners:
        return
    if not interpreter.is_main():
        life.say_goodbye()
        return
    status: int | None = None
    try:
        if life.exiting.locked():
            _wait_for_the_exit(life)
            return
        if interpreter.was_interrupted(life.script):
            if not life.owners:
                # They have left (a `with` block does that), so Python may wait for threads and pools as it always does.
                _end_with(INTERRUPTED)
                return
            status = INTERRUPTED
        elif skipped and life.owners:
            status = INTERRUPTED
        elif not interpreter.interactive() and interpreter.ran_off_its_end(life.script):
            life.outlast()
            if life.exiting.locked():
                _wait_for_the_exit(life)
            return
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as reason:  # from a signal handler of the user's
        status = _status(reason)
    except BaseException as error:  # noqa: BLE001  # likewise; it ends the program as it would have in main
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    _finish(life, status)


def _finish(life: _Life, status: int | None) -> None:
    """Say goodbye on the main thread. Then, with a status, end the process; without, Python knows it and ends by itself."""
    try:
        with _interrupt_ends_at_once():
            if status is None:
                life.say_goodbye()
            elif life.exiting.acquire(blocking=False):
                _exit(life, status)
        if life.exiting.locked():
            _wait_for_the_exit(life)
    except KeyboardInterrupt:  # in the moment before the handler is in place
        os._exit(INTERRUPTED)


def _exit(life: _Life, status: int) -> None:
    """Say goodbye and end the process with the status; needs `_Life.exiting`. Not by returning: Python would take another status,
    kill itself by SIGINT, or wait for threads that hang."""
    try:
        life.say_goodbye()
        if life.in_atexit:
            _end_with(status)
            life.go_on.put(None)
            return
        atexit.unregister(_at_exit)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, a pipe nobody reads, none at all
                stream.flush()
        terminal.restore()
    finally:
        if not life.in_atexit:
            os._exit(status)


def _end_with(status: int) -> None:
    """Let Python go through the rest of its end (threads, pools, ``atexit``, flushing), but not choose the status."""
    # The dictionary of sys is the last to be cleared. Not replaced, or the old one would strike.
    sys.__dict__.setdefault("_solyd_swarm_end", _End()).status = status


class _End:
    status: int | None = None

    def __del__(self, end: Callable[[int], NoReturn] = os._exit) -> None:
        if self.status is not None:
            end(self.status)  # a default argument, since modules may be gone by now


def _wait_for_the_exit(life: _Life) -> None:
    """Another thread is ending the process; Ctrl-C does not wait for it."""
    try:
        if interpreter.was_interrupted(life.script):
            os._exit(INTERRUPTED)
        while True:
            with contextlib.suppress(queue.Empty):
                return life.go_on.get(timeout=GLANCE)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """During goodbye on the main thread, Ctrl-C does not wait. A SIGINT handler of the user's is left alone."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _status(reason: BaseException) -> int:
    """The exit status that Python would give; a text goes to standard error, as there."""
    if not isinstance(reason, SystemExit):
        return INTERRUPTED
    if reason.code is None:
        return 0
    if isinstance(reason.code, int):
        return reason.code & 0xFF
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{reason.code}\n")
    return 1


# ---- arming


def _arm() -> bool:
    """Put the hooks in place; True if the one before the pools close is among them.

    Done when this module is imported: a thread may make the first owner when main has ended and no hook is taken any more.
    """
    atexit.register(_at_exit)
    hook: Callable[[Callable[[], object]], object] | None = getattr(threading, "_register_atexit", None)
    if hook is None:
        return False
    try:
        # Before ours, since later ones run first: the pools must still work while ours waits.
        import concurrent.futures.thread  # noqa: F401

        hook(_at_shutdown)
    except RuntimeError:  # imported when main has ended: there are no pools any more, and atexit is yet to come
        return False
    return True


def _begin(life: _Life) -> None:
    """On the first owner of this process."""
    global _quiet
    life.had_owners = True
    terminal.remember()
    if not _quiet:
        _quiet = True
        sys.excepthook = _quiet_main(sys.excepthook)
        threading.excepthook = _quiet_threads(threading.excepthook)
        sys.unraisablehook = _quiet_shutdown(sys.unraisablehook)


def _quiet_main(previous: Callable[[type[BaseException], BaseException, TracebackType | None], Any]) -> Any:
    """An excepthook that prints nothing after Ctrl-C, nor for a publish that came after the process had begun to end."""

    def excepthook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        if _life.had_owners and not interpreter.interactive() and _is_part_of_the_end(value, interrupt=True):
            return
        previous(kind, value, traceback)

    return excepthook


def _quiet_threads(previous: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
    """As `_quiet_main`, for the threads of the user's that publish."""

    def excepthook(args: threading.ExceptHookArgs) -> None:
        if not _is_part_of_the_end(args.exc_value, interrupt=False):
            previous(args)

    return excepthook


def _quiet_shutdown(previous: Callable[["sys.UnraisableHookArgs"], Any]) -> Callable[["sys.UnraisableHookArgs"], Any]:
    """Ctrl-C while Python ends its threads, before our hook or after it, has no frame of ours to be caught in."""

    def unraisablehook(args: "sys.UnraisableHookArgs") -> None:
        where = args.exc_traceback and args.exc_traceback.tb_frame.f_code
        if isinstance(args.exc_value, KeyboardInterrupt) and _life.had_owners and where is threading._shutdown.__code__:  # type: ignore[attr-defined]
            _end_with(INTERRUPTED)
        else:
            previous(args)

    return unraisablehook


def _is_part_of_the_end(value: BaseException | None, *, interrupt: bool) -> bool:
    return (interrupt and isinstance(value, KeyboardInterrupt)) or (_life.leaving and isinstance(value, SwarmLeft))


def _after_fork_in_child() -> None:
    global _life, _generation
    _life = _Life()
    _generation += 1


_life = _Life()
_generation = 0
_quiet = False
_armed_hook = _arm()
call_in_child(_after_fork_in_child)
