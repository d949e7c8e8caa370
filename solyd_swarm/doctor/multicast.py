"""Whether multicast DNS gets through, both ways, on each interface: asked of everybody, as any mDNS client does (RFC 6762).

The question is for ``_services._dns-sd._udp.local``, which any responder with a service answers (RFC 6763, section 9), and for our
own service type. Our own packet comes back too where the system hands it to listeners at all. Packets of ours are told from those of
others by the case of the letters in the name, which is random, and means nothing (RFC 1035, section 2.3.3).
"""

import asyncio
import contextlib
import errno
import random
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from zeroconf import DNSIncoming, DNSOutgoing, DNSPointer, DNSQuestion  # type: ignore[attr-defined]  # not in __all__
from zeroconf.const import _CLASS_IN, _FLAGS_QR_QUERY, _TYPE_PTR

from solyd_swarm.discovery.interfaces import LocalAddress
from solyd_swarm.discovery.mdns_link import GROUP_V4, GROUP_V6, MAX_SOCKETS, PORT
from solyd_swarm.discovery.mdns_service import SERVICE_TYPE
from solyd_swarm.doctor.findings import Finding, counted
from solyd_swarm.doctor.machine import confinement
from solyd_swarm.doctor.patient import Examination

ANY_SERVICE = "_services._dns-sd._udp.local."

ASK_AT = (0.0, 1.0, 3.0)
"""Seconds at which is asked: packets get lost, and answers may be held back for a second (RFC 6762, section 6)."""

LISTEN = 4.0
"""Seconds of listening, at most."""

MAX_HEARD = 1024
"""Hosts told apart on one interface: bounds somebody who makes them up. Further ones are not counted."""

MAX_PACKET = 9000
"""Bytes (RFC 6762, section 17)."""

_MULTICAST_ALL = {socket.AF_INET: (socket.IPPROTO_IP, 49), socket.AF_INET6: (socket.IPPROTO_IPV6, 29)}
"""Linux: IP_MULTICAST_ALL, IPV6_MULTICAST_ALL. Switched off, a socket hears the groups that it joined itself, where it did."""


