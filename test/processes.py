"""Scripts under test in processes of their own, and a neighbour of theirs in this one."""

import contextlib
import functools
import os
import pty
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import IO, Any

from solyd_swarm import Swarm, pubsub

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 15.0
LOOPBACK: dict[str, Any] = {"listen": ("127.0.0.1", 0), "mdns": False, "dht": False}


class Process:
    """A program: its lines as they come, and its end. Used as a context manager, which kills it if it must.

    Args:
        arguments: the command line.
        terminal: whether it runs at a terminal, with all of its three streams, or on pipes.
        environment: what differs from ours.
    """

    def __init__(self, arguments: list[str], *, terminal: bool = False, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        master, slave = pty.openpty() if terminal else (-1, -1)
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            arguments,
            stdin=slave if terminal else subprocess.PIPE,
            stdout=slave if terminal else subprocess.PIPE,
            stderr=slave if terminal else subprocess.PIPE,
            start_new_session=terminal,
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            # A shell without job control starts `pytest &` with SIGINT ignored, and children inherit that.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        if terminal:
            os.close(slave)
        self._input: IO[bytes] | None = os.fdopen(os.dup(master), "wb", 0) if terminal else self.process.stdin
        self._output: IO[bytes] | None = os.fdopen(master, "rb", 0) if terminal else self.process.stdout
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[bytes] = []
        self._readers = [threading.Thread(target=self._read_lines), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self._output is not None
        with contextlib.suppress(OSError):  # how a terminal ends
            for line in self._output:
                self._queue.put(line.decode(errors="replace").rstrip("\r\n"))
        self._queue.put(None)

    def _read_errors(self) -> None:
        if self.process.stderr is not None:
            self._errors.append(self.process.stderr.read())

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches from its beginning to its end."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"it did not say {pattern!r} in time: {self.lines}") from None
            assert line is not None, f"ended without saying {pattern!r}: {self.lines} {self.errors()}"
            self.lines.append(line)
            if match := re.fullmatch(pattern, line):
                return match

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._input is not None
        self._input.write(f"{line}\n".encode())
        self._input.flush()

    def interrupt(self) -> float:
        """Ctrl-C. Returns the moment."""
        self.process.send_signal(signal.SIGINT)
        return time.monotonic()

    def errors(self) -> str:
        """All of standard error, once it has ended."""
        self._readers[1].join(PATIENCE)
        return b"".join(self._errors).decode()

    def end(self) -> tuple[int, str]:
        """Wait for the end. Exit status and standard error; `lines` are complete then."""
        status = self.process.wait(PATIENCE)
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return status, self.errors()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(PATIENCE)
        if kind is not None:
            print(f"ended with {self.process.returncode}, said {self.lines}", self.errors(), sep="\n")
        for stream in (self._input, self._output, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Neighbour:
    """A swarm in this process, on threads of its own, that remembers what happened to it."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ups: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.downs: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        swarm.on("message", self.messages.put)
        swarm.on("neighbor_up", lambda peer: self.ups.put(peer.id))
        swarm.on("neighbor_down", lambda peer, reason: self.downs.put((reason, time.monotonic())))

    def message(self) -> Any:
        """The next message."""
        return self.messages.get(timeout=PATIENCE)

    def up(self) -> str:
        """Waits until there is another neighbour."""
        return self.ups.get(timeout=PATIENCE)

    def down(self) -> tuple[str, float]:
        """Why a neighbour went, and when."""
        return self.downs.get(timeout=PATIENCE)


@contextlib.contextmanager
def neighbour(topic: str = "room") -> Iterator[Neighbour]:
    """A swarm on threads of its own, found by its ticket alone."""
    with pubsub(topic, **LOOPBACK) as swarm:
        yield Neighbour(swarm)


JOIN = """
from solyd_swarm import Node, pubsub
import asyncio, logging, os, signal, sys, threading, time
# In debug mode asyncio tells of steps that take longer than 0.1 s: on a busy machine, where modules are imported, some do.
logging.getLogger("asyncio").addFilter(lambda record: not record.msg.startswith("Executing "))
LOOPBACK = dict(listen=("127.0.0.1", 0), mdns=False, dht=False)
def join(topic="room"):
    return pubsub(topic, bootstrap=os.environ["TICKET"], **LOOPBACK)
def say(*words):
    print(*words, flush=True)
"""


def member(text: str, other: Neighbour, *options: str, terminal: bool = False) -> Process:
    """Runs a script in which ``join()`` makes a swarm that finds the neighbour. ``options`` are Python's."""
    arguments = [sys.executable, *options, "-c", JOIN + dedent(text)]
    return Process(arguments, terminal=terminal, TICKET=other.swarm.ticket)
