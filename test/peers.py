"""Peers as processes: a script that does as it is told, and what tells it and collects what it says.

Both ways one JSON array a line. The script writes each line with one system call, so that nothing a process has said is lost when it
is killed. All processes of a `Peers` are read by whoever waits for one of them: nobody's pipe fills up, and no thread is needed.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

PATIENCE = 30.0
"""Seconds that anything may take on a busy machine."""


class Got(NamedTuple):
    """One message, as a peer's handler got it. `session` is (author's id, epoch); `data` is (name, life, number)."""

    session: tuple[str, int]
    sequence: int
    late: bool
    data: tuple[str, int, int]


class PeerProcess:
    """One process. What it has said so far is in the attributes; `Peers.until` has them grow.

    Attributes:
        name, life: as it signs its messages; ``life`` counts the processes of one name.
        got: messages, in the order of the handler's calls.
        neighbours: author ids, now; `most_neighbours`: the most there ever were at once.
        told: everything else, as lists.
        events: names of ups and downs, in order.
    """

    def __init__(self, name: str, life: int, topic: str, *, via: Sequence[str] = (), **options: Any) -> None:
        self.name, self.life = name, life
        self.id = self.ticket = ""
        self.got: list[Got] = []
        self.neighbours: list[str] = []
        self.most_neighbours = 0
        self.events: list[tuple[str, str]] = []
        self.told: list[list[Any]] = []
        self.stopped = self.ended = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in end()
        self._rest = b""
        self.process = subprocess.Popen(
            [*via, sys.executable, __file__, json.dumps({"name": name, "life": life, "topic": topic} | options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.stopped = number == signal.SIGSTOP

    def kill(self) -> None:
        """SIGKILL. What it has said before is still read."""
        self.ended = True
        self.process.kill()
        self.process.wait()

    def has_told(self, *what: Any) -> bool:
        return any(told[: len(what)] == list(what) for told in self.told)

    def of(self, name: str, life: int | None = None) -> list[int]:
        """The numbers that came from that peer, in order of arrival."""
        return [got.data[2] for got in self.got if got.data[0] == name and life in (None, got.data[1])]

    def errors(self) -> str:
        """What it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def leave(self, timeout: float = 5.0) -> None:
        """Has it leave; waits for the end of the process."""
        self.ended = True
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout)

    def end(self, timeout: float = 5.0) -> None:
        """Leaves, or is killed; no process and no descriptor stays behind."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
        self._errors.close()

    def read(self) -> bool:
        """Takes in what it has said; False at the end."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 20)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            kind, *rest = json.loads(line)
            getattr(self, f"_on_{kind}", lambda *rest, kind=kind: self.told.append([kind, *rest]))(*rest)
        return bool(data)

    def _on_ready(self, id: str, ticket: str) -> None:
        self.id, self.ticket = id, ticket

    def _on_got(self, source: str, epoch: int, sequence: int, late: bool, data: list[Any]) -> None:
        self.got.append(Got((source, epoch), sequence, late, (data[0], data[1], data[2])))

    def _on_up(self, id: str) -> None:
        self.neighbours.append(id)
        self.most_neighbours = max(self.most_neighbours, len(self.neighbours))
        self.events.append(("up", id))

    def _on_down(self, id: str, reason: str) -> None:
        self.neighbours.remove(id)
        self.events.append(("down", id))
        self.told.append(["down", id, reason])


