"""Every way in which a script can end, each as a process of its own, with a stand-in for the swarm."""

import functools
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent

BUSY = 0.5
"""Seconds by which a busy machine may be late."""

KIT = """
import asyncio, atexit, os, signal, socket, sys, threading, time
from solyd_swarm import lifetime
from solyd_swarm.errors import SwarmLeft
from solyd_swarm.net.resolve import resolve
from solyd_swarm.pending import Pending
from solyd_swarm.runtime import Dispatcher, LoopThread

def say(text):
    os.write(1, (text + "\\n").encode())

def report(error):
    say(f"error: {error!r}")

class Swarm:
    def __init__(self, goodbye=0.02, name="swarm"):
        self.goodbye, self.name = goodbye, name
        self.leaving = False
        self.loop, self.dispatcher = LoopThread(), Dispatcher(report)
        self.left = Pending(lambda: self.loop.is_current() or self.dispatcher.is_current())
        self.loop.call(int)
        lifetime.register(self)

    def begin_leave(self, within):
        self.loop.call(self._begin)

    def leave(self):
        self.loop.call(self._begin)
        return self.left

    def publish(self):
        if self.leaving:
            raise SwarmLeft("it has left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.leave().result()

    def _begin(self):
        if not self.leaving:
            self.leaving = True
            self._task = asyncio.ensure_future(self._leave())

    async def _leave(self):
        await asyncio.sleep(self.goodbye)
        say(f"goodbye {self.name}")
        lifetime.unregister(self)
        self.left.set_result(None)

    def after(self, seconds, handler):
        self.loop.call(lambda: asyncio.get_running_loop().call_later(seconds, self.dispatcher.post, handler))

    def run(self, coroutine):
        return self.loop.run(coroutine)

atexit.register(say, "atexit")
"""


def _environment() -> dict[str, str]:
    """Without what would make Python behave otherwise than for most people (unbuffered, for instance)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONWARNINGS": "ignore::DeprecationWarning"}  # 3.12 and later warn of every fork with threads


class Process:
    """A script under test: its lines as they come, and its end."""

    def __init__(
        self, arguments: list[str], directory: Path, stdin: int | None = subprocess.PIPE, environment: dict[str, str] | None = None
    ):
        paths = os.pathsep.join([str(directory), str(ROOT)])
        self.process = subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={**_environment(), "PYTHONPATH": paths},
            # A shell without job control starts `pytest &` with SIGINT ignored, and children inherit that.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[bytes] = []
        self._readers = [threading.Thread(target=self._read_lines), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.decode().rstrip("\n"))
        self._queue.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors.append(self.process.stderr.read())

    def expect(self, text: str) -> None:
        """Wait for a line."""
        deadline = time.monotonic() + 15
        while True:
            line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            assert line is not None, f"ended without saying {text!r}: {self.lines} {b''.join(self._errors).decode()}"
            self.lines.append(line)
            if line == text:
                return

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, within: float = 15) -> tuple[int, str]:
        """Exit status and standard error; `lines` are complete then."""
        status = self.process.wait(within + BUSY)
        for reader in self._readers:
            reader.join(5)
        while (line := self._queue.get(timeout=5)) is not None:
            self.lines.append(line)
        return status, b"".join(self._errors).decode()

    def without(self, line: str) -> list[str]:
        """The lines but for one, which must be there, wherever Python's buffer left it."""
        assert self.lines.count(line) == 1
        return [each for each in self.lines if each != line]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a script: ``start(text)``, or with ``how`` it is to be run."""
    (tmp_path / "kit.py").write_text(KIT)
    started: list[Process] = []

    def launch(script: str, how: str = "script", **options: object) -> Process:
        text = "from kit import *\n" + dedent(script)
        (tmp_path / "program.py").write_text(text)
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / "__main__.py").write_text(text)
        (tmp_path / "runner.py").write_text("import runpy\nrunpy.run_path('program.py', run_name='__main__')\n")
        (tmp_path / "wrapped.py").write_text(WRAPPED)
        (tmp_path / "without.py").write_text(WITHOUT)
        arguments = {
            "without": ["-c", "import without, program"],
            "script": ["program.py"],
            "module": ["-m", "program"],
            "package": ["-m", "package"],
            "directory": ["package"],
            "command": ["-c", text],
            "stdin": [],
            "runpy": ["runner.py"],
            "optimised": ["-OO", "program.py"],
            "wrapped": ["wrapped.py"],
            "inspect": ["-i", "program.py"],
            "repl": ["-i", "-q"],
        }[how]
        if how == "stdin":
            with (tmp_path / "program.py").open() as file:
                made = Process([sys.executable], tmp_path, file.fileno())
        else:
            made = Process([sys.executable, *arguments], tmp_path, **options)  # type: ignore[arg-type]
        started.append(made)
        return made

    yield launch
    for process in started:
        process.kill()


WRAPPED = """
import sys, types
main = types.ModuleType("__main__")
sys.modules["__main__"] = main
with open("program.py") as file:
    code = compile(file.read(), "program.py", "exec")
