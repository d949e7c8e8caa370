"""How fast programs on one LAN find each other by mDNS, and what an idle one costs: hosts of their own on a bridge.

Run it as root on Linux with iproute2: ``python bench/lan.py``. Every host is a network namespace with one process in it; no way
leads out of them. It ends by itself. All hosts share this machine's cores, so that with many of them the figures hold the time
that processes wait for one another; see the load that it tells.

Start-to-connected is from calling `pubsub` to the ``connected`` event:

- newcomer: the others have been there for a while; a fresh process, which loads mDNS only now, joins them.
- pairs: likewise, but each topic has two members: the newcomer looks for one host among all.
- at once: all call `pubsub` in the same moment; the time of each counts. Their libraries are loaded already.

Idle traffic is what crosses UDP port 5353 of one host that is connected, by a capture, in the first minute and later.
"""

import argparse
import contextlib
import json
import os
import secrets
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))

STEP_TIMEOUT = 60.0
SETTLE = 3.0
"""Seconds between the last host's joining and the first measurement: what they announced is over."""
NEIGHBOURS = 400
"""Linux keeps one table of neighbours' hardware addresses for all namespaces together, of 1024 entries: with more hosts than fit in there
packets would be lost for lack of room, as they never are between real ones. Permanent entries do not count."""


# -- the process on a host ------------------------------------------------------------------------------------------


def run_peer() -> None:
    """Obeys lines: ``join TOPIC``, ``leave``; tells when it is connected."""
    from solyd_swarm import pubsub

    tell(ready=True)
    swarm = None
    for line in iter(sys.stdin.readline, ""):
        command, _, topic = line.strip().partition(" ")
        if command == "join":
            begun = time.monotonic()
            swarm = pubsub(topic, dht=False)
            swarm.once("connected", lambda begun=begun: tell(connected=time.monotonic() - begun))
        elif swarm is not None:
            swarm.leave().result(STEP_TIMEOUT)
            swarm = None
            tell(left=True)
    if swarm is not None:
        swarm.leave().result(STEP_TIMEOUT)


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# -- the one that measures ------------------------------------------------------------------------------------------


class Peer:
    """The process on a host, as seen from here."""

    def __init__(self, host: Any) -> None:
        self._process = subprocess.Popen(
            ["nsenter", f"--net={host.namespace}", sys.executable, __file__, "--peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"SOLYD_SWARM_INTERFACES": "", "PYTHONPATH": str(ROOT)},
        )
        self._input = b""

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, key: str) -> Any:
        """The value of the next thing told that has this key."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + STEP_TIMEOUT
        while True:
            line, found, rest = self._input.partition(b"\n")
            if found:
                self._input = rest
                told = json.loads(line)
                if key in told:
                    return told[key]
            elif not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"nothing with {key!r} was told within {STEP_TIMEOUT:g} s")
            else:
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise RuntimeError(f"a process has ended while {key!r} was waited for, status {self._process.wait()}")
                self._input += data

    def hang_up(self) -> None:
        """It leaves and ends by that."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        assert self._process.stdout is not None
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def peers(hosts: Sequence[Any]) -> Iterator[list[Peer]]:
    """A process on each host, with the library loaded."""
    running: list[Peer] = []
    try:
        for host in hosts:
            running.append(Peer(host))
        for peer in running:
            peer.expect("ready")
        yield running
    finally:
        for peer in running:
            peer.hang_up()
        for peer in running:
            peer.wait()


def measure_newcomers(hosts: Sequence[Any], runs: int, *, pairs: bool) -> list[float]:
    """Seconds to connect, each time of a fresh process on the last host."""
    *old, last = hosts
    topic = new_topic()
    topics = [topic if not pairs or number == 0 else f"{topic} {(number + 1) // 2}" for number in range(len(old))]
    found = []
    with peers(old) as members:
        for member, name in zip(members, topics, strict=True):
            member.say(f"join {name}")
        for member, name in zip(members, topics, strict=True):
            if topics.count(name) > 1:
                member.expect("connected")
        time.sleep(SETTLE)
        for _ in range(runs):
            with peers([last]) as (newcomer,):
                newcomer.say(f"join {topic}")
                found.append(newcomer.expect("connected"))
    return found


def measure_at_once(hosts: Sequence[Any], runs: int) -> list[float]:
    """Seconds to connect, of every host and run."""
    found = []
    with peers(hosts) as members:
        for run in range(runs + 1):
            topic = new_topic()
            for member in members:
                member.say(f"join {topic}")
            times = [member.expect("connected") for member in members]
            found += times if run else []  # in the first run they load what they need
            for member in members:
                member.say("leave")
            for member in members:
                member.expect("left")
    return found


def measure_idle(hosts: Sequence[Any], seconds: float) -> list[dict[str, float]]:
    """Packets and bytes (from the IP header on) a minute, which the first host sends and hears: in the first stretch, and in a second."""
    topic = new_topic()
    with peers(hosts) as members:
        for member in members:
            member.say(f"join {topic}")
        for member in members:
            member.expect("connected")
        return [capture_idle(hosts[0], seconds) for _ in range(2)]


