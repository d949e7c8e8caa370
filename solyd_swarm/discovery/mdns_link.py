"""zeroconf on chosen interfaces, with a gate before each socket: what `MdnsSource` stands on.

zeroconf sends on one socket per interface, each tied to it by ``IP_MULTICAST_IF``, and hears on one socket bound to the
wildcard address. The latter hears more than was asked for: Linux hands it groups that *any* process joined, on any
interface, and anybody may send unicast to it. The gate drops what does not come from an allowed link (RFC 6762, section
11), so that nothing else is believed or answered, and notes the sender, which zeroconf does not pass on.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
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
from zeroconf.asyncio import AsyncZeroconf
from zeroconf.const import _CLASS_IN, _FLAGS_QR_QUERY, _TYPE_PTR

from solyd_swarm.discovery.interfaces import LocalAddress
from solyd_swarm.errors import DiscoveryError

GROUP_V4, GROUP_V6, PORT = "224.0.0.251", "ff02::fb", 5353
MAX_SOCKETS = 32
"""Interfaces (times address families) used at once; a machine full of containers can have hundreds."""

MAX_KNOWN_ANSWERS = 64
"""Known answers in one question (RFC 6762, section 7.1): more would need several packets; the rest just answers again."""

START_TIMEOUT = 2.0
GOODBYE_TIMEOUT = 0.35
"""Seconds; zeroconf says goodbye three times, 0.125 s apart."""

log = logging.getLogger("solyd_swarm.discovery.mdns")


class Link(RecordUpdateListener):
    """One running zeroconf. Made by `open`; ends with `close`.

    Attributes:
        local: the addresses it was opened with.
        sender: IP literal of whoever sent the packet that is being read; ``None`` between packets.
        zeroconf: the running instance, for its cache.
    """

    def __init__(self, local: Sequence[LocalAddress], changed: Callable[[list[RecordUpdate]], None]) -> None:
        self.local = list(local)
        self.sender: str | None = None
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
        choices = multicast_choices(self.local)
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
            reader.transport.set_protocol(_Gate(cast(asyncio.DatagramProtocol, reader.transport.get_protocol()), self))
        # What came before the gates stood is forgotten; whoever sent it is asked at once.
        cache = self.zeroconf.cache
        cache.async_remove_records([record for name in cache.names() for record in cache.async_entries_with_name(name)])
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
        await (await self._async_zeroconf.async_register_service(info, cooperating_responders=True))

    def announce_again(self, info: ServiceInfo) -> None:
        """Announce a registered service once more, now."""
        if self.is_announced(info):
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
        self.zeroconf.async_send(out)

    def is_allowed(self, sender: str, zone: int) -> bool:
        """Whether a packet's sender is on one of the links that may be used."""
        ip = ip_address(sender)
        if isinstance(ip, IPv6Address) and ip.is_link_local:
            return zone in self._zones
        return any(ip in network for network in self._networks)

    def failed(self, error: Exception) -> None:
        """A socket failed to send or receive: the network is gone or changes. Told once; the next `refresh` looks again."""
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

    def __init__(self, behind: asyncio.DatagramProtocol, link: Link) -> None:
        self._behind = behind
        self._link = link

    def datagram_received(self, data: bytes, addr: tuple[str, int] | tuple[str, int, int, int]) -> None:
        # The wildcard socket is an IPv6 one where IPv6 works, and shows IPv4 senders as ::ffff:192.0.2.7.
        sender = addr[0].removeprefix("::ffff:") if "." in addr[0] else addr[0]
        if not self._link.is_allowed(sender, addr[3] if len(addr) == 4 else 0):
            log.debug("a packet from %s is not from a link that may be used", sender)
            return
        self._link.sender = sender
        try:
            self._behind.datagram_received(data, addr)
        finally:
            self._link.sender = None

    def error_received(self, exc: Exception) -> None:
        self._link.failed(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self._behind.connection_lost(exc)


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