try:
    exec(code, main.__dict__)
finally:
    print("wrapper done", flush=True)
sys.exit(0)
"""
"""What `coverage run` does."""


WITHOUT = """
import concurrent.futures.thread, threading
del threading._register_atexit
"""
"""A Python that lacks the private function."""


# ---- the last line is swarm.on(...)


ALL_WAYS = ["script", "module", "package", "directory", "command", "stdin", "runpy", "optimised"]


@pytest.mark.parametrize("how", ALL_WAYS)
def test_goes_on_after_the_last_line(start: Start, how: str) -> None:
    process = start(
        """
        swarm = Swarm()

        async def look_up():
            await asyncio.get_running_loop().getaddrinfo("localhost", 80)
            await resolve("localhost", 80)
            say("resolved")

        def handler():
            assert not threading.main_thread().is_alive() or threading._SHUTTING_DOWN
            swarm.run(look_up())
            swarm.after(0.1, swarm.leave)

        swarm.after(0.3, handler)
        say("end of script")
        """,
        how,
    )
    assert process.end() == (0, "")
    assert process.lines == ["end of script", "resolved", "goodbye swarm", "atexit"]


def test_goes_on_when_run_by_another_script(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        swarm.after(0.3, swarm.leave)
        """,
        "wrapped",
    )
    assert process.end() == (0, "")
    assert process.lines == ["wrapper done", "goodbye swarm", "atexit"]


@pytest.mark.parametrize("where", ["main()", "run_in_thread()", "run_in_thread(join=False)"])
def test_goes_on_wherever_it_was_made(start: Start, where: str) -> None:
    process = start(
        f"""
        def main():
            swarm = Swarm()
            swarm.after(0.2, swarm.leave)

        def run_in_thread(join=True):
            thread = threading.Thread(target=main)
            thread.start()
            if join:
                thread.join()

        {where}
        """
    )
    assert process.end() == (0, "")
    assert sorted(process.lines) == ["atexit", "goodbye swarm"]  # the thread may come when `atexit` callbacks run already


def test_a_first_owner_after_main_has_ended(start: Start) -> None:
    process = start(
        """
        def late():
            while not threading._SHUTTING_DOWN:
                time.sleep(0.01)
            swarm = Swarm()
            swarm.after(0.2, swarm.leave)

        threading.Thread(target=late).start()
        """
    )
    assert process.end() == (0, "")
    assert "goodbye swarm" in process.lines


def test_owners_may_come_while_main_waits(start: Start) -> None:
    process = start(
        """
        first = Swarm(name="first")

        def handler():
            second = Swarm(name="second")
            first.leave()
            second.after(0.3, second.leave)

        first.after(0.1, handler)
        """
    )
    assert process.end() == (0, "")
    assert process.lines == ["goodbye first", "goodbye second", "atexit"]


def test_left_before_the_end(start: Start) -> None:
    process = start(
        """
        with Swarm():
            pass
        say("end of script")
        """
    )
    assert process.end() == (0, "")
    assert process.lines == ["goodbye swarm", "end of script", "atexit"]


# ---- Ctrl-C


PLACES = {
    "sleep": "time.sleep(60)",
    "hook": "",
    "result": "swarm.left.result()",
    "result with timeout": "swarm.left.result(60)",
    "input": "input()",
    "function": "def f():\n    time.sleep(60)\nf()",
    "asyncio": "asyncio.run(asyncio.sleep(60))",
    "busy": "while True: pass",
}


