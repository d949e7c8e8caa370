"""The router of the home network: where packets to the internet go first, and from which of our addresses.

IPv4 only, for that is what home routers translate. Linux tells its routes in ``/proc/net/route``, macOS and the BSDs by
``route -n get default``. Nothing is cached, since networks come and go.
"""

import contextlib
import logging
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from solyd_swarm.discovery.command import output_of
from solyd_swarm.discovery.interfaces import LocalAddress, usable_interfaces
from solyd_swarm.discovery.reach import source_address
from solyd_swarm.errors import InterfaceError

PCP_PORT = 5351
"""Of PCP (RFC 6887, section 19.1) and of NAT-PMP (RFC 6886, section 3.1)."""

SSDP_GROUP = ("239.255.255.250", 1900)
"""UPnP Device Architecture 1.1, section 1."""

LINUX_ROUTES = Path("/proc/net/route")
ROUTE_COMMAND = "/sbin/route"
ROUTE_TIMEOUT = 2.0
MAX_ROUTES_TEXT = 1024 * 1024
"""Bytes read of Linux's routing table; a machine with more routes is no host of a home network."""

_RTF_UP, _RTF_GATEWAY = 0x1, 0x2

log = logging.getLogger("solyd_swarm.discovery.gateway")


@dataclass(frozen=True, slots=True)
class Gateway:
    """A router, as seen from here.

    Attributes:
        host: the router's IPv4 literal on our network.
        source: our own IPv4 literal that it knows us by.
        port: UDP port at which it takes PCP and NAT-PMP.
        searched_at: where it is looked for by SSDP: UDP addresses, multicast or not.
    """

    host: str
    source: str
    port: int = PCP_PORT
    searched_at: tuple[tuple[str, int], ...] = (SSDP_GROUP,)

    def __str__(self) -> str:
        return self.host


def gateway_at(host: str, interfaces: Sequence[str] = ()) -> Gateway | None:
    """The router at an IPv4 literal; None if it is none, or no route leads there over an interface that may be used."""
    with contextlib.suppress(AddressValueError, InterfaceError):
        IPv4Address(host)
        source = source_address(host)
        if source and any(str(address.ip) == source for address in usable_interfaces(interfaces)):
            return Gateway(host, source)
    return None


async def find_gateway(interfaces: Sequence[str] = (), *, platform: str = sys.platform) -> Gateway | None:
    """The default gateway, over an interface that may be used; None where there is none. Reads, and sends nothing.

    Args:
        interfaces: names or IP literals of the interfaces allowed; empty: all.
    """
    try:
        local = [address for address in usable_interfaces(interfaces) if address.ip.version == 4 and not address.ip.is_loopback]
    except InterfaceError as error:
        log.debug("no gateway: %s", error)
        return None
    if not local:
        return None
    if platform == "linux":
        routes = _linux_routes()
    else:
        routes = parse_route_command(await output_of(ROUTE_COMMAND, "-n", "get", "default", seconds=ROUTE_TIMEOUT))
    for interface, host in routes:
        if source := _source_for(host, [address for address in local if address.interface == interface]):
            return Gateway(host, source)
    return None


def _source_for(host: str, local: Sequence[LocalAddress]) -> str | None:
    """Which of the addresses of the interface the router knows us by: the one the system would take, else one of its network."""
    literals = [str(address.ip) for address in local]
    if (chosen := source_address(host)) in literals:
        return chosen
    same_network = [str(address.ip) for address in local if IPv4Address(host) in address.network]
    return next(iter(same_network or literals), None)


def _linux_routes() -> list[tuple[str, str]]:
    try:
        with LINUX_ROUTES.open(encoding="ascii", errors="replace") as table:
            return parse_linux_routes(table.read(MAX_ROUTES_TEXT))
    except OSError as error:
        log.debug("no routes can be read: %s", error)
        return []


def parse_linux_routes(text: str) -> list[tuple[str, str]]:
    """(interface, gateway's IPv4 literal) of every default route in ``/proc/net/route``, the preferred one first."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        with contextlib.suppress(ValueError, IndexError, struct.error):
            interface, destination, gateway, flags, metric, mask = (fields[index] for index in (0, 1, 2, 3, 6, 7))
            wanted = _RTF_UP | _RTF_GATEWAY
            if int(destination, 16) == int(mask, 16) == 0 and int(flags, 16) & wanted == wanted:
                # The kernel prints addresses as numbers of the machine's own byte order.
                found.append((int(metric), interface, socket.inet_ntoa(struct.pack("=I", int(gateway, 16)))))
    return [(interface, host) for _, interface, host in sorted(found, key=lambda route: route[0])]


def parse_route_command(text: str) -> list[tuple[str, str]]:
    """(interface, gateway's IPv4 literal) from what ``route -n get default`` says; empty if the route leads to no router."""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    interface, host = fields.get("interface"), fields.get("gateway", "")
    with contextlib.suppress(AddressValueError):
        if interface:
            return [(interface, str(IPv4Address(host)))]
    return []
