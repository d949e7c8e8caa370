"""Between addresses as we write them (IP literal, port) and as sockets do, which for IPv6 have four parts."""

import ipaddress
import socket
from typing import Any


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """Family and socket address of an IP literal; an IPv6 zone becomes a scope id. Raises ``ValueError`` or ``OSError``."""
    address, _, zone = host.partition("%")
    if ipaddress.ip_address(address).version == 4:
        return socket.AF_INET, (address, port)
    scope = 0
    if zone:
        scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
    return socket.AF_INET6, (address, port, 0, scope)


def read_address(name: Any) -> tuple[str, int]:
    """Address and port from a socket's name; ``("", 0)`` for what is none. IPv4 mapped into IPv6 is given as IPv4."""
    if not isinstance(name, tuple) or len(name) < 2:
        return "", 0
    address = ipaddress.ip_address(name[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped), name[1]
        if address.is_link_local and address.scope_id is None and len(name) > 3 and name[3]:
            return f"{address}%{name[3]}", name[1]
    return str(address), name[1]