@pytest.mark.parametrize("place", PLACES)
def test_interrupt(start: Start, place: str) -> None:
    process = start("swarm = Swarm()\nswarm.after(0.2, lambda: say('ready'))\nprint('buffered')\n" + PLACES[place])
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert process.without("buffered") == ["ready", "goodbye swarm", "atexit"]


@pytest.mark.parametrize("how", ALL_WAYS)
@pytest.mark.parametrize("line", ["", "time.sleep(60)"])
def test_interrupt_however_it_runs(start: Start, how: str, line: str) -> None:
    process = start("swarm = Swarm()\nswarm.after(0.1, lambda: say('ready'))\n" + line, how)
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert process.lines == ["ready", "goodbye swarm", "atexit"]


def test_interrupt_runs_finally(start: Start) -> None:
    process = start(
        """
        try:
            swarm = Swarm()
            swarm.after(0.1, lambda: say("ready"))
            time.sleep(60)
        finally:
            say("finally")
        """
    )
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert process.lines == ["ready", "finally", "goodbye swarm", "atexit"]


@pytest.mark.parametrize("line", ["", "time.sleep(60)"])
def test_interrupt_with_everything_hanging(start: Start, line: str) -> None:
    process = start(
        """
        socket.getaddrinfo = lambda *a, **k: time.sleep(60)
        swarm = Swarm(goodbye=60)
        for number in range(9):
            swarm.run(resolve(f"host{number}", 80))
        swarm.run(asyncio.to_thread(time.sleep, 60))
        swarm.after(0.1, lambda: (say("ready"), time.sleep(60)))
        """
        + "\n        "
        + line
    )
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert process.lines == ["ready", "atexit"]


@pytest.mark.parametrize("line", ["", "time.sleep(60)"])
def test_second_interrupt_does_not_wait(start: Start, line: str) -> None:
    process = start(
        """
        lifetime.GOODBYE = 30
        class Slow(Swarm):
            def begin_leave(self, within):
                say("asked")
        swarm = Slow()
        swarm.after(0.1, lambda: say("ready"))
        """
        + "\n        "
        + line
    )
    process.expect("ready")
    process.interrupt()
    process.expect("asked")
    process.interrupt()
    assert process.end(0.5) == (130, "")
    assert "atexit" not in process.lines


def test_second_interrupt_in_atexit(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        swarm.after(0.1, lambda: say("ready"))
        atexit.register(lambda: (say("hanging"), time.sleep(60)))
        time.sleep(60)
        """
    )
    process.expect("ready")
    process.interrupt()
    process.expect("hanging")
    process.interrupt()
    assert process.end(0.5) == (130, "")


def test_interrupt_inside_with(start: Start) -> None:
    """By the time that Python sees the exception, the swarm has left."""
    process = start(
        """
        worker = threading.Thread(target=lambda: (gate.wait(), say("worker done")))
        gate = threading.Event()
        worker.start()
        print("buffered")
        atexit._clear()
        atexit.register(say, "atexit")  # before ours: Python gets to it when ours has run
        atexit.register(lifetime._at_exit)
        with Swarm() as swarm:
            swarm.after(0.1, lambda: say("ready"))
            try:
                time.sleep(60)
            finally:
                gate.set()
        """
    )
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert sorted(process.lines) == sorted(["ready", "worker done", "goodbye swarm", "atexit", "buffered"])


def test_caught_interrupt_is_the_users(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        swarm.after(0.1, lambda: say("ready"))
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            say("caught")
        swarm.after(0.3, swarm.leave)
        """
    )
    process.expect("ready")
    process.interrupt()
    process.expect("caught")
    assert process.end() == (0, "")
    assert process.lines == ["ready", "caught", "goodbye swarm", "atexit"]


@pytest.mark.parametrize("line", ["", "time.sleep(0.5)"])
def test_own_signal_handler_is_respected(start: Start, line: str) -> None:
    process = start(
        """
        signal.signal(signal.SIGINT, lambda *_: (say("mine"), swarm.leave()))
        swarm = Swarm()
        swarm.after(0.1, lambda: say("ready"))
        """
        + "\n        "
        + line
    )
    process.expect("ready")
    process.interrupt()
    assert process.end() == (0, "")
    assert process.lines == ["ready", "mine", "goodbye swarm", "atexit"]


