"""Where somebody types: a real Jupyter kernel, and Python's own prompts. The swarm lives on threads of its own there."""

import asyncio
import contextlib
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop
from processes import JOIN, PATIENCE, Neighbour, Process, neighbour

START = 60.0
"""Seconds that a kernel may take to start: it imports a lot."""


class Notebook:
    """A kernel and the cells that run in it."""

    def __init__(self, directory: Path) -> None:
        self.manager = KernelManager(kernel_name="python3", connection_file=str(directory / "kernel.json"), ip="127.0.0.1")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        paths = {name: str(directory) for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
        root = str(Path(__file__).resolve().parent.parent)
        self.manager.start_kernel(env={**environment, **paths, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=START)
        self.run(JOIN)

    def begin(self, cell: str) -> str:
        """Starts a cell. Returns what `finish` takes."""
        return self.client.execute(dedent(cell), store_history=False)

    def wait_for_output(self, cell: str) -> str:
        """The next thing that a cell prints."""
        while True:
            content = self._next(cell)
            if content.get("name") == "stdout":
                return str(content["text"]).strip()

    def finish(self, cell: str) -> str:
        """Waits until a cell has ended. Returns what it printed or its last value; an exception of its fails the test."""
        said = ""
        while (content := self._next(cell)).get("execution_state") != "idle":
            assert "ename" not in content, "\n".join(content["traceback"])
            said += content["text"] if content.get("name") == "stdout" else content.get("data", {}).get("text/plain", "")
        return said.strip()

    def run(self, cell: str) -> str:
        return self.finish(self.begin(cell))

    def _next(self, cell: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.manager.interrupt_kernel()  # so that other tests find it idle
                raise AssertionError("the kernel says nothing") from None
            if message["parent_header"].get("msg_id") == cell:
                return dict(message["content"])

    def close(self) -> None:
        self.client.stop_channels()
        with contextlib.suppress(RuntimeError):  # it has gone already
            self.manager.shutdown_kernel(now=True)
        self.manager.context.destroy(linger=0)
        ensure_event_loop().close()  # the client made it for its blocking calls, and never closes it
        asyncio.set_event_loop(None)


@contextlib.contextmanager
def _kernel(directory: Path) -> Iterator[Notebook]:
    notebook = Notebook(directory)
    try:
        yield notebook
    finally:
        notebook.close()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with _kernel(tmp_path_factory.mktemp("kernel")) as notebook:
        yield notebook


@pytest.fixture
def other() -> Iterator[Neighbour]:
    with neighbour() as made:
        yield made


@pytest.fixture
def notebook(kernel: Notebook, other: Neighbour) -> Iterator[Notebook]:
    """The kernel, with a `swarm` that has found the neighbour."""
    kernel.run(f"""
        os.environ["TICKET"] = {other.swarm.ticket!r}
        swarm = join()
        swarm.joined().result(10)
    """)
    yield kernel
    kernel.run("swarm.leave().result(10)")


def test_lives_on_threads_of_its_own(notebook: Notebook) -> None:
    said = notebook.run("""
        asyncio.get_running_loop()  # there is one, which cells block
        say(sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("solyd_swarm")))
        print(len(swarm.peers))
    """)
    assert "solyd_swarm loop" in said
    assert said.endswith("1")


def test_publish_and_wait(notebook: Notebook, other: Neighbour) -> None:
    said = notebook.run("""
        swarm.publish({"cell": 1})
        swarm.flush().result(10)
        print(swarm.stats.acknowledged)
    """)
    assert said == "1"
    assert other.message() == {"cell": 1}


def test_the_last_value_of_a_cell_is_readable(notebook: Notebook) -> None:
    assert notebook.run("swarm").startswith("<Swarm 'room'")
    assert notebook.run("swarm.joined()").startswith("<Pending")


def test_top_level_await(notebook: Notebook, other: Neighbour) -> None:
    said = notebook.run("""
        await swarm.joined()
        swarm.publish("awaited")
        await swarm.flush()
        async with pubsub("nobody else", **LOOPBACK) as lonely:
            try:
                await asyncio.wait_for(lonely.joined(), 0.01)
            except TimeoutError:
                print("late")
    """)
    assert said == "late"
    assert other.message() == "awaited"


def test_async_for_in_a_cell(notebook: Notebook, other: Neighbour) -> None:
    for number in range(3):
        other.swarm.publish(number)
    said = notebook.run("""
        seen = []
        async for message in swarm:
            seen.append(message.data)
            if len(seen) == 3:
                break
        print(seen)
    """)
    assert said == "[0, 1, 2]"


def test_sync_for_in_a_cell(notebook: Notebook, other: Neighbour) -> None:
    for number in range(3):
        other.swarm.publish(number)
    assert notebook.run("print([message.data for _, message in zip(range(3), swarm)])") == "[0, 1, 2]"


def test_interrupting_a_cell_stops_nothing_else(notebook: Notebook, other: Neighbour) -> None:
    # Told by another thread, while the cell waits already: a swarm that Ctrl-C keeps from being assigned is nobody's to leave.
    tell = "threading.Timer(0.1, say, ['waiting']).start()"
    for what in (f"{tell}; list(swarm)", f"with pubsub('nobody else', **LOOPBACK) as lonely: {tell}; lonely.joined().result()"):
        cell = notebook.begin(f"""
            try:
                {what}
            except KeyboardInterrupt:
                print("interrupted")
        """)
        assert notebook.wait_for_output(cell) == "waiting"
        notebook.manager.interrupt_kernel()
        assert notebook.finish(cell) == "interrupted"
    notebook.run("swarm.publish('still here')")
    assert other.message() == "still here"


ECHO = """
threads = set()
@swarm.on("message")
def echo(obj):
    threads.add(threading.current_thread().name)
    swarm.publish(["echo", obj])
"""


def test_handlers_run_while_idle(notebook: Notebook, other: Neighbour) -> None:
    notebook.run(ECHO)
    other.swarm.publish("anybody?")
    assert other.message() == ["echo", "anybody?"]
    assert notebook.run("print(threads)") == "{'solyd_swarm dispatcher'}"


def test_a_busy_cell_stalls_nothing(notebook: Notebook, other: Neighbour) -> None:
    notebook.run(ECHO)
    cell = notebook.begin("""
        say("busy")
        go_on = time.monotonic() + 10
        while len(threads) < 1 and time.monotonic() < go_on:
            time.sleep(0.01)
        time.sleep(0.5)
    """)
    assert notebook.wait_for_output(cell) == "busy"
    for number in range(5):
        other.swarm.publish(number)
        assert other.message() == ["echo", number]
    began = time.monotonic()
    notebook.finish(cell)
    assert time.monotonic() - began > 0.1  # it was at work all the while


def test_coroutine_handlers(notebook: Notebook, other: Neighbour) -> None:
    notebook.run("""
        @swarm.on("message")
        async def echo(obj):
            await asyncio.sleep(0)
            swarm.publish(["echo", obj])
    """)
    other.swarm.publish(1)
    assert other.message() == ["echo", 1]


def test_events(notebook: Notebook, other: Neighbour) -> None:
    said = notebook.run("""
        events = []
        second = join("events")
        for name in ("connected", "neighbor_up", "left"):
            second.on(name, lambda *args, name=name: events.append(name))
        with pubsub("events", bootstrap=second.ticket, **LOOPBACK) as third:
            third.joined().result(10)
            second.joined().result(10)
        second.leave().result(10)
        print(events)
    """)
    assert said == "['connected', 'neighbor_up', 'left']"


def test_nodes_in_a_cell(notebook: Notebook) -> None:
    said = notebook.run("""
        async with Node(**LOOPBACK) as node:
            a = node.pubsub("a")
            with Node(bootstrap=node.ticket, **LOOPBACK) as second:
                b = second.pubsub("a")
                await b.joined()
                print(len(a.peers))
    """)
    assert said == "1"


def test_result_in_a_handler_is_refused(notebook: Notebook, other: Neighbour) -> None:
    notebook.run("""
        @swarm.on("message")
        def wait(obj):
            try:
                swarm.flush().result()
            except RuntimeError as error:
                swarm.publish(str(error))
    """)
    other.swarm.publish(1)
    assert "own thread" in other.message()


def test_leaving_ends_the_threads(kernel: Notebook, other: Neighbour) -> None:
    said = kernel.run(f"""
        os.environ["TICKET"] = {other.swarm.ticket!r}
        swarm = join()
        await swarm.joined()
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("solyd")]
        assert threads
        await swarm.leave()
        try:
            swarm.publish(1)
        except RuntimeError as error:
            print(type(error).__name__)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), threading.enumerate()
    """)
    assert said == "SwarmLeft"
    assert other.down()[0] == "left"


def test_default_node(kernel: Notebook) -> None:
    """By mDNS and the DHT, as a user would have it."""
    said = kernel.run("""
        first, second = pubsub("by default"), pubsub("by default")
        first.joined().result(10)
        second.publish("hello")
        async for message in first:
            print(message.data)
            break
        await first.leave()
        await second.leave()
    """)
    assert said == "hello"


@pytest.mark.parametrize("how", ["shutdown", "exit"])
def test_kernel_ends_with_a_live_swarm(how: str, tmp_path: Path, other: Neighbour) -> None:
    with _kernel(tmp_path) as kernel:
        kernel.run(f"""
            os.environ["TICKET"] = {other.swarm.ticket!r}
            swarm = join()
            swarm.joined().result(10)
            swarm.publish("last words")
        """)
        began = time.monotonic()
        if how == "shutdown":
            kernel.client.shutdown()
        else:
            kernel.begin("exit")
        reason, told = other.down()
        assert other.message() == "last words"
        assert (reason, told - began < 3) == ("left", True)
        while kernel.manager.is_alive():
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)


# ---- Python's own prompts


def _repl(other: Neighbour, *options: str, terminal: bool = False) -> Process:
    return Process([sys.executable, "-q", *options], terminal=terminal, TICKET=other.swarm.ticket, TERM="dumb", PYTHON_COLORS="0")


AT_THE_PROMPT = [
    *(line for line in JOIN.splitlines() if line and not line.startswith((" ", "def"))),
    "swarm = pubsub('room', bootstrap=os.environ['TICKET'], **LOOPBACK)",
    "swarm.joined().result(10)",
    "_ = swarm.publish('typed')",
    "print('ready', flush=True)",
]


@pytest.mark.parametrize("end", ["exit()", "end of input"])
def test_repl_leaves_at_once(end: str, other: Neighbour) -> None:
    with _repl(other, "-i") as process:
        for line in AT_THE_PROMPT:
            process.say(line)
        process.expect("ready")
        _ends_at_once(process, end, other)


def _ends_at_once(process: Process, end: str, other: Neighbour) -> None:
    assert other.message() == "typed"
    began = time.monotonic()
    if end == "end of input":
        assert process.process.stdin is not None
        process.process.stdin.close()
    else:
        process.say(end)
    reason, told = other.down()
    assert (reason, told - began < 1) == ("left", True)
    assert process.end()[0] == 0
    assert time.monotonic() - began < 2
    assert "Error" not in process.errors()


def test_python_i_with_a_script_leaves_at_once(tmp_path: Path, other: Neighbour) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(AT_THE_PROMPT))
    with _repl(other, "-i", str(program)) as process:
        process.expect("ready")
        _ends_at_once(process, "exit()", other)


def test_repl_at_a_terminal(other: Neighbour) -> None:
    """With its line editor, and Ctrl-C, which does not end it."""
    with _repl(other, terminal=True) as process:
        for line in AT_THE_PROMPT:
            process.say(line)
        process.expect(".*ready")
        assert other.message() == "typed"
        process.say("_ = swarm.on('message', lambda obj: print('got', obj, flush=True))")
        other.swarm.publish("handled at the prompt")
        process.expect(".*got handled at the prompt")
        process.say("print('waiting', flush=True); swarm.wait()")
        process.expect("waiting")
        process.interrupt()
        process.expect("KeyboardInterrupt")
        process.say("print('still', 'here', flush=True)")
        process.expect(".*still here")
        process.say("_ = swarm.publish('typed')")
        _ends_at_once(process, "exit()", other)


def test_asyncio_repl(other: Neighbour) -> None:
    with _repl(other, "-m", "asyncio") as process:
        for line in AT_THE_PROMPT:
            process.say(line)
        process.expect(".*ready")
        process.say("await swarm.flush()")
        process.say("[message.data async for message in swarm if swarm.leave() and print(message.data, flush=True)]")
        other.swarm.publish("while the prompt waits")
        process.expect(".*while the prompt waits")
        process.say("swarm = pubsub('room', bootstrap=os.environ['TICKET'], **LOOPBACK)")
        process.say("await swarm.joined()")
        process.say("print('again', flush=True)")
        process.expect(".*again")
        assert other.down()[0] == "left"
        _ends_at_once(process, "exit()", other)
