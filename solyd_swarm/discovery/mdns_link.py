"""zeroconf on chosen interfaces, with a gate before each socket: what `MdnsSource` stands on.

zeroconf sends on one socket per interface, each tied to it by ``IP_MULTICAST_IF``, and hears on one socket bound to the
wildcard address. The latter hears more than was asked for: Linux hands it groups that *any* process joined, on any
interface, and anybody may send unicast to it. The gate drops what does not come from an allowed link (RFC 6762, section
11), so that nothing else is believed or answered, and notes the sender, which zeroconf does not pass on. It also sees
whether our own packets come back, as the system lets them: where they do not, those of others will not come either.
"""

import asyncio
import logging
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from typing import cast

from zeroconf import (  # type: ignore[attr-defined]  # the DNS classes are offered, though not in __all__
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    Error,
    IPVersion,
    NotRunningException,
    RecordUpdate,
    RecordUpdateListener,
    ServiceInfo,
    Zeroconf,
    current_time_millis,
)
from zeroconf._listener import AsyncListener
from zeroconf.asyncio import AsyncZeroconf
from zeroconf.const import _CLASS_IN, _FLAGS_QR_QUERY, _TYPE_PTR

from solyd_swarm.discovery.interfaces import LocalAddress, zone_name
from solyd_swarm.errors import DiscoveryError

GROUP_V4, GROUP_V6, PORT = "224.0.0.251", "ff02::fb", 5353
MAX_SOCKETS = 32
"""Interfaces (times address families) used at once; a machine full of containers can have hundreds."""

MAX_KNOWN_ANSWERS = 64
"""Known answers in one question (RFC 6762, section 7.1): more would need several packets; the rest just answers again."""

MAX_PACKET = 8966
"""Bytes of a packet (RFC 6762, section 17)."""

_HEADER = struct.Struct("!6H")  # id, flags, and how many questions, answers, authorities, additional records

START_TIMEOUT = 2.0
GOODBYE_TIMEOUT = 0.35
"""Seconds; zeroconf says goodbye three times, 0.125 s apart."""

ECHO_TIMEOUT = 2.0
"""Seconds within which our own packets come back, also on a loaded machine."""

log = logging.getLogger("solyd_swarm.discovery.mdns")

Way = tuple[str, int]
"""An interface's name and an IP version: what one socket sends by."""