@pytest.mark.parametrize("line", ["", "time.sleep(60)"])
@pytest.mark.parametrize(("what", "status"), [("sys.exit(5)", 5), ("1/0", 1)])
def test_signal_handler_that_raises(start: Start, line: str, what: str, status: int) -> None:
    """The usual way to end on SIGTERM."""
    process = start(
        f"""
        def handler(*_):
            {what}
        signal.signal(signal.SIGTERM, handler)
        swarm = Swarm()
        swarm.after(0.1, lambda: say("ready"))
        {line}
        """
    )
    process.expect("ready")
    process.process.terminate()
    code, errors = process.end(1)
    assert code == status
    assert errors.count("Traceback") == (status == 1)
    assert process.lines == ["ready", "goodbye swarm", "atexit"]


def test_publishing_thread_makes_no_noise_at_the_end(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        def work():
            while True:
                swarm.publish()
                time.sleep(0.001)
        threading.Thread(target=work).start()
        swarm.after(0.1, lambda: say("ready"))
        """
    )
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")


# ---- an exception, or sys.exit, in main


@pytest.mark.parametrize("how", ALL_WAYS)
def test_uncaught_exception(start: Start, how: str) -> None:
    process = start("swarm = Swarm()\nraise ValueError('oops')\n", how)
    status, errors = process.end(1)
    assert status == 1
    assert errors.count("Traceback") == 1
    assert errors.endswith("ValueError: oops\n")
    assert process.lines == ["goodbye swarm", "atexit"]


def test_uncaught_exception_waits_no_longer_than_the_bound(start: Start) -> None:
    process = start("swarm = Swarm(goodbye=60)\nsay('ready')\nraise ValueError('oops')\n")
    process.expect("ready")
    assert process.end(1)[0] == 1
    assert process.lines == ["ready", "atexit"]


@pytest.mark.parametrize("how", ALL_WAYS)
@pytest.mark.parametrize("status", [0, 3])
def test_exit_in_main(start: Start, how: str, status: int) -> None:
    process = start(f"swarm = Swarm()\nsys.exit({status})\n", how)
    assert process.end() == (status, "")
    assert process.lines == ["goodbye swarm", "atexit"]


@pytest.mark.parametrize(
    ("line", "status", "errors"),
    [
        ("sys.exit()", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(4)", 4, ""),
        ("sys.exit('text')", 1, "text\n"),
        ("sys.exit(-1)", 255, ""),
        ("def main():\n    return 6\nsys.exit(main())", 6, ""),  # as the script of an entry point does
    ],
)
def test_kinds_of_exit_in_main(start: Start, line: str, status: int, errors: str) -> None:
    process = start("swarm = Swarm()\n" + line)
    assert process.end() == (status, errors)
    assert process.lines == ["goodbye swarm", "atexit"]


# ---- sys.exit in a handler


MAINS = {
    "hook": "",
    "sleep": "time.sleep(60)",
    "input": "input()",
    "result": "swarm.left.result()",
    "busy": "while True: pass",
    "publishing": "while True:\n    swarm.publish()\n    time.sleep(0.001)",
}


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_exit_in_handler(start: Start, main: str, kind: str) -> None:
    script = """
swarm = Swarm()
async def coroutine():
    sys.exit(3)
def plain():
    sys.exit(3)
print("buffered")
"""
    script += "swarm.after(0.2, plain)\n" if kind == "plain" else "swarm.after(0.2, lambda: swarm.run(coroutine()))\n"
    process = start(script + MAINS[main])
    assert process.end() == (3, "")
    assert process.without("buffered") == ["goodbye swarm", "atexit"]


@pytest.mark.parametrize(
    ("line", "status", "errors"),
    [("sys.exit()", 0, ""), ("sys.exit('text')", 1, "text\n"), ("sys.exit(-1)", 255, ""), ("raise KeyboardInterrupt", 130, "")],
)
def test_kinds_of_exit_in_handler(start: Start, line: str, status: int, errors: str) -> None:
    process = start(f"swarm = Swarm()\ndef handler():\n    {line}\nswarm.after(0.1, handler)\n")
    assert process.end() == (status, errors)
    assert process.lines == ["goodbye swarm", "atexit"]


def test_exit_in_handler_is_the_last_handler(start: Start) -> None:
    process = start(
        """
        swarm = Swarm(goodbye=0.3)
        swarm.after(0.1, lambda: sys.exit(3))
        swarm.after(0.2, lambda: say("too late"))
        time.sleep(60)
        """
    )
    assert process.end() == (3, "")
    assert process.lines == ["goodbye swarm", "atexit"]


def test_exit_in_handler_while_main_ends_in_another_way(start: Start) -> None:
    process = start(
        """
        swarm = Swarm(goodbye=0.3)
        swarm.after(0, lambda: (say("exiting"), sys.exit(3)))
        time.sleep(0.15)
        raise ValueError("oops")
        """
    )
    status, errors = process.end()
    assert status == 3
    assert "ValueError: oops" in errors
    assert process.lines == ["exiting", "goodbye swarm", "atexit"]


def test_interrupt_while_a_handler_exits(start: Start) -> None:
    process = start(
        """
        lifetime.GOODBYE = 30
        swarm = Swarm(goodbye=60)
        swarm.after(0.1, lambda: sys.exit(3))
        while not lifetime._life.leaving:
            time.sleep(0.01)
        say("leaving")
        time.sleep(60)
        """
    )
    process.expect("leaving")
    process.interrupt()
    assert process.end(0.5) == (130, "")


def test_exit_in_handler_gives_the_terminal_back(start: Start, tmp_path: Path) -> None:
    """input() with readline switches echo off; it must be on again."""
    termios = pytest.importorskip("termios")
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    (tmp_path / "launch.py").write_text(
        dedent(
            """
            import fcntl, os, sys, termios
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.dup2(0, 1)
            os.execv(sys.executable, [sys.executable, "program.py"])
            """
        )
    )
    start("")  # writes the kit
    (tmp_path / "program.py").write_text(
        "from kit import *\nimport readline\nswarm = Swarm()\nswarm.after(0.3, lambda: sys.exit(3))\ninput('prompt> ')\n"
    )
    process = Process([sys.executable, "launch.py"], tmp_path, follower)
    try:
        seen = b""
        while b"prompt> " not in seen:
            seen += os.read(leader, 1000)
        deadline = time.monotonic() + 5
        while termios.tcgetattr(follower) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert termios.tcgetattr(follower) != before
        assert process.end() == (3, "")
        assert termios.tcgetattr(follower) == before
    finally:
        process.kill()
        os.close(leader)
        os.close(follower)


# ---- REPL, kernel


def test_repl_leaves_at_once(start: Start) -> None:
    process = start("", "repl")
    stdin = process.process.stdin
    assert stdin is not None
    stdin.write(b"from kit import *\nswarm = Swarm()\nsay('ready')\n")
    stdin.flush()
    process.expect("ready")
    stdin.write(b"1/0\nexit()\n")
    stdin.flush()
    status, errors = process.end(1)
    assert status == 0
    assert "ZeroDivisionError" in errors
    assert process.lines == ["ready", "goodbye swarm", "atexit"]


def test_end_of_input_at_the_repl(start: Start) -> None:
    process = start("", "repl")
    stdin = process.process.stdin
    assert stdin is not None
    stdin.write(b"from kit import *\nswarm = Swarm()\n")
    stdin.close()
    assert process.end()[0] == 0
    assert process.lines == ["goodbye swarm", "atexit"]


def test_interrupt_at_the_repl_is_an_ordinary_one(start: Start) -> None:
    process = start("", "repl")
    stdin = process.process.stdin
    assert stdin is not None
    stdin.write(b"from kit import *\nswarm = Swarm()\nsay('ready'); time.sleep(60)\n")
    stdin.flush()
    process.expect("ready")
    process.interrupt()
    stdin.write(b"say('still here')\n")
    stdin.flush()
    process.expect("still here")
    stdin.close()
    status, errors = process.end()
    assert status == 0
    assert "KeyboardInterrupt" in errors
    assert process.lines == ["ready", "still here", "goodbye swarm", "atexit"]


def test_python_i_leaves_at_once(start: Start) -> None:
    process = start("swarm = Swarm()\nsay('ready')\n", "inspect")
    process.expect("ready")
    assert process.process.stdin is not None
    process.process.stdin.close()
    assert process.end()[0] == 0
    assert process.lines == ["ready", "goodbye swarm", "atexit"]


def test_exit_in_handler_leaves_the_repl_alone(start: Start) -> None:
    process = start("", "repl")
    stdin = process.process.stdin
    assert stdin is not None
    stdin.write(b"from kit import *\nswarm = Swarm()\nswarm.after(0, lambda: sys.exit(3))\n")
    stdin.flush()
    process.expect("goodbye swarm")
    stdin.write(b"say('still here')\n")
    stdin.flush()
    process.expect("still here")
    stdin.close()
    assert process.end()[0] == 0


# ---- forks, children, subinterpreters


def test_forked_child_does_nothing(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        birth = lifetime.birth()
        assert not lifetime.forked(birth)
        child = os.fork()
        if child == 0:
            assert lifetime.forked(birth)
            say("child")
        else:
            status = os.waitpid(child, 0)[1]
            say(f"child ended {status}")
            swarm.leave()
        """
    )
    assert process.end() == (0, "")
    assert process.lines == ["child", "atexit", "child ended 0", "goodbye swarm", "atexit"]


