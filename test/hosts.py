"""Hosts of our own on networks of our own: Linux network namespaces, joined by bridges and routers. No way leads out of them.

    with Lab() as lab:
        lan = lab.bridge()
        one, two = lab.host(), lab.host()
        one.plug(lan, "10.0.0.1/24")
        two.plug(lan, "10.0.0.2/24").shape("delay 20ms")
        with one.script("...") as program:
            program.expect("hello")

Needs root, iproute2 and nsenter; `require` says what is missing by skipping the test. NAT needs nftables besides.
"""

import contextlib
import functools
import itertools
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from textwrap import dedent
from types import TracebackType
from typing import Self

import pytest
from processes import Process

NETNS = Path("/run/netns")
MTU_HEADROOM = 65_536
_FRAME = struct.Struct(">dI")

_numbers = itertools.count(1)


@functools.cache
def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    name = f"solyd-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", name)
    except RuntimeError as error:
        return f"no network namespace can be made: {error}"
    _run("ip", "netns", "del", name)
    return ""


def require(*tools: str) -> None:
    """Skips the test unless hosts can be made here, and these programs are installed."""
    if reason := missing():
        pytest.skip(reason)
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} {text!r}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _forwards(switch: str, port: str) -> bool:
    return "state forwarding" in _run("ip", "-n", switch, "-o", "-d", "link", "show", "dev", port)


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(0.01)


@dataclass(eq=False)
class Bridge:
    """A switch, to which hosts are plugged."""

    name: str


@dataclass(eq=False)
class Interface:
    """One end of a cable: an interface of a host, plugged into a bridge."""

    host: "Host"
    name: str
    switch: str
    """Namespace of the bridge."""
    port: str
    """Name of the cable's other end, there."""

    def add(self, address: str) -> Self:
        """An address with its prefix length, ready for use at once."""
        flags = " nodad" if ip_interface(address).version == 6 else ""
        self.host.ip(f"address add {address} dev {self.name}{flags}")
        return self

    def remove(self, address: str) -> Self:
        self.host.ip(f"address del {address} dev {self.name}")
        return self

    def shape(self, netem: str) -> Self:
        """``tc netem`` for what the host sends by it, e.g. ``"delay 20ms 5ms loss 1%"``."""
        self.host.run("tc", "qdisc", "replace", "dev", self.name, "root", "netem", *netem.split())
        return self

    def pull(self) -> Self:
        """Pulls the cable at the switch: the host sees no carrier, and keeps its addresses."""
        _run("ip", "-n", self.switch, "link", "set", self.port, "down")
        return self

    def put_back(self) -> Self:
        _run("ip", "-n", self.switch, "link", "set", self.port, "up")
        return self.wait_for_carrier()

    def wait_for_carrier(self) -> Self:
        """Returns once both ends pass frames: the kernel sees to that in its own time, seconds where others make networks too."""

        def passes() -> bool:
            return "state UP" in self.host.run("ip", "-o", "link", "show", "dev", self.name) and _forwards(self.switch, self.port)

        _wait_until(passes, f"no carrier at {self.name} of {self.host.name}")
        return self

    def unplug(self) -> None:
        """The interface vanishes, with its addresses and routes."""
        self.host.ip(f"link del {self.name}")


