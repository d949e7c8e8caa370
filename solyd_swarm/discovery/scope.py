"""How far an address reaches, and who may tell us to go there.

Whoever tells us an address may lie. An address inside our machine or our network is therefore only dialled when it comes
from there: otherwise a stranger on the internet could make us knock at the services of our own LAN (server-side request forgery).
"""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Literal

Scope = Literal["loopback", "link", "private", "global", "invalid"]

_REACH: dict[Scope, int] = {"loopback": 0, "link": 1, "private": 2, "global": 3}
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052


def scope_of(ip: str) -> Scope:
    """The scope of an IP literal (IPv6 with or without zone).

    ``"private"`` is whatever is neither loopback, link-local nor globally reachable by the IANA registries (RFC 1918, RFC 4193,
    RFC 6598 ...). ``"invalid"`` is what nobody can be reached at: no literal, unspecified, multicast, broadcast, reserved.
    IPv6 forms that carry an IPv4 address (mapped, 6to4, NAT64) have the scope of that address.
    """
    try:
        address = _unwrap(ip_address(ip))
    except ValueError:
        return "invalid"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link"
    # 0.0.0.0/8 is "this network" (RFC 1122), never a destination; 240.0.0.0/4 holds the broadcast address.
    if address.is_unspecified or address.is_multicast or (address.version == 4 and (address.is_reserved or address.packed[0] == 0)):
        return "invalid"
    return "global" if address.is_global else "private"


def may_dial(address_ip: str, learned_from_ip: str | None) -> bool:
    """Whether an address learned from ``learned_from_ip`` may be dialled.

    Args:
        address_ip: IP literal to dial.
        learned_from_ip: IP literal of whoever told us; None when nobody on a network did (the user's own configuration, our own store).

    Returns:
        True for global addresses; for narrower ones only when the teller's scope is the same or narrower still
        (loopback < link < private < global). Never for invalid ones, nor from an invalid teller.
    """
    reach = _REACH.get(scope_of(address_ip))
    if reach is None:
        return False
    if learned_from_ip is None:
        return True
    teller = _REACH.get(scope_of(learned_from_ip))
    return teller is not None and (reach == _REACH["global"] or teller <= reach)


def _unwrap(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(address.packed[12:])
    return address.ipv4_mapped or address.sixtofour or address
