"""How fast a newcomer is connected by each way of finding peers, and what an idle node sends and hears: hosts of their own on two LANs.

Run it as root on Linux with iproute2: ``python bench/paths.py``. Every host is a network namespace; no way leads out of them. The
newcomer is a fresh process each time, on another LAN than the member it is to meet (for mDNS: on the same); a third LAN holds a
``solyd-swarm bootstrap`` node and a mainline DHT of plain libtorrent nodes. Start-to-connected is from calling `pubsub` to the
``connected`` event. It ends by itself.
"""

import argparse
import contextlib
import json
import os
import secrets
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))

SETTLE = 5.0
"""Seconds between the member's start and the first newcomer."""
NODES = 12
"""Of the mainline DHT."""

MEMBER = """
import json, os, sys, time
from solyd_swarm import Node
options = json.loads(os.environ["OPTIONS"])
begun = time.monotonic()
node = Node(**options)
swarm = node.pubsub(os.environ["TOPIC"])
swarm.once("connected", lambda: print("connected", time.monotonic() - begun, flush=True))
print("ready", node.ticket, node.port, flush=True)
sys.stdin.readline()
node.close().result(10)
"""

MAINLINE = """
import sys
import libtorrent
first, sessions = None, []
for number in range(1, int(sys.argv[1]) + 1):
    settings = dict(listen_interfaces=f"44.3.0.{number}:6881", enable_dht=True, enable_lsd=False, enable_upnp=False, enable_natpmp=False,
                    dht_restrict_routing_ips=False, dht_restrict_search_ips=False, dht_bootstrap_nodes="44.3.0.1:6881" if first else "",
                    dht_block_ratelimit=10_000)  # all newcomers have one address
    sessions.append(libtorrent.session(settings))
    first = sessions[0]
print("ready", flush=True)
sys.stdin.readline()
"""


class World:
    """Three LANs with a router between them; addresses that count as the internet's (libtorrent ignores 11.0.0.0/8 and the like)."""

    def __init__(self, lab: Any) -> None:
        lans = [lab.bridge() for _ in range(3)]
        router = lab.host()
        router.forward()
        for number, lan in enumerate(lans, 1):
            router.plug(lan, f"44.{number}.0.254/24")
        self.member, self.near, self.far, self.server = (lab.host() for _ in range(4))
        self.member.plug(lans[0], "44.1.0.1/24", gateway="44.1.0.254")
        self.near.plug(lans[0], "44.1.0.2/24", gateway="44.1.0.254")
        self.far.plug(lans[1], "44.2.0.1/24", gateway="44.2.0.254")
        self.server.plug(lans[2], *(f"44.3.0.{number}/24" for number in range(1, NODES + 1)), gateway="44.3.0.254")

    @contextlib.contextmanager
    def servers(self) -> Iterator[None]:
        with (
            self.server.script(MAINLINE.replace("sys.argv[1]", repr(str(NODES)))) as mainline,
            self.server.process([sys.executable, "-m", "solyd_swarm", "bootstrap", "--listen", "44.3.0.1:7000"]) as bootstrap,
        ):
            mainline.expect("ready")
            bootstrap.expect("listening .*")
            yield
            mainline.say("")
            bootstrap.interrupt()
            bootstrap.end()


def start(host: Any, topic: str, options: dict[str, Any]) -> Any:
    return host.script(MEMBER, TOPIC=topic, OPTIONS=json.dumps(options))


def connect(host: Any, topic: str, options: dict[str, Any]) -> float:
    """Seconds until a fresh process is connected."""
    with start(host, topic, options) as fresh:
        fresh.expect("ready .*")
        seconds = float(fresh.expect("connected (.*)")[1])
        fresh.say("")
        fresh.end()
    return seconds


def measure(host: Any, member: Any, runs: int, ways: dict[str, Any], newcomers: dict[str, Any]) -> list[float]:
    """Seconds to connect, of a fresh process each time."""
    found = []
    topic = secrets.token_hex(8)
    with start(member, topic, ways) as other:
        ticket = other.expect("ready (.*) .*")[1]
        if newcomers.get("bootstrap") == "ticket":
            newcomers = {**newcomers, "bootstrap": ticket}
        time.sleep(SETTLE)
        for _ in range(runs):
            found.append(connect(host, topic, newcomers))
        other.say("")
        other.end()
    return found