class Peers:
    """Processes on one topic, which end with the ``with`` block; what they did not handle fails the test."""

    def __init__(self, **options: Any) -> None:
        self._options = {"mdns": False} | options
        self._topic = f"test {os.urandom(8).hex()}"
        self._selector = selectors.DefaultSelector()
        self._lives: dict[str, int] = {}
        self.all: list[PeerProcess] = []

    def start(self, name: str, **options: Any) -> PeerProcess:
        """A new process; the second of a name is its second life."""
        life = self._lives[name] = self._lives.get(name, 0) + 1
        peer = PeerProcess(name, life, self._topic, **self._options | options)
        self.all.append(peer)
        assert peer.process.stdout is not None
        self._selector.register(peer.process.stdout, selectors.EVENT_READ, peer)
        return peer

    def start_ready(self, name: str, **options: Any) -> PeerProcess:
        """As `start`, and its ticket is known."""
        peer = self.start(name, **options)
        self.until(lambda: bool(peer.ticket), what=f"{name} is ready")
        return peer

    def until(self, condition: Callable[[], bool], timeout: float = PATIENCE, what: str = "") -> None:
        """Reads what all say until the condition holds. Fails after `timeout` seconds, or if a process ends that nobody has killed."""
        deadline = time.monotonic() + timeout
        while not condition():
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            broken = [key.data.name for key, _ in ready if not self._read(key.data) and not key.data.ended]
            if broken or (not ready and not condition()):
                reason = f"{', '.join(broken)} ended" if broken else f"not within {timeout:g} s"
                states = "\n".join(self._describe(peer) for peer in self.all)
                raise AssertionError(f"{reason}: {what or 'the condition'}\n{states}")

    def _read(self, peer: PeerProcess) -> bool:
        more = peer.read()
        if not more:
            assert peer.process.stdout is not None
            self._selector.unregister(peer.process.stdout)
        return more

    def _describe(self, peer: PeerProcess) -> str:
        counts: dict[str, int] = {}
        for got in peer.got:
            key = f"{got.data[0]}.{got.data[1]}"
            counts[key] = counts.get(key, 0) + 1
        state = "stopped" if peer.stopped else peer.process.poll()
        said = f"{len(peer.neighbours)} neighbours, got {counts}, told {peer.told[-5:]} {peer.errors()[-2000:]}"
        return f"{peer.name}.{peer.life} ({state}): {said}"

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for peer in self.all:
            if peer.process.poll() is None and peer.process.stdin is not None and kind is None:
                peer.process.send_signal(signal.SIGCONT)
                with contextlib.suppress(BrokenPipeError):
                    peer.process.stdin.close()  # all at once, then wait for each
        complaints = []
        for peer in self.all:
            if kind is not None:
                peer.kill()
            elif peer.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    peer.process.wait(10)
            if "Traceback" in (errors := peer.errors()):
                complaints.append(f"{peer.name}.{peer.life}: {errors[-4000:]}")
            peer.end()
        self._selector.close()
        if kind is None and complaints:
            raise AssertionError("errors in a process:\n" + "\n".join(complaints))


# -- the script ------------------------------------------------------------------------------------------------------


def run(name: str, life: int, topic: str, *, clock_offset: float = 0.0, pause: float = 0.0, **options: Any) -> None:
    """Joins, and says what happens, until its input ends.

    Args:
        clock_offset: seconds by which this process's wall clock is ahead.
        pause: seconds that the handler sleeps for each message.
    """
    if clock_offset:
        true_time = time.time_ns
        time.time_ns = lambda: true_time() + int(clock_offset * 1e9)

    from solyd_swarm import Message, SwarmBusy, pubsub

    if isinstance(options.get("listen"), list):
        options["listen"] = tuple(options["listen"])
    swarm = pubsub(topic, dht=False, **options)
    published = 0
    stop = threading.Event()

    def on_received(message: Message) -> None:
        if pause:
            stop.wait(pause)
        say("got", message.source, message.epoch, message.sequence, message.late, message.data[:3])

    def publish(count: int, interval: float, size: int = 0) -> None:
        """`interval` seconds apart; that is the load, nothing is waited for."""
        nonlocal published
        for _ in range(count):
            published += 1
            while True:
                try:
                    swarm.publish([name, life, published, "x" * size])
                    break
                except SwarmBusy:
                    with contextlib.suppress(TimeoutError):
                        swarm.flush().result(0.1)
            if interval and stop.wait(interval):
                return
        say("published", published)

    def cut() -> None:
        """Aborts the channel to one neighbour; what is queued on it is lost."""
        for instance, neighbor in list(swarm._neighbors._peers.items())[:1]:
            say("cut", neighbor.id)
            swarm._node.endpoint._connections[instance].channel.abort("cut by the test")

    swarm.on("neighbor_up", lambda peer: say("up", peer.id))
    swarm.on("neighbor_down", down := lambda peer, reason: say("down", peer.id, reason))
    swarm.on("lagged", lambda count: say("lagged", count))
    swarm.on("error", lambda error: say("error", repr(error)))
    swarm.on("received", on_received)
    say("ready", swarm.id, swarm.ticket)
    workers = []
    for line in iter(sys.stdin.readline, ""):
        command, *args = json.loads(line)
        match command:
            case "publish":
                workers.append(threading.Thread(target=publish, args=args))
                workers[-1].start()
            case "flush":
                swarm.flush().result(PATIENCE)
                say("flushed")
            case "cut":
                swarm._home.call(cut)
    swarm.remove_listener("neighbor_down", down)  # while all leave, whoever collects may not read any more
    swarm.remove_listener("received", on_received)
    stop.set()
    for worker in workers:
        worker.join()
    swarm.leave().result(PATIENCE)


def say(*what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    run(**json.loads(sys.argv[1]))