@dataclass(eq=False)
class Probe:
    """One interface and family, asked on.

    Attributes:
        error: why nothing could be sent there.
        looped: whether what we sent came back to us.
        heard: other hosts that sent anything; answered: those that answered; swarms: those that run a program of this library.
    """

    address: LocalAddress
    own: frozenset[str]
    error: OSError | None = None
    in_use: bool = False
    sent: int = 0
    looped: bool = False
    heard: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    swarms: set[str] = field(default_factory=set)
    _socket: socket.socket | None = None
    _asked: set[bytes] = field(default_factory=set)

    @property
    def where(self) -> str:
        return f"{self.address.interface} (IPv{self.address.ip.version})"

    async def run(self, seconds: float) -> None:
        """Asks, and listens for so long."""
        loop = asyncio.get_running_loop()
        try:
            self._socket = self._open()
        except OSError as error:
            self.error, self.in_use = error, error.errno == errno.EADDRINUSE
            return
        descriptor = self._socket.fileno()
        end = loop.time() + seconds
        begun = loop.time()
        loop.add_reader(descriptor, self._read)
        try:
            for at in ASK_AT:
                if begun + at > end:
                    break
                await asyncio.sleep(begun + at - loop.time())
                self._ask()
            await asyncio.sleep(max(0.0, end - loop.time()))
        finally:
            loop.remove_reader(descriptor)
            self._socket.close()

    def _open(self) -> socket.socket:
        """Bound to the group, so that no unicast meant for another program on the port comes to us."""
        ip, index = self.address.ip, self.address.index
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        opened = socket.socket(family, socket.SOCK_DGRAM)
        try:
            opened.setblocking(False)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if sys.platform.startswith("linux"):
                opened.setsockopt(*_MULTICAST_ALL[family], 0)
            if ip.version == 4:
                opened.bind((GROUP_V4, PORT))
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP_V4) + ip.packed)
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ip.packed)
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
            else:
                number = struct.pack("@I", index)
                opened.bind((GROUP_V6, PORT, 0, index))
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, GROUP_V6) + number)
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, number)
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        except OSError:
            opened.close()
            raise
        return opened

    def _ask(self) -> None:
        assert self._socket is not None
        packet = question()
        self._asked.add(packet)
        group = (GROUP_V4, PORT) if self.address.ip.version == 4 else (GROUP_V6, PORT, 0, self.address.index)
        try:
            self._socket.sendto(packet, group)
            self.sent += 1
        except OSError as error:
            self.error = error

    def _read(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(OSError):  # nothing there after all, or an error that belongs to what was sent
            data, sender = self._socket.recvfrom(MAX_PACKET)
            self.hear(data, sender)

    def hear(self, data: bytes, sender: tuple[Any, ...]) -> None:
        """A packet came in from a socket address."""
        host = str(sender[0])
        literal = host.partition("%")[0]
        if literal in self.own:
            self.looped |= data in self._asked
            return
        if not self._is_near(literal, sender) or (host not in self.heard and len(self.heard) >= MAX_HEARD):
            return
        self.heard.add(host)
        packet = DNSIncoming(data)
        if not (packet.valid and packet.is_response()):
            return
        self.answered.add(host)
        pointers = [record for record in packet.answers() if isinstance(record, DNSPointer)]
        if any(SERVICE_TYPE in (pointer.name.lower(), pointer.alias.lower()) for pointer in pointers):
            self.swarms.add(host)

    def _is_near(self, literal: str, sender: tuple[Any, ...]) -> bool:
        """Whether it comes from this link; macOS hands us what others' groups get on other interfaces, too."""
        ip = ip_address(literal)
        if ip.version == 6:
            return (ip.is_link_local and sender[3] == self.address.index) or ip in self.address.network
        return ip in self.address.network


def question() -> bytes:
    """A multicast DNS question, unlike any other in its letters' case."""
    out = DNSOutgoing(_FLAGS_QR_QUERY)
    name = "".join(random.choice((letter.lower(), letter.upper())) for letter in ANY_SERVICE)
    for each in (name, SERVICE_TYPE):
        out.add_question(DNSQuestion(each, _TYPE_PTR, _CLASS_IN))
    return out.packets()[0]


async def check_multicast(examination: Examination) -> Sequence[Finding]:
    """Asks on all interfaces that may be used; a finding for each."""
    if not examination.node.options.mdns:
        return []
    outward = examination.outward()
    local = examination.local()
    # Packets on loopback prove nothing of any network; where there is nothing else, they are all there is to try.
    chosen: dict[tuple[str, int], LocalAddress] = {}
    for address in sorted(outward or local, key=lambda address: not address.ip.is_link_local):
        if not (address.ip.is_loopback and address.ip.version == 6):
            chosen.setdefault((address.interface, address.ip.version), address)
    own = frozenset(str(address.ip) for address in local)
    ordered = sorted(chosen.values(), key=lambda address: (address.index, address.ip.version))
    probes = [Probe(address, own) for address in ordered[:MAX_SOCKETS]]
    await asyncio.gather(*(probe.run(min(examination.seconds, LISTEN)) for probe in probes))
    someone = any(probe.answered for probe in probes)
    return [_finding(probe, somebody_answers=someone, counts=bool(outward) or examination.limited) for probe in probes]


ALONE = (
    "If there is somebody who runs this library on this network and is not found: wireless access points and guest networks often keep"
    " their clients apart ('client isolation', 'AP isolation'), and switches may filter multicast ('IGMP snooping'). Switch that off,"
    " or give one of the two the other's ticket or address (--bootstrap, bootstrap=)."
)
BLOCKED = (
    "Let this machine's firewall pass UDP port 5353 in and out (ufw allow 5353/udp; firewall-cmd --add-service=mdns), or use bootstrap"
    " addresses."
)
NO_WAY = (
    "Use another network interface (--interfaces), switch multicast on for this one (ip link set DEV multicast on), or use bootstrap"
    " addresses."
)
CONFINED = {
    "container": "Run the container in its host's network (--network host), or publish its port (--publish, --listen) and use"
    " bootstrap addresses.",
    "wsl": "Set networkingMode=mirrored in .wslconfig, or use bootstrap addresses.",
}
MACOS = "Let the terminal find devices on local networks: System Settings, Privacy & Security, Local Network."
HELD = (
    "Let the mDNS responder that holds UDP port 5353 share it (avahi: disallow-other-stacks=no), or switch mDNS off (--no-mdns) and use"
    " bootstrap addresses."
)


def _finding(probe: Probe, *, somebody_answers: bool, counts: bool) -> Finding:
    figures = {
        "interface": probe.address.interface,
        "family": probe.address.ip.version,
        "sent": probe.sent,
        "looped": probe.looped,
        "heard": len(probe.heard),
        "answered": len(probe.answered),
        "swarms": len(probe.swarms),
    }
    works, says, advice = _judge(probe)
    if somebody_answers and works is not True:
        advice = ""  # there is an interface that serves: no need to repair this one too
    return Finding("multicast", works, f"Multicast on {probe.where} {says}", advice, figures, way="mdns" if counts else "")


def _judge(probe: Probe) -> tuple[bool | None, str, str]:
    if probe.answered:
        swarms = f" ({len(probe.swarms)} of them with this library)" if probe.swarms else ""
        return True, f"works both ways: {counted(len(probe.answered), 'other host')} answered{swarms}.", ""
    if probe.in_use:
        return False, "cannot be tried: another program holds UDP port 5353 and does not share it.", HELD
    if not probe.sent:
        reason = probe.error.strerror if probe.error is not None else "nothing was sent"
        if probe.error is not None and probe.error.errno in (errno.EPERM, errno.EACCES):
            return False, f"does not leave this machine ({reason}): its firewall does not let it out.", BLOCKED
        return False, f"cannot be sent: {reason}.", MACOS if sys.platform == "darwin" else NO_WAY
    if probe.heard:
        others = counted(len(probe.heard), "other host")
        return None, f"comes in from {others}, but nobody answered what was sent: perhaps it got lost.", ALONE
    if not probe.looped:
        return False, "is sent, but does not even come back to this machine: something keeps it from coming in.", BLOCKED
    if probe.address.ip.is_loopback:
        return True, "works: programs on this machine can find one another.", ""
    return None, "is sent and comes back to this machine, but no other host answered.", CONFINED.get(confinement(), ALONE)