def test_interrupt_in_a_forked_child_is_an_ordinary_one(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        child = os.fork()
        if child == 0:
            raise KeyboardInterrupt
        say(f"child ended {os.waitpid(child, 0)[1]}")
        swarm.leave()
        """
    )
    status, errors = process.end()
    assert status == 0
    assert errors.count("KeyboardInterrupt") == 2  # the line of the script, and the exception
    assert f"child ended {int(signal.SIGINT)}" in process.lines


def test_forked_child_with_a_swarm_of_its_own(start: Start) -> None:
    process = start(
        """
        swarm = Swarm(name="parent")
        child = os.fork()
        if child == 0:
            mine = Swarm(name="child")
            mine.after(0.2, mine.leave)
        else:
            say(f"child ended {os.waitpid(child, 0)[1]}")
            swarm.leave()
        """
    )
    assert process.end() == (0, "")
    assert process.lines == ["goodbye child", "atexit", "child ended 0", "goodbye parent", "atexit"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("own", [False, True])
def test_multiprocessing(start: Start, method: str, own: bool) -> None:
    process = start(
        f"""
        import multiprocessing

        def work(own):
            if own:
                Swarm(name="child")
            say("working")

        if __name__ == "__main__":
            swarm = Swarm(name="parent")
            child = multiprocessing.get_context({method!r}).Process(target=work, args=({own},))
            child.start()
            child.join()
            say(f"child ended {{child.exitcode}}")
            swarm.leave()
        """
    )
    assert process.end() == (0, "")
    seen = [line for line in process.lines if line != "atexit"]
    assert seen == ["working", *["goodbye child"] * own, "child ended 0", "goodbye parent"]


def test_subprocess_from_a_handler(start: Start) -> None:
    process = start(
        """
        import subprocess
        swarm = Swarm()
        swarm.after(0.1, lambda: (subprocess.run(["true"], check=True, preexec_fn=int), say("ran"), swarm.leave()))
        """
    )
    assert process.end()[0] == 0
    assert process.lines == ["ran", "goodbye swarm", "atexit"]


def test_subinterpreter_does_no_harm(start: Start) -> None:
    process = start(
        """
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        code = (
            # The package itself needs C extensions that refuse to be loaded there: only our two modules are.
            "import sys, types\\n"
            "sys.modules['solyd_swarm'] = types.ModuleType('solyd_swarm')\\n"
            f"sys.modules['solyd_swarm'].__path__ = [{os.path.dirname(lifetime.__file__)!r}]\\n"
            "from solyd_swarm import interpreter, lifetime\\n"
            "class Owner:\\n"
            "    def begin_leave(self, within):\\n"
            "        lifetime.unregister(self)\\n"
            "lifetime.register(Owner())\\n"
            "assert not interpreter.is_main()\\n"
        )
        swarm = Swarm()
        made = interpreters.create()
        interpreters.run_string(made, code)
        interpreters.destroy(made)
        say("destroyed")
        swarm.leave()
        """
    )
    assert process.end() == (0, "")
    assert process.lines == ["destroyed", "goodbye swarm", "atexit"]


# ---- misfortune


def test_without_the_private_function(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        swarm.after(0.2, lambda: say("still here"))
        swarm.after(0.3, swarm.leave)
        """,
        "without",
    )
    assert process.end() == (0, "")
    assert process.lines[1:] == ["still here", "goodbye swarm"]