class Link(RecordUpdateListener):
    """One running zeroconf. Made by `open`; ends with `close`.

    Attributes:
        local: the addresses it was opened with.
        choices: those of them, or their interfaces, that multicast works on: see `multicast_choices`.
        refused: counts the packets that were refused.
        problem: why sending fails now; empty if it does not.
        sender: IP literal of whoever sent the packet that is being read; ``None`` between packets.
        zeroconf: the running instance, for its cache.
    """

    def __init__(self, local: Sequence[LocalAddress], changed: Callable[[list[RecordUpdate]], None], refused: Counter[str]) -> None:
        self.local = list(local)
        self.choices: list[str | int] = []
        self.refused = refused
        self.problem = ""
        self.sender: str | None = None
        self._own: dict[str, list[Way]] = {}
        for address in local:
            self._own.setdefault(str(address.ip), []).append((address.interface, address.ip.version))
        self._ways: set[Way] = set()
        self._unanswered: dict[Way, float] = {}  # since when nothing of ours has come back there
        self._changed = changed
        self._updates: list[RecordUpdate] = []
        # A DHCPv6 address comes as a /128 of its own; its link is the /64.
        self._networks = [
            ip_network((address.ip, min(address.prefix, 64)), strict=False) if address.ip.version == 6 else address.network
            for address in local
            if address.ip.version == 4 or not (address.ip.is_link_local or address.ip.is_loopback)
        ]
        self._zones = {address.index for address in local if address.ip.version == 6}
        self._warned = False

    async def open(self) -> None:
        """Bind, join the groups, start listening. Raises `DiscoveryError`, holding nothing then."""
        choices = self.choices = multicast_choices(self.local)
        self._ways = {
            (address.interface, address.ip.version)
            for address in self.local
            if (str(address.ip) if address.ip.version == 4 else address.index) in choices
        }
        versions = {isinstance(choice, int) for choice in choices}
        version = IPVersion.All if len(versions) == 2 else IPVersion.V6Only if True in versions else IPVersion.V4Only
        try:
            self._async_zeroconf = AsyncZeroconf(interfaces=choices, ip_version=version)
        except (OSError, RuntimeError) as error:
            raise DiscoveryError(f"mDNS cannot start ({error}): check the network interfaces, or switch mdns off") from error
        self.zeroconf: Zeroconf = self._async_zeroconf.zeroconf
        # Cancelling the wait itself would break zeroconf's own close(), and leave its sockets open.
        starting = asyncio.ensure_future(self.zeroconf.async_wait_for_start(timeout=START_TIMEOUT))
        try:
            await asyncio.shield(starting)
        except NotRunningException as error:
            await self.close()
            raise DiscoveryError("mDNS did not start in time: check the network interfaces, or switch mdns off") from error
        except asyncio.CancelledError:
            await asyncio.wait([starting])
            await self.close()
            raise
        for reader in self.zeroconf.engine.readers:
            reader.transport.set_protocol(_Gate(cast(AsyncListener, reader.transport.get_protocol()), self))
        # What came before the gates stood is forgotten; whoever sent it is asked at once.
        self.forget(())
        self.zeroconf.async_add_listener(self, None)
        log.debug("mDNS runs on %s", choices)

    async def say_goodbye(self) -> None:
        """Withdraw whatever is still announced; about a quarter of a second, the first goodbye at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_TIMEOUT):
                await self._async_zeroconf.async_unregister_all_services()

    async def close(self) -> None:
        """Say goodbye, then close; below half a second. Closes also where the caller is cancelled meanwhile."""
        try:
            await self.say_goodbye()
        finally:
            if self in self.zeroconf.listeners:
                self.zeroconf.async_remove_listener(self)
            with suppress(Error, OSError):
                await self._async_zeroconf.async_close()

    async def announce(self, info: ServiceInfo) -> None:
        """Register a service and announce it: three times within half a second, the first at once."""
        self._sending()
        await (await self._async_zeroconf.async_register_service(info, cooperating_responders=True))

    def announce_again(self, info: ServiceInfo) -> None:
        """Announce a registered service once more, now."""
        if self.is_announced(info):
            self._sending()
            self.zeroconf.async_send(self.zeroconf.generate_service_broadcast(info, None))

    def is_announced(self, info: ServiceInfo) -> bool:
        return self.zeroconf.registry.async_get_info_name(info.key) is not None

    async def withdraw(self, info: ServiceInfo) -> None:
        """Unregister a service and say goodbye for it."""
        await (await self._async_zeroconf.async_unregister_service(info))

    def ask(self, service_type: str, known: Iterable[str]) -> None:
        """Ask who offers the type; of the ``known`` instances those whose record is fresh need not answer."""
        out = DNSOutgoing(_FLAGS_QR_QUERY)
        out.add_question(DNSQuestion(service_type, _TYPE_PTR, _CLASS_IN))
        now = current_time_millis()
        answers = 0
        for name in known:
            record = self.zeroconf.cache.get(DNSPointer(service_type, _TYPE_PTR, _CLASS_IN, 0, name, now))
            if record is not None and not record.is_stale(now):
                out.add_answer_at_time(record, now)
                answers += 1
                if answers == MAX_KNOWN_ANSWERS:
                    break
        self._sending()
        self.zeroconf.async_send(out)

    def forget(self, needed: Container[str]) -> None:
        """Empties zeroconf's cache, but for these names. Full of a flood it would evict what came last, since that expires first."""
        cache = self.zeroconf.cache
        cache.async_remove_records(
            [
                record
                for name in cache.names()
                for record in cache.async_entries_with_name(name)
                if name not in needed and not (isinstance(record, DNSPointer) and record.alias in needed)
            ]
        )

    def is_allowed(self, sender: str, zone: int) -> bool:
        """Whether a packet's sender is on one of the links that may be used."""
        ip = ip_address(sender)
        if isinstance(ip, IPv6Address) and ip.is_link_local:
            return zone in self._zones
        return any(ip in network for network in self._networks)

    def heard(self, sender: str, zone: int) -> None:
        """A packet has come from an allowed link: from ourselves, or from others."""
        ways = self._own.get(sender.partition("%")[0])
        if ways is not None:
            # The same link-local address may stand on several interfaces.
            for way in ways if zone == 0 or len(ways) == 1 else [way for way in ways if way[0] == zone_name(zone)]:
                self._unanswered.pop(way, None)
            self.problem = self.problem if self._unanswered else ""

    def _sending(self) -> None:
        now = time.monotonic()
        for way in self._ways:
            self._unanswered.setdefault(way, now)

    def silent(self) -> list[str]:
        """Interfaces on which nothing comes back of what we sent, not even by the system's own loop. From any thread."""
        now = time.monotonic()
        return sorted(f"{name} (IPv{version})" for (name, version), since in list(self._unanswered.items()) if now - since > ECHO_TIMEOUT)

    def failed(self, error: Exception) -> None:
        """A socket failed to send or receive: the network is gone or changes, or a firewall forbids it. Told once."""
        self.problem = str(error)
        log.log(logging.DEBUG if self._warned else logging.WARNING, "mDNS cannot reach the network now: %s", error)
        self._warned = True

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """zeroconf: these records change; the cache does not have them yet."""
        self._updates.extend(records)

    def async_update_records_complete(self) -> None:
        """zeroconf: now it has."""
        updates, self._updates = self._updates, []
        self._changed(updates)


