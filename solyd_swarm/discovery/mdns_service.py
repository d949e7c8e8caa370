"""One mDNS service of ours: what it says of a topic and a node, and how it is read back from records of anybody.

``<32 hex digits>._solyd-swarm._tcp.local.``: a SRV record with a random host name and the port, A and AAAA records, and a
TXT record (RFC 6763, section 6) with ``n``, a nonce, and ``t``, its tag under the topic key.
"""

import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TypeVar

from zeroconf import (  # type: ignore[attr-defined]  # the DNS classes are offered, though not in __all__
    DNSAddress,
    DNSRecord,
    DNSService,
    DNSText,
    ServiceInfo,
    Zeroconf,
    current_time_millis,
)

from solyd_swarm.core.keys import derive
from solyd_swarm.discovery.interfaces import LocalAddress, zone_name
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address

SERVICE_TYPE = "_solyd-swarm._tcp.local."
NONCE_SIZE = TAG_SIZE = 16

MAX_ADDRESSES = 16
"""Addresses of one service, announced or believed."""

MAX_TXT = 256
"""Bytes of a TXT record that are looked at; ours have 38."""

_NAME = re.compile(r"[0-9a-f]{32}\." + re.escape(SERVICE_TYPE))
_Record = TypeVar("_Record", DNSService, DNSText, DNSAddress)


class RefusedError(Exception):
    """A service that no member announces.

    Attributes:
        reason: what is wrong with it: ``"name"``, ``"port"``, ``"text"`` or ``"address"``.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(slots=True)
class Service:
    """What somebody announced. Untrusted.

    Attributes:
        addresses: where it says to listen, 1 to 16.
        invalid: how many further addresses were refused, since nobody can be reached there.
        excess: how many were refused because they were too many.
        sender: IP literal of whoever sent it.
        heard_at: when, on the loop's clock.
        reported_at: when it was last reported to the node; our own note.
    """

    nonce: bytes
    tag: bytes
    addresses: tuple[Address, ...]
    invalid: int
    excess: int
    sender: str = field(compare=False)
    heard_at: float = field(compare=False)
    reported_at: float = field(default=-1e9, compare=False)

    def belongs_to(self, topic_key: bytes) -> bool:
        """Whether it was announced by someone who knows the topic (or replays that)."""
        return hmac.compare_digest(derive(topic_key, b"mdns", self.nonce, size=TAG_SIZE), self.tag)


def make_service(topic_key: bytes, port: int, local: Sequence[LocalAddress]) -> ServiceInfo:
    """The service to register for a topic; another name, host name, nonce and tag with each call."""
    nonce = secrets.token_bytes(NONCE_SIZE)
    return ServiceInfo(
        SERVICE_TYPE,
        f"{secrets.token_hex(16)}.{SERVICE_TYPE}",
        port=port,
        properties={b"n": nonce, b"t": derive(topic_key, b"mdns", nonce, size=TAG_SIZE)},
        server=f"{secrets.token_hex(16)}.local.",
        parsed_addresses=announced_addresses(local),
    )


def read_service(zeroconf: Zeroconf, name: str, sender: str, now: float) -> Service | None:
    """A service from zeroconf's cache; ``None`` while it is incomplete.

    The records are read here, not by ``ServiceInfo``, which compares each address with each: ten thousand A records of one
    name, as a flood brings, would cost it seconds.

    Raises:
        RefusedError: no member announces such a thing.
    """
    if not _NAME.fullmatch(name):
        raise RefusedError("name", "its name is none of ours")
    entries = zeroconf.cache.async_entries_with_name(name)
    location, text = _newest(entries, DNSService), _newest(entries, DNSText)
    if not location or not text:
        return None
    port = location[0].port
    if not port:
        raise RefusedError("port", "port 0")
    nonce, tag = parse_txt(text[0].text)
    records = _newest(zeroconf.cache.async_entries_with_name(location[0].server), DNSAddress)
    hosts = [host for host in map(_host, records) if host is not None]
    usable = [host for host in hosts if scope_of(host) != "invalid"]
    if hosts and not usable:
        raise RefusedError("address", f"nobody can be reached at {hosts[0]}")
    if not usable:
        return None
    # All addresses are dialled at once: a service that names thousands would have us flood somebody.
    addresses = tuple(Address(host, port) for host in sorted(usable[:MAX_ADDRESSES]))
    return Service(nonce, tag, addresses, len(hosts) - len(usable), len(usable) - len(addresses), sender, now)


def announced_addresses(local: Sequence[LocalAddress]) -> list[str]:
    """The IP literals to announce, without zones: loopback only if there is nothing else; link-local ones last; 16 at most."""
    reachable = [address.ip for address in local if not address.ip.is_loopback] or [address.ip for address in local]
    ordered = dict.fromkeys(sorted(reachable, key=lambda ip: (ip.is_link_local, ip.version)))
    return [str(ip) for ip in ordered][:MAX_ADDRESSES]


def parse_txt(text: bytes) -> tuple[bytes, bytes]:
    """(nonce, tag) of a TXT record (RFC 6763, section 6). Unknown keys are skipped. Raises `RefusedError`."""
    if len(text) > MAX_TXT:
        raise RefusedError("text", "its TXT record is too long")
    values: dict[bytes, bytes] = {}
    at = 0
    while at < len(text):
        end = at + 1 + text[at]
        if end > len(text):
            raise RefusedError("text", "its TXT record is cut off")
        key, _, value = text[at + 1 : end].partition(b"=")
        values.setdefault(key, value)
        at = end
    nonce, tag = values.get(b"n", b""), values.get(b"t", b"")
    if len(nonce) != NONCE_SIZE or len(tag) != TAG_SIZE:
        raise RefusedError("text", "its TXT record has no nonce and tag")
    return nonce, tag


def _newest(entries: Iterable[DNSRecord], kind: type[_Record]) -> list[_Record]:
    """Those of one kind that have not expired, the newest first."""
    now = current_time_millis()
    return sorted((entry for entry in entries if isinstance(entry, kind) and not entry.is_expired(now)), key=lambda entry: -entry.created)


def _host(record: DNSAddress) -> str | None:
    """An IP literal, with a zone if link-local; ``None`` without one: heard over IPv4, but it comes over IPv6 too."""
    ip = ip_address(record.address)
    if ip.version == 4 or not ip.is_link_local:
        return str(ip)
    return f"{ip}%{zone_name(record.scope_id)}" if record.scope_id else None
