"""``solyd-swarm pipe``: publishes the lines of standard input and prints what arrives as JSON lines.

- A line is published as a string, without its newline; one that is not UTF-8, as bytes.
- What arrives is one line of JSON (RFC 8259) in UTF-8, written at once: the object itself, or all fields of its `Message`. What JSON
  lacks is written so: bytes as ``{"base64": "..."}``, a datetime as its RFC 3339 text, NaN and the infinities as ``null``, a dict key
  that is no string as its text (of bytes: the base64). Control characters that a terminal might obey are escaped.
- End of input: waits until the others have received everything, within a time limit, stays half a second for what they are just
  saying, and ends. Where there is no input at all (standard input is ``/dev/null`` or closed, as for background jobs of a shell
  script), and where told to stay, it goes on receiving until a signal comes.
- When the reader of standard output has gone, it ends.

Its status: 0; 1: something was not published, was received by nobody, or could not be read or written.
"""

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import socket
import stat
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from solyd_swarm import Message, PublishError, Swarm, SwarmBusy
from solyd_swarm.options import DEFAULT_MESSAGE_SIZE

STDIN, STDOUT, STDERR = 0, 1, 2

CHUNK = 65_536

ALONE = 32 * 1024 * 1024
"""Bytes published while there is no neighbour, before no more is read: half of the window, whose oldest would be dropped otherwise."""

PAUSE = 0.02
"""Seconds before a publish is tried again that found no room."""

LINGER = 0.5
"""Seconds after the last line was received by others, for what they are just saying."""


def complain(sentence: str) -> None:
    """Tells the user, on standard error."""
    with contextlib.suppress(OSError):
        os.write(STDERR, f"solyd-swarm: {sentence}\n".encode(errors="backslashreplace"))


