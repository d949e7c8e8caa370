"""Which local addresses discovery may use: everything, or what the user named.

The list comes from ``getifaddrs(3)`` by way of ``ifaddr``; nothing is cached, since networks come and go.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import groupby

import ifaddr

from solyd_swarm.errors import InterfaceError


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
