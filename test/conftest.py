"""What every test is held to: no packet leaves the machine, and no thread, task or socket stays behind.

The check is no fixture but wraps the teardown hook, so that it runs after every fixture, the event loop's included, is finalised.
What a module's or session's fixture made is checked when that fixture ends. There is no way to opt out: end what you start.
"""

import asyncio
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

os.environ["SOLYD_SWARM_INTERFACES"] = "127.0.0.1"  # for this process and all it starts, from before the first import on

PATIENCE = 1.0
"""Seconds for what is ending already: a thread on its last line, a task that was cancelled, a socket about to be closed."""

SOCKETS = "/proc/self/fd"
"""Where Linux lists them; elsewhere sockets are not checked."""

_OURS = "solyd_swarm"
_SEED = pytest.StashKey[int]()


def _threads() -> set[object]:
    return {thread for thread in threading.enumerate() if not thread.daemon or thread.name.startswith(_OURS)}


def _sockets() -> set[object]:
    found: set[object] = set()
    for descriptor in os.listdir(SOCKETS) if os.path.isdir(SOCKETS) else ():
        try:
            target = os.readlink(f"{SOCKETS}/{descriptor}")
        except OSError:  # closed since
            continue
        if target.startswith("socket:"):
            found.add(f"{target} (descriptor {descriptor})")
    return found


@dataclass
class Guard:
    """What was there before a test, and what shared fixtures answer for."""

    before: set[object] = field(default_factory=set)
    shared: dict[pytest.FixtureDef[Any], set[object]] = field(default_factory=dict)
    released: set[object] = field(default_factory=set)
    loops: list[asyncio.AbstractEventLoop] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def look(self) -> set[object]:
        tasks = {task for loop in self.loops if not loop.is_closed() for task in asyncio.all_tasks(loop)}
        return _threads() | _sockets() | tasks

    def suspects(self) -> set[object]:
        """What is here, was not before, and belongs to no fixture that is still in use."""
        now = self.look()
        return ((now - self.before) | (now & self.released)) - set().union(*self.shared.values())

    def wait(self) -> set[object]:
        """The suspects that do not go by themselves."""
        deadline = time.monotonic() + PATIENCE
        while found := self.suspects():
            gc.collect()  # what nobody refers to any more is not left behind
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return found

    def watch(self, loop: asyncio.AbstractEventLoop, add_finalizer: Callable[[Callable[[], object]], None]) -> None:
        """Looks for tasks right before the loop's fixture closes it, which would cancel them without a word."""

        def finish() -> None:
            self.loops.remove(loop)
            if loop.is_closed() or not (tasks := asyncio.all_tasks(loop)):
                return
            _, pending = loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
            self.cancelled += map(repr, pending)

        self.loops.append(loop)
        add_finalizer(finish)


_guard = Guard()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    _guard.before = _guard.look()
    _guard.released.clear()
    _guard.cancelled.clear()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    yield
    found = _guard.wait() if _guard.suspects() else set()
    if found and (keepers := [each for each in _guard.shared if each.argname in getattr(item, "fixturenames", ())]):
        _guard.shared[keepers[-1]] |= found  # made by a shared object in this test, perhaps: it answers for them at its end
        found = set()
    left = [*_guard.cancelled, *map(str, found)]
    if left:
        _guard.cancelled.clear()
        pytest.fail("left behind by this test:\n" + "\n".join(sorted(left)), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    is_shared = fixturedef.scope != "function"
    before = _guard.look() if is_shared else set()
    value = yield
    loop = value.get_loop() if isinstance(value, asyncio.Runner) else value
    if isinstance(loop, asyncio.AbstractEventLoop) and loop not in _guard.loops:
        # Finalisers run last in, first out: after those of the fixtures that use the loop, before the one that closes it.
        _guard.watch(loop, fixturedef.addfinalizer)
    if is_shared:
        made = _guard.look() - before
        if made or not _is_plumbing(fixturedef):
            _guard.shared[fixturedef] = made
    return value


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any]) -> None:
    _guard.released |= _guard.shared.pop(fixturedef, set())


def _is_plumbing(fixturedef: pytest.FixtureDef[Any]) -> bool:
    """pytest's own fixtures answer for what they made at once, never for what a test did later."""
    return fixturedef.func.__module__.split(".")[0] in ("_pytest", "pytest_asyncio", "_hypothesis_pytestplugin")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for ``random.Random``: ``SOLYD_TEST_SEED``, or a new one each time, told when the test fails."""
    value = int(os.environ.get("SOLYD_TEST_SEED") or random.SystemRandom().randrange(2**32))
    request.node.stash[_SEED] = value
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    value = item.stash.get(_SEED, None)
    if report.failed and value is not None:
        report.sections.append(("seed", f"SOLYD_TEST_SEED={value} repeats this"))
    return report