@pytest.mark.parametrize("line", ["", "time.sleep(60)"])
def test_interrupt_without_the_private_function(start: Start, line: str) -> None:
    process = start(
        "import concurrent.futures.thread\ndel threading._register_atexit\nswarm = Swarm()\nswarm.after(0.2, lambda: say('ready'))\n" + line
    )
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert process.lines.count("goodbye swarm") == process.lines.count("atexit") == 1


@pytest.mark.parametrize("line", ["", "time.sleep(60)"])
def test_exit_in_handler_without_the_private_function(start: Start, line: str) -> None:
    lines = [
        "swarm = Swarm()",
        "swarm.after(0.2, lambda: sys.exit(3))",
        line,
    ]
    process = start("\n".join(lines), "without")
    assert process.end() == (3, "")
    assert process.lines.count("goodbye swarm") == process.lines.count("atexit") == 1


def test_interrupt_before_the_hook_could_run(start: Start) -> None:
    """Ctrl-C in the few instructions that Python needs between the end of main and our hook."""
    process = start(
        """
        def raises():
            raise KeyboardInterrupt
        swarm = Swarm()
        threading._register_atexit(raises)  # runs before ours, and keeps ours from running
        """
    )
    assert process.end() == (130, "")
    assert process.lines == ["atexit", "goodbye swarm"]