def paths(world: World) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """What is measured: where the newcomer is, and the options of the member and of the newcomer."""
    alone: dict[str, Any] = {"mdns": False, "dht": False, "portmap": False}
    by_dht = {**alone, "dht": True, "mainline": False, "bootstrap": "44.3.0.1:7000"}
    by_mainline = {**alone, "dht": True, "mainline": [f"44.3.0.{number}:6881" for number in (1, 2, 3)]}
    return {
        "mDNS": (world.near, {**alone, "mdns": True}, {**alone, "mdns": True}),
        "ticket": (world.far, alone, {**alone, "bootstrap": "ticket"}),
        "peers' DHT": (world.far, by_dht, by_dht),
        "mainline DHT": (world.far, by_mainline, by_mainline),
    }


def book(world: World, runs: int, directory: str) -> list[float]:
    """One meeting by ticket, then by the address book alone."""
    topic = secrets.token_hex(8)
    alone: dict[str, Any] = {"mdns": False, "dht": False, "portmap": False}
    found = []
    with start(world.member, topic, alone) as other:
        ticket = other.expect("ready (.*) .*")[1]
        for number in range(runs + 1):
            options = {**alone, "identity": os.path.join(directory, "identity")} | ({} if number else {"bootstrap": ticket})
            found.append(connect(world.far, topic, options))
        other.say("")
        other.end()
    return found[1:]


def idle(world: World, settle: float, seconds: float) -> dict[str, tuple[float, float]]:
    """Packets and bytes (IP) a minute at a node that uses everything and has one neighbour, both directions."""
    topic = secrets.token_hex(8)
    options = {"bootstrap": "44.3.0.1:7000", "mainline": [f"44.3.0.{number}:6881" for number in (1, 2, 3)]}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with start(world.member, topic, options) as other, start(world.near, topic, options) as fresh:
        other.expect("ready .*")
        port = int(fresh.expect("ready .* (.*)")[1])
        fresh.expect("connected .*")
        time.sleep(settle)
        with world.near.capture("eth0") as frames:
            time.sleep(seconds)
        for _, frame in frames:
            kind = classify(frame, port)
            if kind:
                counts[kind] += 1
                sizes[kind] += len(frame) - 14
        for each in (other, fresh):
            each.say("")
            each.end()
    return {kind: (60 * counts[kind] / seconds, 60 * sizes[kind] / seconds) for kind in sorted(counts)}


def classify(frame: bytes, port: int) -> str:
    """Which part a frame belongs to; empty for what is none of ours."""
    if frame[12:14] != b"\x08\x00":
        return ""
    head = 14 + 4 * (frame[14] & 15)
    protocol = frame[23]
    if protocol not in (6, 17):
        return ""
    ports = set(struct.unpack(">HH", frame[head : head + 4]))
    if protocol == 6:
        return "channels (TCP)"
    if 5353 in ports:
        return "mDNS"
    if ports & {5350, 5351, 1900}:
        return "port mapping"
    return "peers' DHT" if port in ports else "mainline DHT"


def show(name: str, found: list[float]) -> None:
    values = sorted(1000 * each for each in found)
    middle, last = values[len(values) // 2], values[min(len(values) - 1, int(0.99 * len(values)))]
    print(f"{name:32} {middle:8.0f} {last:8.0f} {len(values):6}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Start-to-connected by each way of finding peers, and idle traffic.")
    parser.add_argument("--runs", type=int, default=20, help="newcomers for each way (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of idle traffic; 0: none (%(default)s)")
    parser.add_argument("--settle", type=float, default=30.0, help="seconds from connected to idle (%(default)s)")
    arguments = parser.parse_args()
    from hosts import Lab, missing

    if reason := missing():
        print(f"cannot measure here: {reason}", file=sys.stderr)
        return 1
    with Lab() as lab, tempfile.TemporaryDirectory() as directory:
        world = World(lab)
        with world.servers():
            print(f"load {os.getloadavg()[0]:.1f}\n\n{'start to connected':32} {'p50 ms':>8} {'p99 ms':>8} {'count':>6}")
            for name, (host, ways, newcomers) in paths(world).items():
                show(name, measure(host, world.member, arguments.runs, ways, newcomers))
            show("address book", book(world, arguments.runs, directory))
            if arguments.seconds:
                print(f"\n{'idle, a minute, both directions':32} {'packets':>8} {'bytes':>8}")
                for kind, (packets, size) in idle(world, arguments.settle, arguments.seconds).items():
                    print(f"{kind:32} {packets:8.1f} {size:8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
