"""Swarms as a script has them, on their background thread, on loopback and found by their tickets."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import solyd_swarm
from solyd_swarm import Swarm, pubsub
from solyd_swarm.core import wire
from solyd_swarm.core.envelope import seal
from solyd_swarm.core.events import Publish, Received, Send, Tick

ROOT = Path(solyd_swarm.__file__).parent.parent
PATIENCE = 10.0
ALONE: dict[str, Any] = {"mdns": False, "dht": False}
"""Options of a swarm that finds nobody by itself."""

Make = Callable[..., Swarm]


class Collector:
    """A handler that keeps what it was called with, and can be waited for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, *args: Any) -> None:
        with self._changed:
            self.calls.append(args[0] if len(args) == 1 else args)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()

    def wait(self, count: int = 1) -> list[Any]:
        """The calls, once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, PATIENCE), f"{len(self.calls)} of {count}: {self.calls[-5:]}"
            return list(self.calls)


@contextlib.contextmanager
def party() -> Iterator[Make]:
    """Gives a function that makes swarms, which know the ticket of the first of them; all leave at the end."""
    made: list[Swarm] = []

    def make(topic: str = "room", **options: Any) -> Swarm:
        options = {**ALONE, **options}
        if made and "bootstrap" not in options:
            options["bootstrap"] = made[0].ticket
        swarm = pubsub(topic, **options)
        made.append(swarm)
        return swarm

    try:
        yield make
    finally:
        for leaving in [swarm.leave() for swarm in made]:
            leaving.result(PATIENCE)


def pair(make: Make, **options: Any) -> tuple[Swarm, Swarm]:
    """Two neighbours."""
    one, other = make(**options), make(**options)
    meet(one, other)
    return one, other


def meet(*swarms: Swarm) -> None:
    """Waits until each has a neighbour."""
    for swarm in swarms:
        swarm.joined().result(PATIENCE)


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Waits for what has no event of its own."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def library_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(solyd_swarm.__name__)]


def on_loop(swarm: Swarm, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function on the swarm's loop, and returns what it returns."""
    done = threading.Event()
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(function(*args))
        finally:
            done.set()

    swarm._home.call(call)
    assert done.wait(PATIENCE)
    return outcome[0]


def publish_raw(swarm: Swarm, payload: bytes) -> None:
    """Publishes bytes that no honest library would encode."""

    def publish() -> None:
        assert swarm._driver is not None
        swarm._outbox.drain()
        swarm._outbox.published += 1
        swarm._driver.feed(Publish(swarm._outbox.published, time.time_ns() // 1000, [payload]))

    on_loop(swarm, publish)


def give_forged(author: Swarm, receiver: Swarm, first: int, payload: bytes) -> None:
    """Has the author, a neighbour, give the receiver an envelope that it signed, with numbers that it may have used before."""
    driver = author._driver
    assert driver is not None
    overlay = driver.overlay
    identity = author._node.identity
    envelope = seal(overlay.topic_id, identity.public_key, author._epoch, first, time.time_ns() // 1000, (payload,), identity.sign)
    frame = wire.encode(wire.Gossip(0, 0, envelope.body, envelope.signature))

    def give() -> None:
        (link,) = [link for link in overlay.neighbors.values() if link.author == receiver._node.identity.public_key]
        link.note_sent()
        overlay._out.append(Send(link.peer, frame))
        driver.feed(Tick())

    on_loop(author, give)


@contextlib.contextmanager
def deaf(swarm: Swarm) -> Iterator[None]:
    """Frames that reach the swarm are not looked at, as if the process were stuck; afterwards they are."""
    driver = swarm._driver
    assert driver is not None
    feed, kept = driver.feed, []

    def keep(event: Any) -> None:
        if isinstance(event, Received):
            kept.append(event)
        else:
            feed(event)

    driver.feed = keep  # type: ignore[method-assign]
    try:
        yield
    finally:

        def hear() -> None:
            del driver.feed
            for event in kept:
                feed(event)

        on_loop(swarm, hear)


def start(text: str, *arguments: str) -> "subprocess.Popen[str]":
    """A script in a process of its own; used as a context manager, which waits for its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.Popen(
        [sys.executable, "-c", dedent(text), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )


def run(text: str, *arguments: str) -> tuple[str, str, int]:
    """What a script printed, what went to standard error, and its status."""
    with start(text, *arguments) as process:
        try:
            out, errors = process.communicate(timeout=3 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return out, errors, process.returncode
