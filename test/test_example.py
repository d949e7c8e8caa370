"""The example of the README as two real processes, and every way in which a script with a live swarm ends."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PATIENCE, ROOT, Process, member, neighbour

EXAMPLE = [sys.executable, str(ROOT / "example.py")]
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Runs a command in a network of its own, which has nothing but loopback."""
BOUND = 1.0 + 0.5
"""Seconds from Ctrl-C to the end, and what a busy machine may add."""


# ---- the example


def talk() -> float:
    """Two copies find each other, by mDNS or the DHT, and talk. Returns seconds from the start to the later first message."""
    with Process(EXAMPLE) as one, Process(EXAMPLE) as two:
        said = []
        for process in (one, two):
            process.expect("connected")
            said.append(process.expect(r"message \{'data': 'hello warld from ([A-Za-z0-9+/]{43}=\.ed25519)!'\}").group(1))
        took = time.monotonic() - min(one.begun, two.begun)
        assert said[0] != said[1]
        for process in (one, two):
            assert process.end() == (0, "")
            assert len(process.lines) == 2
    return took


@pytest.mark.parametrize("number", [1, 2])
def test_example(number: int) -> None:
    assert talk() < PATIENCE


def _can_be_alone() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode


@pytest.mark.skipif(not _can_be_alone(), reason="needs a network namespace: Linux, where users may make them")
def test_example_on_a_machine_without_a_network() -> None:
    """All interfaces, of which there is only loopback."""
    environment = {name: value for name, value in os.environ.items() if name != "SOLYD_SWARM_INTERFACES"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_example import talk; talk()"
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_example_three_times_over() -> None:
    """A third copy finds nobody when the others have left, and a fourth finds it."""
    talk()
    with Process(EXAMPLE) as third:
        with Process(EXAMPLE) as fourth:
            for process in (third, fourth):
                process.expect("connected")
                process.expect("message .*")
            assert fourth.end() == (0, "")
        assert third.end() == (0, "")


# ---- how a script ends


PLACES = {
    "after the last line": "",
    "sleeping": "time.sleep(100)",
    "at input": "input()",
    "iterating": "for message in swarm: pass",
    "in wait": "swarm.wait()",
    "waiting for a result": "pubsub('nobody else', **LOOPBACK).joined().result()",
    "in with": "with swarm: time.sleep(100)",
}


@pytest.mark.parametrize("place", PLACES)
def test_interrupt_while_connected(place: str) -> None:
    with neighbour() as other:
        text = f"swarm = join()\nswarm.joined().result()\nswarm.publish('ready')\nsay('ready')\n{PLACES[place]}"
        with member(text, other) as process:
            process.expect("ready")
            assert other.message() == "ready"
            began = process.interrupt()
            reason, told = other.down()
            assert process.end() == (130, "")
            assert time.monotonic() - began < BOUND
            assert (reason, told - began < BOUND) == ("left", True)


LONELY = {
    "by mdns and dht": "swarm = pubsub('nobody else')\nsay('ready')",
    "by nothing": "swarm = pubsub('nobody else', **LOOPBACK)\nsay('ready')",
    "by a resolver that hangs": """
import socket
honest = socket.getaddrinfo
def getaddrinfo(host, *arguments, **options):
    if host != "nowhere.invalid":
        return honest(host, *arguments, **options)
    say("ready")
    time.sleep(100)
socket.getaddrinfo = getaddrinfo
swarm = pubsub("nobody else", bootstrap="nowhere.invalid:1", **LOOPBACK)
""",
}


@pytest.mark.parametrize("how", LONELY)
def test_interrupt_while_alone(how: str) -> None:
    with neighbour() as other, member(LONELY[how], other) as process:
        process.expect("ready")
        began = process.interrupt()
        assert process.end() == (130, "")
        assert time.monotonic() - began < BOUND


def test_interrupt_runs_finally_and_atexit() -> None:
    text = """
        import atexit
        atexit.register(say, "atexit")
        swarm = join()
        swarm.on("left", lambda: say("left"))
        try:
            swarm.joined().result()
            say("ready")
            time.sleep(100)
        finally:
            swarm.publish("last words")
            say("finally")
    """
    with neighbour() as other, member(text, other) as process:
        process.expect("ready")
        process.interrupt()
        assert other.message() == "last words"
        assert process.end() == (130, "")
        assert process.lines == ["ready", "finally", "left", "atexit"]


HANGING = {
    "plain": """
        @swarm.on("message")
        def hang(obj):
            swarm.publish("hanging")
            threading.Event().wait()
    """,
    "coroutine": """
        @swarm.on("message")
        async def hang(obj):
            swarm.publish("hanging")
            await asyncio.sleep(100)
    """,
    "in C": """
        @swarm.on("message")
        def hang(obj):
            swarm.publish("hanging")
            os.read(os.pipe()[0], 1)
    """,
}


@pytest.mark.parametrize("kind", HANGING)
def test_interrupt_while_a_handler_hangs(kind: str) -> None:
    with neighbour() as other, member(f"swarm = join()\n{_dedent(HANGING[kind])}", other) as process:
        other.swarm.publish(1)
        assert other.message() == "hanging"
        began = process.interrupt()
        reason, told = other.down()
        assert process.end() == (130, "")
        assert time.monotonic() - began < BOUND
        assert (reason, told - began < BOUND) == ("left", True)


def _dedent(text: str) -> str:
    return "\n".join(line[8:] for line in text.splitlines())


def test_interrupt_of_several_swarms() -> None:
    text = """
        swarms = [join(), join(), pubsub("nobody else", **LOOPBACK), pubsub("other")]
        for swarm in swarms[:2]:
            swarm.joined().result()
        say("ready")
    """
    with neighbour() as other, member(text, other) as process:
        process.expect("ready")
        began = process.interrupt()
        reasons = {other.down()[0] for _ in range(2)}
        assert process.end() == (130, "")
        assert time.monotonic() - began < BOUND
        assert reasons == {"left"}


ENDS = {
    "an exception": ("raise KeyError('mine')", 1),
    "sys.exit(0)": ("sys.exit(0)", 0),
    "sys.exit(3)": ("sys.exit(3)", 3),
    "sys.exit() in a function": ("def end():\n    sys.exit(4)\nend()", 4),
}


@pytest.mark.parametrize("how", ENDS)
def test_end_of_main(how: str) -> None:
    line, status = ENDS[how]
    with neighbour() as other, member(f"swarm = join()\nswarm.joined().result()\nswarm.publish('last words')\n{line}", other) as process:
        assert other.message() == "last words"
        reason, _ = other.down()
        ended, errors = process.end()
        assert (reason, ended) == ("left", status)
        assert errors.startswith("Traceback") and errors.endswith("KeyError: 'mine'\n") if status == 1 else errors == ""


EXITS = {
    "plain": "swarm.on('message', lambda obj: sys.exit(obj))",
    "coroutine": "@swarm.on('message')\nasync def handler(obj):\n    await asyncio.sleep(0)\n    sys.exit(obj)",
}


@pytest.mark.parametrize(("kind", "place"), list(itertools.product(EXITS, ["after the last line", "sleeping", "at input", "in wait"])))
def test_exit_in_a_handler(kind: str, place: str) -> None:
    with neighbour() as other:
        text = f"swarm = join()\n{EXITS[kind]}\nswarm.publish('ready')\n{PLACES[place]}"
        with member(text, other) as process:
            assert other.message() == "ready"
            other.swarm.publish(7)
            assert other.down()[0] == "left"
            assert process.end() == (7, "")


def test_exit_in_a_handler_at_a_terminal() -> None:
    """While `input()` waits with its line editor."""
    text = "import readline\nswarm = join()\nswarm.on('message', lambda obj: sys.exit(obj))\nswarm.publish('ready')\ninput('name? ')\n"
    with neighbour() as other, member(text, other, terminal=True) as process:
        assert other.message() == "ready"
        other.swarm.publish(7)
        assert other.down()[0] == "left"
        assert process.end()[0] == 7


def test_goes_on_after_the_last_line() -> None:
    text = """
        swarm = join()
        seen = []

        @swarm.on("message")
        def on_message(obj):
            seen.append(obj)
            if obj == "end":
                say(seen)
                swarm.leave()
            else:
                swarm.publish(["echo", obj])

        swarm.on("connected", lambda: swarm.publish("connected"))
    """
    with neighbour() as other, member(text, other) as process:
        assert other.message() == "connected"
        for number in range(3):
            other.swarm.publish(number)
            assert other.message() == ["echo", number]
        assert process.process.poll() is None
        other.swarm.publish("end")
        assert other.down()[0] == "left"
        assert process.end() == (0, "")
        assert process.lines == ["[0, 1, 2, 'end']"]


def test_lives_until_the_last_swarm_has_left() -> None:
    text = """
        first = join("one")
        second = pubsub("two", bootstrap=input(), **LOOPBACK)
        first.on("message", lambda obj: first.leave())
        second.on("message", lambda obj: second.leave())
    """
    with neighbour("one") as one, neighbour("two") as two, member(text, one) as process:
        process.say(two.swarm.ticket)
        one.up()
        two.up()
        one.swarm.publish(1)
        assert one.down()[0] == "left"
        two.swarm.publish(2)
        assert two.down()[0] == "left"
        assert process.end() == (0, "")


def test_a_killed_peer_is_noticed() -> None:
    with neighbour() as other, member("swarm = join()\nswarm.publish('ready')", other) as process:
        assert other.message() == "ready"
        began = time.monotonic()
        process.process.kill()
        reason, told = other.down()
        assert (reason != "left", told - began < 1) == (True, True)