def test_interrupt_as_the_hook_begins(start: Start) -> None:
    """Where the hook cannot catch it yet; the process must not wait for the swarm ever after."""
    process = start(
        """
        is_main = lifetime.interpreter.is_main
        def raises():
            lifetime.interpreter.is_main = is_main
            raise KeyboardInterrupt
        lifetime.interpreter.is_main = raises
        swarm = Swarm()
        """
    )
    assert process.end() == (130, "")
    assert process.lines == ["atexit", "goodbye swarm"]


def test_interrupt_after_the_hook(start: Start) -> None:
    """All have left, and Python waits for a thread of the user's."""
    process = start(
        """
        def work():
            while not lifetime._life.hook_ran or lifetime._life.owners:
                time.sleep(0.01)
            time.sleep(0.1)
            say("ready")
            gate.wait()
            say("worker done")
        gate = threading.Event()
        threading.Thread(target=work).start()
        threading.Thread(target=lambda: (time.sleep(1), gate.set()), daemon=True).start()
        atexit.register(say, "late atexit")
        with Swarm():
            pass
        """
    )
    process.expect("ready")
    process.interrupt()
    assert process.end() == (130, "")
    assert process.lines[:2] == ["goodbye swarm", "ready"]
    assert process.lines[-2:] == ["late atexit", "atexit"]


def test_owner_that_fails_to_leave(start: Start) -> None:
    process = start(
        """
        class Broken(Swarm):
            def begin_leave(self, within):
                raise OSError("broken")
        broken, swarm = Broken(), Swarm()
        say("ready")
        sys.exit(3)
        """
    )
    process.expect("ready")
    status, errors = process.end(1)
    assert status == 3
    assert "OSError: broken" in errors
    assert process.lines == ["ready", "goodbye swarm", "atexit"]


def test_atexit_callback_and_stream_that_fail(start: Start) -> None:
    process = start(
        """
        atexit.register(lambda: 1/0)
        swarm = Swarm()
        swarm.after(0.1, lambda: sys.exit(3))
        sys.stdout.close()
        time.sleep(60)
        """
    )
    status, errors = process.end()
    assert status == 3
    assert "ZeroDivisionError" in errors
    assert process.lines == ["goodbye swarm", "atexit"]


def test_excepthook_of_the_users(start: Start) -> None:
    process = start(
        """
        sys.excepthook = lambda *info: say(f"hook {info[0].__name__}")
        swarm = Swarm()
        raise ValueError("oops")
        """
    )
    assert process.end() == (1, "")
    assert process.lines == ["hook ValueError", "goodbye swarm", "atexit"]


def test_excepthook_set_later_sees_the_interrupt(start: Start) -> None:
    process = start(
        """
        swarm = Swarm()
        sys.excepthook = lambda *info: say(f"hook {info[0].__name__}")
        swarm.after(0.1, lambda: say("ready"))
        time.sleep(60)
        """
    )
    process.expect("ready")
    process.interrupt()
    assert process.end(1) == (130, "")
    assert process.lines == ["ready", "hook KeyboardInterrupt", "goodbye swarm", "atexit"]
