"""What two processes on one machine reach: time to the first message, latency, throughput, memory.

Run it as ``python bench/pair.py``, or where no packet may leave the machine ``unshare -n sh -c 'ip link set lo up; exec
python bench/pair.py'``. It keeps to 127.0.0.1 by itself, and ends by itself. Both processes are real ones, with channels encrypted
and envelopes signed as ever; both ends share the machine's cores, so figures compare only within one machine and one run.

What is measured, each in the two ways a swarm can live (``script``: on its own thread, handlers on another; ``asyncio``: in a loop of
the program's):

- start: from starting the interpreter of both processes at once to the later of the two first messages, by mDNS; and from starting
  a second process with the first one's ticket to the first message it gets.
- latency: one message under way at a time, 200 bytes; one way from before `publish` to inside the other's handler (CLOCK_MONOTONIC is
  one clock for all processes of a machine), and back again.
- throughput: published as fast as possible, from the first `publish` to the last call of the other's message handler, which checks
  each message's number. On `SwarmBusy` the publisher waits for `flush`, 5 ms at most.
- memory: the highest resident size of each process, after all of that.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import secrets
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL, LARGE = 200, 16 * 1024
BUSY_WAIT = 0.005
WARM_UP = 20
"""Round trips before those that count."""
STEP_TIMEOUT = 30.0
"""Seconds that anything but the throughput may take; that has a second for every `SLOWEST` messages more."""
SLOWEST = 2000
YIELD_EVERY = 1024
"""Messages after which a publisher on a loop lets the loop turn."""


# -- the two processes that are measured ------------------------------------------------------------------------


class Peer:
    """One end: obeys commands, one JSON object a line, and answers likewise."""

    def __init__(self, options: dict[str, Any]) -> None:
        from solyd_swarm import pubsub

        self.started: float = options["started"]
        self.swarm = pubsub(options["topic"], mdns=options["mdns"], dht=False, bootstrap=options["bootstrap"])
        self.swarm.once("message", self._first)
        self.swarm.once("connected", lambda: self.swarm.publish("hello"))
        self.lost = 0
        self.swarm.on("lagged", self._lagged)
        self.handler: Callable[[Any], None] | None = None
        self.counted: dict[str, Any] = {}
        tell(ticket=self.swarm.ticket)

    def _first(self, obj: object) -> None:
        tell(first=time.monotonic() - self.started)

    def _lagged(self, count: int) -> None:
        self.lost += count

    def listen(self, handler: Callable[[Any], None]) -> None:
        if self.handler is not None:
            self.swarm.remove_listener("message", self.handler)
        self.handler = handler
        self.swarm.on("message", handler)
        tell(ready=True)

    def echo(self) -> None:
        """Answers each ping with the time that it was under way."""
        publish, clock = self.swarm.publish, time.monotonic

        def handle(obj: Any) -> None:
            if "ping" in obj:
                publish(obj | {"pong": obj["ping"], "one_way": clock() - obj["ping"]})

        self.listen(handle)

    def ping(self, count: int) -> None:
        """Pings one after the other; tells all times at the end."""
        one_way: list[float] = []
        both_ways: list[float] = []
        clock = time.monotonic
        pad = padding({"ping": clock(), "pad": ""}, SMALL)

        def handle(obj: Any) -> None:
            if "pong" not in obj:
                return
            both_ways.append(clock() - obj["pong"])
            one_way.append(obj["one_way"])
            if len(both_ways) < count + WARM_UP:
                self.swarm.publish({"ping": clock(), "pad": pad})
            else:
                tell(one_way=one_way[WARM_UP:], round_trip=both_ways[WARM_UP:])

        self.listen(handle)
        self.swarm.publish({"ping": clock(), "pad": pad})

    def count(self, expected: int) -> None:
        """Counts messages until the last has come, and whether each follows the one before."""
        self.counted = {"count": 0, "in_order": True, "end": 0.0}
        state, last, next_number = self.counted, expected - 1, 0

        def handle(obj: Any) -> None:
            nonlocal next_number
            number = obj["n"]
            if number != next_number:
                state["in_order"] = False
            next_number = number + 1
            state["count"] += 1
            if number == last:
                state["end"] = time.monotonic()
                self.report()

        self.listen(handle)

    def report(self) -> None:
        tell(**self.counted, lagged=self.lost)

    def publish(self, count: int, size: int) -> None:
        from solyd_swarm import SwarmBusy

        publish, pad, busy = self.swarm.publish, padding({"n": count, "pad": ""}, size), 0
        begin = time.monotonic()
        for number in range(count):
            while True:
                try:
                    publish({"n": number, "pad": pad})
                    break
                except SwarmBusy:
                    busy += 1
                    try:
                        self.swarm.flush().result(BUSY_WAIT)
                    except TimeoutError:
                        continue
        tell(begin=begin, published=count, busy=busy, took=time.monotonic() - begin)

    async def publish_on_loop(self, count: int, size: int) -> None:
        from solyd_swarm import SwarmBusy

        publish, pad, busy = self.swarm.publish, padding({"n": count, "pad": ""}, size), 0
        begin = time.monotonic()
        for number in range(count):
            while True:
                try:
                    publish({"n": number, "pad": pad})
                    break
                except SwarmBusy:
                    busy += 1
                    try:
                        async with asyncio.timeout(BUSY_WAIT):
                            await self.swarm.flush()
                    except TimeoutError:
                        continue
            if not number % YIELD_EVERY:
                await asyncio.sleep(0)
        tell(begin=begin, published=count, busy=busy, took=time.monotonic() - begin)

    def obey(self, command: str, *args: Any) -> None:
        commands: dict[str, Callable[..., None]] = {
            "echo": self.echo,
            "ping": self.ping,
            "count": self.count,
            "report": self.report,
            "publish": self.publish,
            "memory": tell_memory,
        }
        commands[command](*args)


def run_script(options: dict[str, Any]) -> None:
    peer = Peer(options)
    for line in iter(sys.stdin.readline, ""):
        peer.obey(*json.loads(line))
    peer.swarm.leave().result(STEP_TIMEOUT)


async def run_on_loop(options: dict[str, Any]) -> None:
    peer = Peer(options)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *args = json.loads(line)
        if command == "publish":
            await peer.publish_on_loop(*args)
        else:
            peer.obey(command, *args)
    await peer.swarm.leave()


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def tell_memory() -> None:
    tell(memory=peak_memory())


def peak_memory() -> float:
    """MiB. From the system where it says so: getrusage counts what the process was before it became Python."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def padding(obj: dict[str, Any], size: int) -> str:
    """What makes the object `size` bytes long when published."""
    from solyd_swarm.payload import encode

    return "x" * max(0, size - len(encode(obj | {"pad": "x" * (size // 2)})) + size // 2)


# -- the one that measures ----------------------------------------------------------------------------------------


class Process:
    """One end, as seen from here."""

    def __init__(self, mode: str, topic: str, *, mdns: bool = False, bootstrap: Sequence[str] = ()) -> None:
        options = {"mode": mode, "topic": topic, "mdns": mdns, "bootstrap": list(bootstrap), "started": time.monotonic()}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--peer", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {
                "SOLYD_SWARM_INTERFACES": "127.0.0.1",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            },
        )
        self._input = b""
        self._told: list[dict[str, Any]] = []
        self.ticket: str = ""

    def command(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, key: str, timeout: float = STEP_TIMEOUT) -> dict[str, Any]:
        """The next thing told that has this key. Raises ``TimeoutError``, or ``RuntimeError`` if the process has ended."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while True:
            for told in self._told:
                if key in told:
                    self._told.remove(told)
                    return told
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"nothing with {key!r} was told within {timeout:g} s")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError(f"a process has ended while {key!r} was waited for, status {self._process.wait()}")
            *lines, self._input = (self._input + data).split(b"\n")
            self._told += map(json.loads, lines)

    def expect_ticket(self) -> str:
        return str(self.expect("ticket")["ticket"])

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def measure_start(mode: str) -> tuple[float, float]:
    """Seconds to the first message: by mDNS, both started at once; by ticket, of the second."""
    topic = new_topic()
    with Process(mode, topic, mdns=True) as one, Process(mode, topic, mdns=True) as other:
        by_mdns = max(one.expect("first")["first"], other.expect("first")["first"])
    topic = new_topic()
    with Process(mode, topic) as one, Process(mode, topic, bootstrap=[one.expect_ticket()]) as other:
        by_ticket = other.expect("first")["first"]
    return by_mdns, by_ticket


def measure_pair(mode: str, messages: int, large: int, pings: int) -> dict[str, Any]:
    """Everything else, on one pair of processes."""
    topic = new_topic()
    with Process(mode, topic) as publisher, Process(mode, topic, bootstrap=[publisher.expect_ticket()]) as subscriber:
        publisher.expect("first")
        subscriber.expect("first")
        subscriber.command("echo")
        subscriber.expect("ready")
        publisher.command("ping", pings)
        told = publisher.expect("round_trip", STEP_TIMEOUT + pings / 100)
        found: dict[str, Any] = {
            "one_way_ms": spread(told["one_way"]),
            "round_trip_ms": spread(told["round_trip"]),
            "small": measure_throughput(publisher, subscriber, messages, SMALL),
            "large": measure_throughput(publisher, subscriber, large, LARGE),
        }
        for name, process in (("publisher", publisher), ("subscriber", subscriber)):
            process.command("memory")
            found[f"{name}_peak_mib"] = round(process.expect("memory")["memory"], 1)
        return found


def measure_throughput(publisher: Process, subscriber: Process, count: int, size: int) -> dict[str, Any]:
    subscriber.command("count", count)
    subscriber.expect("ready")
    publisher.command("publish", count, size)
    allowed = STEP_TIMEOUT + count / SLOWEST
    published = publisher.expect("published", allowed)
    try:
        counted = subscriber.expect("count", allowed)
    except TimeoutError:
        subscriber.command("report")
        counted = subscriber.expect("count")
    seconds = counted["end"] - published["begin"]
    return {
        "size": size,
        "published": published["published"],
        "delivered": counted["count"],
        "in_order": counted["in_order"],
        "lagged": counted["lagged"],
        "busy": published["busy"],
        "publishing_s": round(published["took"], 4),
        "delivered_per_s": round(counted["count"] / seconds) if seconds > 0 else None,
    }


def new_topic() -> str:
    return f"bench {secrets.token_hex(8)}"


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50": round(statistics.median(ordered) * 1000, 3),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1000, 3),
        "max": round(ordered[-1] * 1000, 3),
    }


def measure(modes: Sequence[str], messages: int, large: int, pings: int, runs: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "uvloop": os.environ.get("SOLYD_SWARM_UVLOOP", "") not in ("", "0"),
        "modes": {},
    }
    for mode in modes:
        starts = [measure_start(mode) for _ in range(runs)]
        found["modes"][mode] = {
            "runs": runs,
            "start_mdns_ms": spread(by_mdns for by_mdns, _ in starts),
            "start_ticket_ms": spread(by_ticket for _, by_ticket in starts),
            **measure_pair(mode, messages, large, pings),
        }
    return found


def show(found: dict[str, Any]) -> None:
    modes = found["modes"]
    print(f"Python {found['python']}, {found['cores']} cores, both ends on one machine{', uvloop' if found['uvloop'] else ''}\n")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("start to first message, mDNS, p50 / max ms", lambda m: "{p50:.0f} / {max:.0f}".format(**m["start_mdns_ms"])),
        ("start to first message, ticket, p50 / max ms", lambda m: "{p50:.0f} / {max:.0f}".format(**m["start_ticket_ms"])),
        (f"one way, {SMALL} bytes, p50 / p99 ms", lambda m: "{p50:.2f} / {p99:.2f}".format(**m["one_way_ms"])),
        (f"round trip, {SMALL} bytes, p50 / p99 ms", lambda m: "{p50:.2f} / {p99:.2f}".format(**m["round_trip_ms"])),
    ]
    for size in ("small", "large"):
        words = f"{SMALL} bytes" if size == "small" else f"{LARGE // 1024} KiB"
        rows += [
            (f"delivered per second, {words}", partial(show_rate, size=size)),
            (f"delivered of published, {words}", partial(show_counts, size=size)),
        ]
    rows.append(("peak memory, publisher / subscriber MiB", lambda m: f"{m['publisher_peak_mib']:.0f} / {m['subscriber_peak_mib']:.0f}"))
    print(f"{'':46}" + "".join(f"{mode:>22}" for mode in modes))
    for name, cell in rows:
        print(f"{name:46}" + "".join(f"{cell(each):>22}" for each in modes.values()))


def show_rate(measured: dict[str, Any], size: str) -> str:
    return f"{measured[size]['delivered_per_s'] or 0:,}"


def show_counts(measured: dict[str, Any], size: str) -> str:
    return f"{measured[size]['delivered']:,} of {measured[size]['published']:,}"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give 1 or more")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=positive, default=500_000, help="200-byte messages for the throughput (default: %(default)s)")
    parser.add_argument("--large", type=positive, default=20_000, help="16-KiB messages for the throughput (default: %(default)s)")
    parser.add_argument("--pings", type=positive, default=2000, help="round trips for the latency (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=10, help="starts of two processes for the time to the first message")
    parser.add_argument("--mode", choices=("script", "asyncio"), help="one of the two only")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        options = json.loads(args.peer)
        if options["mode"] == "script":
            run_script(options)
        else:
            asyncio.run(run_on_loop(options))
        return
    found = measure([args.mode] if args.mode else ["script", "asyncio"], args.messages, args.large, args.pings, args.runs)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