def capture_idle(host: Any, seconds: float) -> dict[str, float]:
    (link,) = json.loads(host.run("ip", "-j", "link", "show", "dev", "eth0"))
    own = bytes.fromhex(link["address"].replace(":", ""))
    with host.capture("eth0") as frames:
        time.sleep(seconds)
    mdns = [frame for _, frame in frames if is_mdns(frame)]
    sent = [frame for frame in mdns if frame[6:12] == own]
    factor = 60 / seconds
    return {
        "sent_packets": len(sent) * factor,
        "sent_bytes": sum(len(frame) - 14 for frame in sent) * factor,
        "heard_packets": (len(mdns) - len(sent)) * factor,
        "heard_bytes": sum(len(frame) - 14 for frame in mdns if frame[6:12] != own) * factor,
    }


def is_mdns(frame: bytes) -> bool:
    """UDP to port 5353, over IPv4 or IPv6."""
    kind, at = frame[12:14], 14
    if kind == b"\x08\x00":
        return frame[at + 9] == 17 and frame[at + (frame[at] & 15) * 4 + 2 :][:2] == b"\x14\xe9"
    return kind == b"\x86\xdd" and frame[at + 6] == 17 and frame[at + 42 :][:2] == b"\x14\xe9"


def new_topic() -> str:
    return f"bench-{secrets.token_hex(8)}"


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered) * 1000, 1),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1000, 1),
        "max": round(ordered[-1] * 1000, 1),
    }


def plug_all(lab: Any, count: int, family: str) -> list[Any]:
    bridge = lab.bridge()
    hosts = [lab.host() for _ in range(count)]
    for number, host in enumerate(hosts, 1):
        four, six = f"10.0.{number // 250}.{number % 250 + 1}/16", f"fd00::{number:x}/64"
        host.plug(bridge, *{"4": [four], "6": [six], "46": [four, six]}[family])
    if "6" in family:
        time.sleep(2.5)  # link-local addresses are looked for on the link before they are used
    if count * count > NEIGHBOURS:
        introduce(hosts)
    return hosts


def introduce(hosts: Sequence[Any]) -> None:
    """Tells each host the hardware addresses of all others."""
    lines = []
    for host in hosts:
        (link,) = json.loads(host.run("ip", "-j", "address", "show", "dev", "eth0"))
        lines += [f"neigh replace {info['local']} lladdr {link['address']} dev eth0 nud permanent" for info in link["addr_info"]]
    for host in hosts:
        host.ip(*lines)


def measure(counts: Sequence[int], runs: int, idle: float, idle_counts: Sequence[int], family: str) -> Iterator[dict[str, Any]]:
    from hosts import Lab

    for count in counts:
        with Lab() as lab:
            hosts = plug_all(lab, count, family)
            for name in ("newcomer", "pairs", "at once"):
                if name == "pairs" and count < 4:
                    continue
                before = os.getloadavg()[0]
                times = measure_at_once(hosts, runs) if name == "at once" else measure_newcomers(hosts, runs, pairs=name == "pairs")
                yield {"hosts": count, "what": name, "load": [round(before, 2), round(os.getloadavg()[0], 2)], **spread(times)}
    for count in idle_counts if idle else ():
        with Lab() as lab:
            for name, figures in zip(("first", "later"), measure_idle(plug_all(lab, count, family), idle), strict=True):
                yield {"hosts": count, "what": f"idle, {name} {idle:.0f} s", **{key: round(value, 1) for key, value in figures.items()}}


def show(row: dict[str, Any]) -> None:
    head = f"{row['hosts']:5}  {row['what']:18}"
    if "p50" in row:
        times = "  ".join(f"{name} {row[name]:7.1f} ms" for name in ("p50", "p99", "max"))
        print(f"{head} {times}  of {row['count']:4}  load {row['load'][0]} -> {row['load'][1]}", flush=True)
    else:
        sent, heard = (f"{row[f'{way}_packets']:6.1f} packets {row[f'{way}_bytes']:8.0f} bytes" for way in ("sent", "heard"))
        print(f"{head} a minute: sends {sent}; hears {heard}", flush=True)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give 1 or more")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=positive, nargs="*", default=[2, 20, 50], help="so many hosts on the bridge (default: 2 20 50)")
    parser.add_argument("--runs", type=positive, default=20, help="of each measurement (default: %(default)s)")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of each of the two stretches of idling; 0: none (default: 60)")
    parser.add_argument("--idle-hosts", type=positive, nargs="*", default=[2, 20], help="so many hosts idle (default: 2 20)")
    parser.add_argument("--family", choices=("4", "6", "46"), default="4", help="IP versions of the hosts (default: 4)")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        run_peer()
        return
    from hosts import missing

    if reason := missing():
        raise SystemExit(reason)
    rows = []
    for row in measure(args.hosts, args.runs, args.idle, args.idle_hosts, args.family):
        rows.append(row)
        if not args.json:
            show(row)
    if args.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), "rows": rows}))


if __name__ == "__main__":
    main()
