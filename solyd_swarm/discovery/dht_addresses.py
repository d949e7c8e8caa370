"""Which of our addresses the DHT uses: the one it binds, and those that it announces."""

import logging
from collections.abc import Sequence
from itertools import chain, zip_longest

from solyd_swarm.discovery.interfaces import usable_interfaces
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address, Endpoint
from solyd_swarm.errors import InterfaceError

log = logging.getLogger("solyd_swarm.discovery.kademlia")

_PREFERENCE = {"global": 0, "private": 1, "link": 2, "loopback": 3}


def furthest_reaching(interfaces: Sequence[str]) -> str:
    """The IP literal, among those of the interfaces named, that reaches furthest; IPv4 first. Raises `InterfaceError`."""
    usable = [address.host for address in usable_interfaces(interfaces)]
    return min(usable, key=lambda ip: (_PREFERENCE.get(scope_of(ip), 9), ":" in ip))


def announced_addresses(endpoint: Endpoint) -> list[Address]:
    """Where a node can be dialled: not on loopback, unless nothing else is allowed or exists. Empty while there is no network."""
    kinds: dict[tuple[int, bool], list[Address]] = {}
    for address in _addresses(endpoint):
        # A zone (IPv6 link-local) means nothing on another machine.
        if "%" not in address.host and scope_of(address.host) != "invalid":
            kinds.setdefault((_PREFERENCE[scope_of(address.host)], ":" in address.host), []).append(address)
    wide = {kind: found for kind, found in kinds.items() if kind[0] != _PREFERENCE["loopback"]} or kinds
    # In turn from each kind, so that a machine with many bridges still tells one address of every kind.
    turns = chain.from_iterable(zip_longest(*[wide[kind] for kind in sorted(wide)]))
    return [address for address in turns if address]


def _addresses(endpoint: Endpoint) -> list[Address]:
    if endpoint.published is not None:
        return [Address(host, port) for host, port in endpoint.published()]
    try:
        return [Address(address.host, endpoint.port) for address in usable_interfaces(endpoint.interfaces)]
    except InterfaceError as error:
        log.debug("nothing to announce: %s", error)
        return []
