"""``solyd-swarm pipe``, as processes that meet on loopback."""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solyd_swarm import __version__, cli
from solyd_swarm.pipe import Lines, to_json

COMMAND = [sys.executable, "-m", "solyd_swarm"]
PATIENCE = 20.0
"""Seconds that anything may take on a busy machine."""


class Pipe:
    """One running ``solyd-swarm pipe``; its output is read by threads."""

    def __init__(self, topic: str, *options: str, shell: str = "", **popen: Any) -> None:
        arguments = [*COMMAND, "pipe", topic, "--no-dht", *options]
        if shell:  # a script that ends by running its arguments
            arguments = ["sh", "-c", shell, "sh", *arguments]
        streams = {name: popen.pop(name, subprocess.PIPE) for name in ("stdin", "stdout", "stderr")}
        self.process = subprocess.Popen(arguments, **streams, **popen)
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.errors: queue.Queue[bytes] = queue.Queue()
        pairs = [(self.process.stdout, self.lines), (self.process.stderr, self.errors)]
        self.threads = [threading.Thread(target=self._read, args=pair) for pair in pairs if pair[0] is not None]
        for thread in self.threads:
            thread.start()
        self.ticket = self.errors.get(timeout=PATIENCE).decode().strip() if "--ticket" in options else ""

    @staticmethod
    def _read(stream: Any, lines: "queue.Queue[bytes]") -> None:
        for line in stream:
            lines.put(line)

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def next(self) -> Any:
        """The next object printed."""
        return json.loads(self.lines.get(timeout=PATIENCE))

    def signal(self, number: int) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def rest(self) -> tuple[bytes, bytes]:
        """What was printed and not taken yet, on both streams; the process has ended."""
        for thread in self.threads:
            thread.join(PATIENCE)
        return b"".join(self.lines.queue), b"".join(self.errors.queue)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self.threads:
            thread.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not written will never be
                    stream.close()


Start = Callable[..., Pipe]


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def start(topic: str) -> Iterator[Start]:
    """Starts the command on the test's topic, without mDNS unless told otherwise."""
    started: list[Pipe] = []

    def begin(*options: str, mdns: bool = False, **popen: Any) -> Pipe:
        pipe = Pipe(topic, *(() if mdns else ("--no-mdns",)), *options, **popen)
        started.append(pipe)
        return pipe

    yield begin
    for pipe in started:
        pipe.end()


@pytest.fixture
def listener(start: Start) -> Pipe:
    return start("--ticket")


def test_lines_both_ways(start: Start, listener: Pipe) -> None:
    other = start("--bootstrap", listener.ticket)
    listener.write(b"one\n")
    assert other.next() == "one"
    other.write("zwei ü\n\n".encode())
    assert [listener.next(), listener.next()] == ["zwei ü", ""]
    assert listener.process.poll() is None
    begun = time.monotonic()
    assert (listener.signal(signal.SIGTERM), other.signal(signal.SIGINT)) == (0, 130)
    assert time.monotonic() - begun < 4.0
    assert listener.rest() == other.rest() == (b"", b"")


def test_they_find_each_other(start: Start) -> None:
    one, other = start(mdns=True), start(mdns=True)
    one.write(b"hello\n")
    assert other.next() == "hello"
    other.write(b"and back\n")
    assert one.next() == "and back"


def test_end_of_input_delivers_and_leaves(start: Start, listener: Pipe) -> None:
    sender = start("--bootstrap", listener.ticket)
    sender.write(b"hi\nlast line without newline")
    sender.close_input()
    assert [listener.next(), listener.next()] == ["hi", "last line without newline"]
    assert sender.wait() == 0
    assert sender.rest() == (b"", b"")


def test_two_that_only_send_receive_each_other(start: Start) -> None:
    one = start("--ticket")
    other = start("--bootstrap", one.ticket)
    for pipe, word in ((one, b"one"), (other, b"other")):
        pipe.write(word + b"\n")
        pipe.close_input()
    assert (one.wait(), other.wait()) == (0, 0)
    assert (one.rest()[0], other.rest()[0]) == (b'"other"\n', b'"one"\n')


def test_end_of_empty_input_leaves(start: Start) -> None:
    sender = start()
    sender.close_input()
    assert sender.wait() == 0


def test_nobody_receives(start: Start) -> None:
    sender = start("--timeout", "0.1")
    sender.write(b"hi\n")
    sender.close_input()
    assert sender.wait() == 1
    assert b"no other peer is known to have received" in sender.rest()[1]


def test_without_input_it_listens(start: Start) -> None:
    listener = start("--ticket", stdin=subprocess.DEVNULL)
    sender = start("--bootstrap", listener.ticket)
    sender.write(b"hi\n")
    assert listener.next() == "hi"
    assert listener.signal(signal.SIGTERM) == 0


