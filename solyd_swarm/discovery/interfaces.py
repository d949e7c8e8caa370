"""Which local addresses discovery may use: everything, or what the user named; and when they change.

The list comes from ``getifaddrs(3)`` by way of ``ifaddr``; nothing is cached, since networks come and go. Linux tells of that
(rtnetlink(7)); elsewhere `InterfaceWatch` looks every few seconds.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import groupby

import ifaddr

from solyd_swarm.errors import InterfaceError

SETTLE = 0.1
"""Seconds after a change in which others are waited for: an interface comes with several addresses."""

LOOK_INTERVAL = 5.0
"""Seconds between looks where the system does not tell; a look takes a fraction of a millisecond."""

_NETLINK_ROUTE = 0
_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NEWLINK, _DELLINK = 16, 17
_RUNNING = 0x40  # IFF_RUNNING: it is up and has a carrier
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, sender
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, kind, index, flags, which of them changed
_READ = 65536

log = logging.getLogger("solyd_swarm.discovery.interfaces")


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One address of one network interface of this machine.

    Attributes:
        interface: the interface's name, ``eth0``.
        index: the kernel's number of the interface; 0 where it is unknown.
        ip: the address, without a zone.
        prefix: how many leading bits are the network's.
    """

    interface: str
    index: int
    ip: IPv4Address | IPv6Address
    prefix: int

    @property
    def host(self) -> str:
        """The address as a literal; IPv6 link-local ones with their zone, ``fe80::1%eth0`` (RFC 4007, section 11)."""
        return f"{self.ip}%{self.interface}" if self.ip.version == 6 and self.ip.is_link_local else str(self.ip)

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The addresses that are on the same link."""
        return ip_network((self.ip, self.prefix), strict=False)


def local_addresses() -> list[LocalAddress]:
    """Every unicast address configured here, in the system's order. Raises `InterfaceError` if it cannot be asked."""
    try:
        adapters = list(ifaddr.get_adapters())
    except OSError as error:
        raise InterfaceError(f"the network interfaces of this machine cannot be listed ({error}): discovery needs one") from error
    found = []
    for adapter in adapters:
        for entry in adapter.ips:
            # ifaddr gives IPv6 addresses as (address, flow, scope); some systems write the zone into the address.
            literal = entry.ip[0] if isinstance(entry.ip, tuple) else entry.ip
            ip = ip_address(literal.partition("%")[0])
            if not ip.is_multicast and not ip.is_unspecified:
                found.append(LocalAddress(adapter.name, adapter.index or 0, ip, entry.network_prefix))
    return found


def zone_name(index: int) -> str:
    """The name of the interface that the kernel gives this number, as zones are written; the number where there is none (any more)."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)


def usable_interfaces(wanted: Sequence[str]) -> list[LocalAddress]:
    """The local addresses that discovery may use.

    Args:
        wanted: IP literals (IPv6 link-local ones with or without their zone) or names of interfaces, which stand for
            all addresses of the interface. Empty: all addresses of this machine, loopback included.

    Returns:
        At least one address, none twice; in the order of ``wanted``, else in the system's.

    Raises:
        InterfaceError: something named does not exist here (the text lists what does), or there is no address at all.
    """
    present = local_addresses()
    if not present:
        raise InterfaceError("this machine has no network address, not even loopback: bring an interface up (ip link set lo up)")
    if not wanted:
        return list(dict.fromkeys(present))
    chosen: dict[LocalAddress, None] = {}
    for name in wanted:
        matching = [address for address in present if _is_named(address, name)]
        if not matching:
            raise InterfaceError(f"there is no network interface or address {name!r} here; there are {_describe(present)}")
        chosen.update(dict.fromkeys(matching))
    return list(chosen)


def _is_named(address: LocalAddress, name: str) -> bool:
    if name == address.interface:
        return True
    literal, _, zone = name.partition("%")
    try:
        same = ip_address(literal) == address.ip
    except ValueError:
        return False
    return same and zone in ("", address.interface, str(address.index))


def _describe(present: Iterable[LocalAddress]) -> str:
    """``lo (127.0.0.1, ::1), eth0 (192.0.2.7)``."""
    by_name = sorted(present, key=lambda address: (address.index, address.interface))
    groups = groupby(by_name, key=lambda address: address.interface)
    return ", ".join(f"{name} ({', '.join(str(address.ip) for address in group)})" for name, group in groups)


class InterfaceWatch:
    """Tells when interfaces or their addresses have come, gone or changed. Runs on the loop from `start` to `close`.

    Args:
        changed: called with whether an interface has got its carrier: the cable is in, or the radio connected. That changes no
            address, but whoever is there has not heard us yet.
    """

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[int] = set()
        self._carrier = False
        self._seen: list[LocalAddress] = []
        self._differed = False

    def start(self) -> None:
        """Begins. What was there before is not told."""
        loop = asyncio.get_running_loop()
        try:
            self._socket = _open_netlink()
        except OSError as error:
            log.debug("the system does not tell of changes (%s): they are looked for every %g s", error, LOOK_INTERVAL)
            self._seen = _look()
            self._timer = loop.call_later(LOOK_INTERVAL, self._compare)
        else:
            loop.add_reader(self._socket.fileno(), self._read, self._socket)

    def close(self) -> None:
        """Ends. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _compare(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_INTERVAL, self._compare)
        seen, self._seen = self._seen, _look()
        differs = seen != self._seen
        # Also once more after a change: an IPv6 address is there before it can be used.
        if differs or self._differed:
            self._changed(False)
        self._differed = differs

    def _read(self, netlink: socket.socket) -> None:
        try:
            data, sender = netlink.recvfrom(_READ)
        except BlockingIOError:
            return
        except OSError as error:  # ENOBUFS: more came than fits; what it was does not matter
            log.debug("changes of the interfaces were missed: %s", error)
        else:
            if sender[0] != 0:  # not the kernel: any program here may write to us
                return
            for index, running in _read_links(data):
                self._carrier |= running and index not in self._running
                (self._running.add if running else self._running.discard)(index)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SETTLE, self._tell)

    def _tell(self) -> None:
        self._timer = None
        carrier, self._carrier = self._carrier, False
        self._changed(carrier)


def _open_netlink() -> socket.socket:
    family: int | None = getattr(socket, "AF_NETLINK", None)
    if family is None:
        raise OSError("it has no rtnetlink")
    netlink = socket.socket(family, socket.SOCK_RAW, _NETLINK_ROUTE)
    try:
        netlink.setblocking(False)
        netlink.bind((0, _GROUPS))
    except OSError:
        netlink.close()
        raise
    return netlink


def _read_links(data: bytes) -> Iterable[tuple[int, bool]]:
    """(Index, whether it runs) of each interface that a datagram of rtnetlink(7) tells of."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, *_ = _HEADER.unpack_from(data, at)
        if kind in (_NEWLINK, _DELLINK) and at + _HEADER.size + _LINK.size <= len(data):
            _, _, index, flags, _ = _LINK.unpack_from(data, at + _HEADER.size)
            yield index, kind == _NEWLINK and bool(flags & _RUNNING)
        at += max(_HEADER.size, (size + 3) & ~3)


def _look() -> list[LocalAddress]:
    try:
        return local_addresses()
    except InterfaceError:
        return []