class Waiting:
    """Waits for descriptors, for a signal, and for what other threads do: all on the main thread, which nothing interrupts elsewhere."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)

    def wake(self) -> None:
        """Ends the current or next `wait`. From any thread, also when nobody waits any more."""
        with contextlib.suppress(OSError):  # full: it will wake; closed: it is over
            self._wake.send(b"\0")

    def wait(self, descriptors: Sequence[int], timeout: float | None = None) -> list[int]:
        """Those of the descriptors that can be read; maybe none."""
        woken = self._woken.fileno()
        ready, _, _ = select.select([*descriptors, woken], [], [], timeout)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
        return ready

    @contextlib.contextmanager
    def catching(self, *numbers: int) -> Iterator[None]:
        """Signals end waiting; those that were ignored when we started stay so (``nohup``; background jobs of a script)."""
        caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in caught}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._wake.close()
            self._woken.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        self.wake()


class Pipe:
    """Standard input into a swarm, and what arrives to standard output.

    Args:
        full: whether to print whole messages.
        stay: whether to go on receiving after the end of input.
        timeout: seconds to wait then for what was published to be received.
    """

    def __init__(self, swarm: Swarm, waiting: Waiting, *, full: bool, stay: bool, timeout: float) -> None:
        self._swarm = swarm
        self._waiting = waiting
        self._lines = Lines(DEFAULT_MESSAGE_SIZE)
        self._stay = stay or _is_null(STDIN)
        self._timeout = timeout
        self._status = 0
        self._alone = 0  # bytes published since there was a neighbour
        self._output_lost = threading.Event()
        self._watched = [STDOUT] if _is_pipe(STDOUT) else []
        if full:
            swarm.on("received", lambda message: self._print(message_fields(message)))
        else:
            swarm.on("message", self._print)

    def run(self) -> int:
        """Until end of input, a signal, or nobody reads our output; the exit status."""
        ended = False
        while not (ended or self._over()):
            if STDIN in self._wait(STDIN):
                chunk = self._read()
                ended = not chunk
                self._publish_all(self._lines.end() if ended else self._lines.feed(chunk))
        if self._stay:
            while not self._over():
                self._wait()
        else:
            self._await_receivers()
        return self._status

    def _over(self) -> bool:
        return self._waiting.signal is not None or self._output_lost.is_set()

    def _wait(self, *descriptors: int, timeout: float | None = None) -> list[int]:
        ready = self._waiting.wait([*descriptors, *self._watched], timeout)
        if STDOUT in ready:
            self._output_lost.set()
        return ready

    # -- in

    def _read(self) -> bytes:
        """What there is; nothing at the end of input."""
        try:
            return os.read(STDIN, CHUNK)
        except OSError as error:  # a directory, a terminal that is gone
            self._status = 1
            complain(f"standard input cannot be read: {error.strerror}")
            return b""

    def _publish_all(self, lines: list[bytes | None]) -> None:
        for line in lines:
            if line is None:
                self._status = 1
                complain(f"a line is longer than {DEFAULT_MESSAGE_SIZE} bytes: it is left out")
                continue
            while not self._publish(line):
                self._wait(timeout=PAUSE)
                if self._over():
                    return

    def _publish(self, line: bytes) -> bool:
        """False if there is no room yet."""
        if self._swarm.peers:
            self._alone = 0
        elif self._alone >= ALONE:
            return False
        try:
            self._swarm.publish(_text(line))
            self._alone += len(line)
        except SwarmBusy:
            return False
        except PublishError as error:
            self._status = 1
            complain(f"a line is left out: {error}")
        return True

    def _await_receivers(self) -> None:
        """End of input. What nobody has received is warned about by the swarm when it leaves."""
        if not self._swarm.stats.published or self._over():
            return
        flushed = self._swarm.flush()
        flushed.when_done(self._waiting.wake)
        self._wait_for(flushed.done, self._timeout)
        if flushed.done():
            self._wait_for(lambda: False, LINGER)
        stats = self._swarm.stats
        if stats.acknowledged < stats.published:
            self._status = 1

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (condition() or self._over()) and (left := deadline - time.monotonic()) > 0:
            self._wait(timeout=min(left, 3600.0))

    # -- out, on the dispatcher's thread: a reader that takes its time stops nothing else

    def _print(self, obj: Any) -> None:
        if self._output_lost.is_set():
            return
        line = to_json(obj).encode() + b"\n"
        try:
            while line:
                line = line[_write(line) :]
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self._status = 1
                complain(f"standard output cannot be written: {error.strerror}")
            self._output_lost.set()
            self._waiting.wake()


def _write(data: bytes) -> int:
    try:
        return os.write(STDOUT, data)
    except BlockingIOError:  # somebody who shares our terminal made it so
        select.select([], [STDOUT], [])
        return 0


def _is_null(descriptor: int) -> bool:
    here, null = os.fstat(descriptor), os.stat(os.devnull)
    return stat.S_ISCHR(here.st_mode) and here.st_rdev == null.st_rdev


def _is_pipe(descriptor: int) -> bool:
    """Whether it is the writing end of a pipe: that can be "read" once its reader has gone (so ``... | head -1`` ends with head)."""
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY


def _text(line: bytes) -> str | bytes:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


class Lines:
    """Cuts chunks into lines, without their newlines. One longer than `limit` bytes is None, and held nowhere."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = b""
        self._too_long = False

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """The lines that end in this chunk."""
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        lines = [self._checked(line) for line in whole]
        if len(self._rest) > self._limit:
            self._rest, self._too_long = b"", True
        return lines

    def end(self) -> list[bytes | None]:
        """The last line, if it lacks its newline."""
        if not (self._rest or self._too_long):
            return []
        rest, self._rest = self._rest, b""
        return [self._checked(rest)]

    def _checked(self, line: bytes) -> bytes | None:
        too_long, self._too_long = self._too_long or len(line) > self._limit, False
        return None if too_long else line


# ---- JSON

_CONTROLS = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


def to_json(obj: Any) -> str:
    """One line of JSON for an object as it arrives; see the module's text for what JSON lacks.

    >>> print(to_json({"name": "Zoë", "raw": b"\\x00", 1: [True, None, float("nan")]}))
    {"name": "Zoë", "raw": {"base64": "AA=="}, "1": [true, null, null]}
    """
    # Controls below 32 are escaped by JSON itself; those above 126 would reach the terminal.
    return json.dumps(_plain(obj), ensure_ascii=False, allow_nan=False).translate(_CONTROLS)


def message_fields(message: Message) -> dict[str, Any]:
    """All fields of a message, by name."""
    return {field.name: getattr(message, field.name) for field in fields(message)}


def _plain(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {_key(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [_plain(item) for item in obj]
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, bytes):
        return {"base64": _base64(obj)}
    return _rfc3339(obj) if isinstance(obj, datetime) else obj


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return _base64(key)
    return _rfc3339(key) if isinstance(key, datetime) else json.dumps(key)


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _rfc3339(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