def test_stay(start: Start) -> None:
    stays = start("--stay", "--ticket")
    stays.write(b"first\n")
    stays.close_input()
    other = start("--bootstrap", stays.ticket)
    assert other.next() == "first"
    other.write(b"second\n")
    assert stays.next() == "second"
    assert stays.signal(signal.SIGTERM) == 0


def test_many_lines_in_order(start: Start, listener: Pipe) -> None:
    sender = start("--bootstrap", listener.ticket)
    count = 20_000
    sender.write(b"".join(b"line %d\n" % number for number in range(count)))
    sender.close_input()
    assert [listener.next() for _ in range(count)] == [f"line {number}" for number in range(count)]
    assert sender.wait() == 0


def test_more_input_than_fits_waits_for_a_neighbour(start: Start) -> None:
    sender = start("--ticket")
    line = b"x" * 999_999 + b"\n"
    count = 48  # bytes by the million, where 32 are taken without anybody there
    writer = threading.Thread(target=sender.write, args=(line * count,))
    writer.start()
    listener = start("--bootstrap", sender.ticket)
    for _ in range(count):
        assert len(listener.next()) == 999_999
    writer.join()
    sender.close_input()
    assert sender.wait() == 0


def test_not_utf_8_arrives_as_bytes(start: Start, listener: Pipe) -> None:
    sender = start("--bootstrap", listener.ticket)
    sender.write(b"\xff\x00\n")
    assert listener.next() == {"base64": "/wA="}


def test_too_long_a_line_is_left_out(start: Start, listener: Pipe) -> None:
    sender = start("--bootstrap", listener.ticket)
    sender.write(b"before\n" + b"x" * 3_000_000 + b"\nafter\n")
    sender.close_input()
    assert [listener.next(), listener.next()] == ["before", "after"]
    assert sender.wait() == 1
    assert sender.rest()[1].count(b"\n") == 1


def test_full(start: Start, topic: str) -> None:
    listener = start("--full", "--ticket")
    sender = start("--bootstrap", listener.ticket)
    sender.write(b"hi\n")
    message = listener.next()
    assert {name: message.pop(name) for name in ("data", "sequence", "late", "topic")} == {
        "data": "hi",
        "sequence": 1,
        "late": False,
        "topic": topic,
    }
    assert message.pop("source") == message.pop("propagation_source")
    assert abs(datetime.fromisoformat(message.pop("published_at")) - datetime.now(UTC)) < timedelta(seconds=PATIENCE)
    assert sorted(message) == ["epoch", "id"]


def test_no_replay(start: Start) -> None:
    sender = start("--ticket")
    sender.write(b"old\n")
    witness = start("--bootstrap", sender.ticket)
    assert witness.next() == "old"
    late = start("--no-replay", "--bootstrap", sender.ticket)
    late.write(b"I am here\n")
    assert sender.next() == "I am here"
    sender.write(b"new\n")
    assert late.next() == "new"


def test_identity_is_kept(start: Start, listener: Pipe, tmp_path: Path) -> None:
    sources = set()
    watcher = start("--full", "--bootstrap", listener.ticket)
    for _ in range(2):
        sender = start("--identity", str(tmp_path / "identity"), "--bootstrap", listener.ticket)
        sender.write(b"hi\n")
        sender.close_input()
        sources.add(watcher.next()["source"])
        assert sender.wait() == 0
    assert len(sources) == 1