class _Gate(asyncio.DatagramProtocol):
    """Stands between a socket and zeroconf."""

    def __init__(self, behind: AsyncListener, link: Link) -> None:
        self._behind = behind
        self._link = link
        # What came before is forgotten; the very same packet is to count when it comes again, as it does within the next half second.
        behind.data = behind.last_message = None
        getattr(behind, "_recent_packets", {}).clear()

    def datagram_received(self, data: bytes, addr: tuple[str, int] | tuple[str, int, int, int]) -> None:
        # The wildcard socket is an IPv6 one where IPv6 works, and shows IPv4 senders as ::ffff:192.0.2.7.
        sender, zone = addr[0].removeprefix("::ffff:") if "." in addr[0] else addr[0], addr[3] if len(addr) == 4 else 0
        if not self._link.is_allowed(sender, zone):
            log.debug("a packet from %s is not from a link that may be used", sender)
            self._link.refused["stranger"] += 1
            return
        self._link.heard(sender, zone)
        self._link.sender = sender
        before = self._behind.last_message
        try:
            whole = is_whole(data)
            if whole:
                self._behind.datagram_received(data, addr)
        finally:
            self._link.sender = None
        message = self._behind.last_message
        if not whole or (message is not before and message is not None and not message.valid):
            log.debug("refused a malformed packet of %d bytes from %s", len(data), sender)
            self._link.refused["packet"] += 1

    def error_received(self, exc: Exception) -> None:
        self._link.failed(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self._behind.connection_lost(exc)


def is_whole(data: bytes) -> bool:
    """Whether a packet holds what its header says (RFC 1035, section 4.1), all of it. What names and records mean is zeroconf's to see."""
    if not _HEADER.size <= len(data) <= MAX_PACKET:
        return False
    _, _, questions, *others = _HEADER.unpack_from(data)
    at = _HEADER.size
    try:
        for number in range(questions + sum(others)):
            while 0 < data[at] < 0xC0:
                at += 1 + data[at]
            at += 1 if data[at] == 0 else 2
            at += 4 if number < questions else 10 + int.from_bytes(data[at + 8 : at + 10], "big")
            if at > len(data):
                return False
    except IndexError:
        return False
    return True


def multicast_choices(local: Sequence[LocalAddress]) -> list[str | int]:
    """What zeroconf is to use of ``local``: an IPv4 literal or (IPv6) the index of each interface that can do multicast.

    Tried out beforehand, because zeroconf leaves sockets open where it fails half-way.

    Raises:
        DiscoveryError: the port cannot be bound, or none of the interfaces can do multicast.
    """
    _check_port()
    chosen: dict[tuple[str, int], str | int] = {}
    for address in sorted(local, key=lambda address: (not address.ip.is_loopback, address.ip.version)):
        # One address of each family reaches the whole link; on loopback IPv4 is enough.
        taken = (address.interface, 4 if address.ip.is_loopback else address.ip.version)
        if taken not in chosen and len(chosen) < MAX_SOCKETS and _can_multicast(address):
            chosen[taken] = str(address.ip) if address.ip.version == 4 else address.index
    if not chosen:
        hosts = ", ".join(address.host for address in local)
        raise DiscoveryError(f"no multicast on {hosts}: allow another interface, or switch mdns off and give bootstrap addresses")
    return list(chosen.values())


def _check_port() -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            _share(probe)
            probe.bind(("", PORT))
    except OSError as error:
        raise DiscoveryError(
            f"UDP port {PORT} cannot be bound ({error}): let the mDNS responder that holds it share it "
            "(avahi: disallow-other-stacks=no), or switch mdns off"
        ) from error


def _can_multicast(address: LocalAddress) -> bool:
    """Bind, join and look for a route, as zeroconf will; no packet is sent."""
    v4 = address.ip.version == 4
    try:
        with socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            _share(probe)
            if v4:
                probe.bind((str(address.ip), PORT))
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP_V4) + address.ip.packed)
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, address.ip.packed)
                probe.connect((GROUP_V4, PORT))
            else:
                index = struct.pack("@I", address.index)
                probe.bind((str(address.ip), PORT, 0, address.index if address.ip.is_link_local else 0))
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, GROUP_V6) + index)
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                probe.connect((GROUP_V6, PORT, 0, address.index))
    except OSError as error:
        log.debug("no multicast on %s: %s", address.host, error)
        return False
    return True


def _share(probe: socket.socket) -> None:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
