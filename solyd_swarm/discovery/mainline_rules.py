"""What members of a topic agree on in the BitTorrent DHT, and which of the addresses it gives are believed."""

from collections.abc import Collection
from ipaddress import ip_address

from solyd_swarm.core.keys import derive
from solyd_swarm.discovery.records import day_of
from solyd_swarm.discovery.scope import may_dial, scope_of

ANYONE = "192.31.196.1"
"""Stands for a node somewhere on the internet, in `Candidate.learned_from`: libtorrent does not tell which node named a peer. It has
global scope, and nobody is there (AS112, RFC 7535)."""

ENTRY_LIFE = 1_800.0
"""Seconds that nodes keep an announcement (30 minutes in libtorrent; BEP 5 leaves it to the node)."""


def infohash_of(topic_key: bytes, day: int) -> bytes:
    """The 20 bytes that a topic's members meet under on a day (count of UTC days since 1970)."""
    return derive(topic_key, b"mainline", day.to_bytes(8, "big", signed=True), size=20)


def days_looked_up(now: float) -> tuple[int, ...]:
    """The days of ``now - ENTRY_LIFE``, ``now`` and ``now + ENTRY_LIFE``, each once.

    Announced is under today's infohash only. So within 30 minutes of midnight (UTC) two days are looked up, and two members find
    one another if their clocks differ by less than that; what was announced before midnight is found until it expires.
    """
    return tuple(dict.fromkeys(day_of(moment) for moment in (now, now - ENTRY_LIFE, now + ENTRY_LIFE)))


def refusal(host: str, port: int, teller: str, own_hosts: Collection[str], own_port: int) -> str | None:
    """Why a peer's address that the DHT gave is not to be dialled; None if it may be.

    Anyone may be a node of a DHT that is open to the internet and name what he likes. Private and loopback addresses are therefore
    believed only when ``teller``, who stands for all nodes of the DHT, is that near himself (DESIGN 3.14): strangers must not make
    us knock at our own LAN.

    Returns:
        One of a fixed set of reasons, in words.
    """
    try:
        ip = ip_address(host)
    except ValueError:
        return "malformed address"
    if not 0 < port < 65_536:
        return "port 0"
    if ip.is_multicast:
        return "multicast address"
    if scope_of(host) == "invalid":
        return "unspecified or reserved address"
    if port == own_port and host in own_hosts:
        return "our own address"
    if not may_dial(host, teller):
        return "private or loopback address, told from outside"
    return None