@dataclass(eq=False)
class Host:
    """A namespace: interfaces, routes and programs of its own. Loopback is up."""

    lab: "Lab"
    name: str
    interfaces: list[Interface] = field(default_factory=list)

    @property
    def namespace(self) -> Path:
        return NETNS / self.name

    def ip(self, *lines: str) -> None:
        """Commands of ``ip``, a line each."""
        _run("ip", "-n", self.name, "-batch", "-", text="".join(f"{line}\n" for line in lines))

    def run(self, *command: str, text: str = "") -> str:
        """Runs a program here to its end; what it printed. Raises `RuntimeError` if it failed."""
        return _run("nsenter", f"--net={self.namespace}", *command, text=text)

    def sysctl(self, name: str, value: object) -> None:
        self.run("sh", "-c", f"echo {value} > /proc/sys/{name.replace('.', '/')}")

    def plug(self, bridge: Bridge, *addresses: str, gateway: str = "") -> Interface:
        """A new interface on a bridge, up, with these addresses; with IPv6 addresses also a link-local one."""
        name = f"eth{len(self.interfaces)}"
        port = f"p{next(_numbers)}"
        switch = self.lab.switch
        six = any(":" in address for address in addresses)
        _run("ip", "link", "add", name, "netns", self.name, "type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "-n", switch, "-batch", "-", text=f"link set {port} master {bridge.name}\nlink set {port} up\n")
        if not six:
            self.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 1)
        self.ip(f"link set {name} up")
        interface = Interface(self, name, switch, port)
        self.interfaces.append(interface)
        for address in addresses:
            interface.add(address)
        interface.wait_for_carrier()
        if gateway:
            self.route("default", gateway)
        return interface

    def route(self, to: str, gateway: str) -> None:
        self.ip(f"{'-6 ' if ':' in gateway else ''}route replace {to} via {gateway}")

    def nft(self, rules: str) -> None:
        """Adds nftables rules, as a file would."""
        self.run("nft", "-f", "-", text=dedent(rules))

    def drop(self, what: str, *, hook: str = "input") -> None:
        """Drops what matches an nftables expression (``"udp dport 5353"``), without a word to the sender."""
        self.nft(
            f"""
            add table inet lab_{hook}
            add chain inet lab_{hook} drops {{ type filter hook {hook} priority 0; }}
            add rule inet lab_{hook} drops {what} drop
            """
        )

    def forget_drops(self, *, hook: str = "input") -> None:
        self.nft(f"delete table inet lab_{hook}")

    def masquerade(self, inside: Interface, outside: Interface, *, random: bool = False) -> None:
        """Makes it a home router: hosts inside go out under its outside address, nobody comes in unasked, and strangers get no answer.

        Args:
            random: every flow gets a port of its own choosing, instead of the one it came from where that is free.
        """
        self.forward()
        self.nft(
            f"""
            table ip lab_nat {{
                chain out {{ type nat hook postrouting priority 100;
                    oifname "{outside.name}" masquerade{" random" if random else ""}; }}
            }}
            table inet lab_firewall {{
                chain through {{ type filter hook forward priority 0; policy drop;
                    iifname "{inside.name}" accept
                    ct state established,related accept
                    ct status dnat accept; }}
                chain mine {{ type filter hook input priority 0; policy accept;
                    iifname "{outside.name}" ct state established,related accept
                    iifname "{outside.name}" ip protocol icmp accept
                    iifname "{outside.name}" drop; }}
            }}
            """
        )

    def forward(self) -> None:
        """Makes it a router."""
        self.sysctl("net.ipv4.ip_forward", 1)
        self.sysctl("net.ipv6.conf.all.forwarding", 1)

    def process(self, arguments: list[str], **environment: str) -> Process:
        """A program here, by `processes.Process`. Discovery uses all interfaces, unless told otherwise."""
        return Process(["nsenter", f"--net={self.namespace}", *arguments], **{"SOLYD_SWARM_INTERFACES": "", **environment})

    def script(self, text: str, **environment: str) -> Process:
        """A Python script here."""
        return self.process([sys.executable, "-u", "-c", dedent(text)], **environment)

    @contextlib.contextmanager
    def capture(self, interface: str = "any") -> Iterator[list[tuple[float, bytes]]]:
        """Records every frame that crosses the host's interfaces: (Unix time, bytes from the Ethernet header on), complete at the end."""
        frames: list[tuple[float, bytes]] = []
        with subprocess.Popen(
            ["nsenter", f"--net={self.namespace}", sys.executable, __file__, interface], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.read(1) == b"!"  # it listens
            try:
                yield frames
            finally:
                process.stdin.close()  # it ends by that
                recorded = process.stdout.read()
        at = 0
        while at < len(recorded):
            when, size = _FRAME.unpack_from(recorded, at)
            at += _FRAME.size + size
            frames.append((when, recorded[at - size : at]))


class Lab:
    """All hosts and bridges of a test. Ending it ends them; programs in them must have ended before."""

    def __init__(self) -> None:
        self._prefix = f"solyd-{os.getpid()}-{next(_numbers)}"
        self.switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []
        self._bridges = 0

    def __enter__(self) -> Self:
        self._add(self.switch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in reversed(self._namespaces):
            _run("ip", "netns", "del", name)
        self._namespaces.clear()

    def _add(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def host(self) -> Host:
        """A host without a cable."""
        name = f"{self._prefix}-{len(self._namespaces)}"
        self._add(name)
        return Host(self, name)

    def bridge(self) -> Bridge:
        """A switch without hosts. It floods multicast, as switches without a querier do."""
        self._bridges += 1
        name = f"br{self._bridges}"
        _run("ip", "-n", self.switch, "link", "add", name, "type", "bridge", "mcast_snooping", "0")
        _run("ip", "-n", self.switch, "link", "set", name, "up")
        return Bridge(name)

    def join(self, one: Bridge, other: Bridge) -> None:
        """A cable between two switches. Returns once it passes frames."""
        ends = [f"t{next(_numbers)}", f"t{next(_numbers)}"]
        _run("ip", "-n", self.switch, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, bridge in zip(ends, (one, other), strict=True):
            _run("ip", "-n", self.switch, "-batch", "-", text=f"link set {end} master {bridge.name}\nlink set {end} up\n")
        _wait_until(lambda: all(_forwards(self.switch, end) for end in ends), f"no carrier between {one.name} and {other.name}")

    def lan(self, count: int, network: str = "10.0.0.{}/24") -> list[Host]:
        """So many hosts on a new bridge, with the addresses 1, 2 ... of a network."""
        bridge = self.bridge()
        hosts = [self.host() for _ in range(count)]
        for number, host in enumerate(hosts, 1):
            host.plug(bridge, network.format(number))
        return hosts


def _record(interface: str) -> None:
    """Runs in a host: writes the frames that its interfaces see, until standard input ends."""
    import select
    import time

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as tap:  # type: ignore[attr-defined]  # Linux
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024 * 1024)
        if interface != "any":
            tap.bind((interface, 0))
        output = sys.stdout.buffer
        output.write(b"!")
        output.flush()
        while True:
            ready, _, _ = select.select([tap, sys.stdin], [], [])
            if tap in ready:
                frame, _ = tap.recvfrom(MTU_HEADROOM)
                output.write(_FRAME.pack(time.time(), len(frame)) + frame)
            elif sys.stdin in ready:
                break
        output.flush()


if __name__ == "__main__":
    _record(sys.argv[1])