def test_secrets(start: Start, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    by_file = start("--secret-file", str(tmp_path / "secret"), "--ticket")
    by_environment = start("--bootstrap", by_file.ticket, env={**os.environ, cli.SECRET_VARIABLE: "open sesame"})
    by_argument = start("--secret", "open sesame", "--bootstrap", by_file.ticket)
    outsider = start("--timeout", "0.5", "--bootstrap", by_file.ticket)
    outsider.write(b"let me in\n")
    by_argument.write(b"hi\n")
    assert by_file.next() == by_environment.next() == "hi"
    outsider.close_input()
    assert outsider.wait() == 1
    assert outsider.rest()[0] == b""


def test_the_reader_goes(start: Start, listener: Pipe) -> None:
    reading, writing = os.pipe()
    listening = start("--bootstrap", listener.ticket, stdout=writing)
    os.close(writing)
    listener.write(b"hi\n")
    assert os.read(reading, 100) == b'"hi"\n'
    os.close(reading)
    assert listening.wait() == 0
    assert listening.rest()[1] == b""


def test_a_reader_that_does_not_read(start: Start, listener: Pipe) -> None:
    reading, writing = os.pipe()
    stuck = start("--bootstrap", listener.ticket, stdout=writing)
    os.close(writing)
    for _ in range(50):
        listener.write(b"x" * 9_999 + b"\n")
    stuck.write(b"still here\n")
    assert listener.next() == "still here"
    assert stuck.signal(signal.SIGTERM) == 0
    os.close(reading)


def test_closed_streams(start: Start, listener: Pipe) -> None:
    deaf = start("--bootstrap", listener.ticket, "--ticket", shell='exec "$@" <&- >&-')
    listener.write(b"hi\n")
    sender = start("--bootstrap", listener.ticket)
    sender.write(b"hello\n")
    assert listener.next() == "hello"
    assert deaf.process.poll() is None
    assert deaf.signal(signal.SIGTERM) == 0
    assert deaf.rest()[1] == b""


def test_output_that_cannot_be_written(start: Start, listener: Pipe) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        listening = start("--bootstrap", listener.ticket, stdout=full)
    listener.write(b"hi\n")
    assert listening.wait() == 1
    assert b"standard output cannot be written" in listening.rest()[1]


def test_ignored_signals_stay_ignored(start: Start) -> None:
    background = start("--ticket", shell='trap "" INT; exec "$@"')
    background.process.send_signal(signal.SIGINT)
    other = start("--bootstrap", background.ticket)
    background.write(b"alive\n")
    assert other.next() == "alive"
    assert background.signal(signal.SIGTERM) == 0


def test_signal_while_it_waits_for_a_receiver(start: Start) -> None:
    sender = start("--ticket")
    sender.write(b"hi\n")
    sender.close_input()
    assert sender.signal(signal.SIGHUP) == 129


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required"),
        (("pip", "t"), "pip"),
        (("pipe",), "TOPIC"),
        (("pipe", "t", "--listen", "7000"), "HOST:PORT"),
        (("pipe", "t", "--listen", "127.0.0.1:70000"), "out of range"),
        (("pipe", "t", "--listen", "192.0.2.1:0"), "192.0.2.1"),
        (("pipe", "t", "--timeout", "soon"), "soon"),
        (("pipe", "t", "--timeout", "-1"), "-1"),
        (("pipe", ""), "empty"),
        (("pipe", "t", "--bootstrap", "nonsense"), "nonsense"),
        (("pipe", "t", "--interfaces", "nonsense0"), "nonsense0"),
        (("pipe", "t", "--identity", "/nonsense/identity"), "/nonsense"),
        (("pipe", "t", "--secret-file", "/nonsense/secret"), "/nonsense/secret"),
        (("pipe", "t", "--secret", ""), "secret is empty"),
        (("pipe", "t", "--secret", "a", "--secret-file", "b"), "--secret"),
    ],
)
def test_errors_are_one_sentence(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("solyd-swarm")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_an_empty_secret_in_the_environment_is_an_error() -> None:
    done = run("pipe", "t", **{cli.SECRET_VARIABLE: ""})
    assert done.returncode == 2
    assert "secret is empty" in done.stderr


def test_help_and_version() -> None:
    assert run("--version").stdout == f"solyd-swarm {__version__}\n"
    for arguments in (("--help",), ("pipe", "--help")):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "pipe" in done.stdout


def test_verbose_never_logs_the_secret(start: Start) -> None:
    talkative = start("-v", "--secret", "open sesame")
    errors = b""
    while b"DEBUG solyd_swarm.node: listening on port" not in errors:
        errors += talkative.errors.get(timeout=PATIENCE)
    talkative.close_input()
    assert talkative.wait() == 0
    assert b"sesame" not in errors + talkative.rest()[1]


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="solyd-swarm")
    assert script.load() is cli.main


@given(st.lists(st.binary(max_size=12)), st.integers(1, 20))
def test_lines_do_not_depend_on_chunks(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    limit = 8
    cutter = Lines(limit)
    found = [line for start in range(0, len(data), size) for line in cutter.feed(data[start : start + size])] + cutter.end()
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert found == [None if len(line) > limit else line for line in expected]


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        (None, "null"),
        (2**64 - 1, "18446744073709551615"),
        ([math.inf, -math.inf, math.nan, 0.5], "[null, null, null, 0.5]"),
        (b"\xff", '{"base64": "/w=="}'),
        (datetime(2026, 11, 1, 12, tzinfo=timezone(timedelta(hours=1))), '"2026-11-01T11:00:00Z"'),
        ({b"\xff": 1, None: 2, 2.5: 3, datetime(2026, 11, 1, tzinfo=UTC): {"a": []}}, None),
        ("\x1b[31m\x7f\x9b\u2028\n", r'"\u001b[31m\u007f\u009b\u2028\n"'),
        ("grüße 🐙", '"grüße 🐙"'),
    ],
)
def test_json(obj: Any, text: str | None) -> None:
    expected = '{"/w==": 1, "null": 2, "2.5": 3, "2026-11-01T00:00:00Z": {"a": []}}' if text is None else text
    assert to_json(obj) == expected
    json.loads(to_json(obj))
