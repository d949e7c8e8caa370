"""Where a node and its swarms run: the loop that is running already, or one of our own in a background thread."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from solyd_swarm import interpreter, lifetime
from solyd_swarm.errors import OptionError
from solyd_swarm.pending import Pending
from solyd_swarm.runtime import Dispatcher, LoopThread

SLICE = 0.005
"""Seconds of plain handlers that a user's loop is kept for in one turn."""


class Executor(Protocol):
    """Runs plain handlers one at a time, in order. `Dispatcher` is one; `LoopExecutor` the other."""

    def post(self, function: Callable[..., object], *args: Any) -> bool: ...

    def close(self, timeout: float) -> Pending[int]: ...

    def is_current(self) -> bool: ...

    def __len__(self) -> int: ...


class LoopExecutor:
    """Runs callables on a loop, a few milliseconds of them per turn, so that the loop stays responsive.

    Args:
        home: of the loop.
        on_error: called with whatever a callable raised.
    """

    def __init__(self, home: "LoopHome", on_error: Callable[[BaseException], object]) -> None:
        self._home = home
        self._on_error = on_error
        self._queue: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._scheduled = False
        self._closed: Pending[int] = Pending(lambda: False)
        self._closing = False
        self._running = False

    def __len__(self) -> int:
        """How many callables wait."""
        return len(self._queue)

    def post(self, function: Callable[..., object], *args: Any) -> bool:
        """Have ``function(*args)`` called; from the loop's thread or another. False once closing."""
        if self._closing:
            return False
        self._queue.append((function, args))
        if not self._scheduled:
            self._schedule()
        return True

    def is_current(self) -> bool:
        """Whether one of the callables is the caller."""
        return self._running and self._home.is_current()

    def close(self, timeout: float) -> Pending[int]:
        """Take no more; what is queued still runs. The result is done when the queue is empty."""
        self._closing = True
        if not self._scheduled:
            self._closed.set_result(0)
        return self._closed

    def _schedule(self) -> None:
        # Before the call, since the loop may be done with it before the call returns to another thread.
        self._scheduled = True
        self._home.call(self._run)

    def _run(self) -> None:
        end = self._home.loop.time() + SLICE
        self._running = True
        try:
            while self._queue:
                function, args = self._queue.popleft()
                try:
                    function(*args)
                except (SystemExit, KeyboardInterrupt):
                    raise  # ends the user's loop, as in any other callback of it
                except BaseException as error:  # noqa: BLE001  # a handler's, also its CancelledError: the swarm must go on
                    self._on_error(error)
                if self._home.loop.time() >= end:
                    break
        finally:
            self._running = self._scheduled = False
            if self._queue:
                self._schedule()
            elif self._closing:
                self._closed.set_result(0)


class Home(Protocol):
    """What a node needs to know of where it runs."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def keeps_alive(self) -> bool:
        """Whether `lifetime` looks after its swarms: a script stays until they have left, a REPL has them leave at its end."""

    @property
    def birth(self) -> int:
        """The process it was made in, for `lifetime.forked`."""

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have a function called on the loop, from any thread, in order."""

    def is_current(self) -> bool:
        """Whether the caller is on the loop's thread."""

    def executor(self, on_error: Callable[[BaseException], object]) -> Executor:
        """What plain handlers of one swarm run on."""

    def enter(self, node: object) -> bool:
        """A node moves in. False where the last one has just moved out, and taken the loop with it."""

    def exit(self, node: object) -> Pending[None]:
        """A node moves out; done when nothing of it is left behind, threads included."""


class LoopHome:
    """A loop of the user's."""

    keeps_alive = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.birth = lifetime.birth()
        self._thread = threading.get_ident()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        if self.is_current():
            self.loop.call_soon(function, *args)
        else:
            self.loop.call_soon_threadsafe(function, *args)

    def is_current(self) -> bool:
        return threading.get_ident() == self._thread

    def executor(self, on_error: Callable[[BaseException], object]) -> Executor:
        return LoopExecutor(self, on_error)

    def enter(self, node: object) -> bool:
        """Nothing: the loop is the user's."""
        return True

    def exit(self, node: object) -> Pending[None]:
        gone: Pending[None] = Pending(lambda: False)
        gone.set_result(None)
        return gone


class ScriptHome:
    """Our own loop in a background thread, shared by all nodes of scripts and notebooks; it ends with the last of them."""

    keeps_alive = True

    def __init__(self) -> None:
        self.birth = lifetime.birth()
        self._thread = LoopThread(loop_factory=_loop_factory())
        self._nodes: dict[int, object] = {}
        self._lock = threading.RLock()
        self.ended = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._thread.loop

    def call(self, function: Callable[..., object], *args: Any) -> None:
        self._thread.call(function, *args)

    def is_current(self) -> bool:
        return self._thread.is_current()

    def executor(self, on_error: Callable[[BaseException], object]) -> Executor:
        return Dispatcher(on_error)

    def enter(self, node: object) -> bool:
        with self._lock:
            if self.ended:
                return False
            self._nodes[id(node)] = node
            return True

    def exit(self, node: object) -> Pending[None]:
        with self._lock:
            self._nodes.pop(id(node), None)
            if not self._nodes:
                self.ended = True
                return self._thread.stop()
        gone: Pending[None] = Pending(lambda: False)
        gone.set_result(None)
        return gone


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it was asked for (``SOLYD_SWARM_UVLOOP=1``, extra ``fast``); asyncio's own otherwise."""
    if os.environ.get("SOLYD_SWARM_UVLOOP", "") in ("", "0"):
        return None
    try:
        import uvloop
    except ImportError as error:
        text = "SOLYD_SWARM_UVLOOP asks for uvloop, which is not installed: pip install uvloop, or unset the variable"
        raise OptionError(text) from error

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


_script_home: ScriptHome | None = None
_script_lock = threading.RLock()


def would_be_script() -> bool:
    """Whether what is made here and now runs on our own thread: no loop is running, or a REPL's or notebook's.

    A kernel runs a loop too, which a busy cell stalls for as long as it is busy.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return interpreter.interactive() or (_script_home is not None and _script_home.is_current())


def find_home(node: object) -> Home:
    """The home for a new node, moved in: the running loop, or in scripts, REPLs and notebooks our own."""
    global _script_home
    if not would_be_script():
        return LoopHome(asyncio.get_running_loop())
    with _script_lock:
        if _script_home is None or lifetime.forked(_script_home.birth) or not _script_home.enter(node):
            _script_home = ScriptHome()
            _script_home.enter(node)
        return _script_home


def _after_fork_in_child() -> None:
    global _script_lock
    _script_lock = threading.RLock()  # another thread may have held it


lifetime.call_in_child(_after_fork_in_child)
