"""Tickets and addresses for ``bootstrap=``: where to find a node, as short text to paste into a chat.

A ticket holds the instance key and the addresses of a node, and a checksum against typing errors; no topic, no author.
"""

import binascii
import ipaddress
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

from solyd_swarm.core.wire import MAX_ADDRESSES, Host, Instance, Port
from solyd_swarm.errors import OptionTypeError, TicketError

PREFIX = "solyd1"
MAX_NAME = 253
"""Characters of the longest host name (RFC 1035, less the root)."""
_CHECKSUM = 4


class _Body(msgspec.Struct, frozen=True, array_like=True):
    instance: Instance
    addresses: Annotated[tuple[tuple[Host, Port], ...], Meta(min_length=1, max_length=MAX_ADDRESSES)]


@dataclass(frozen=True, slots=True)
class Contact:
    """A place to begin at: host names or IP literals with ports, and the 32-byte instance key (empty: whoever answers)."""

    addresses: tuple[tuple[str, int], ...]
    instance: bytes = b""


def make_ticket(instance: bytes, addresses: tuple[tuple[str, int], ...]) -> str:
    """The ticket of a node that listens at these IP literals and TCP ports."""
    body = msgspec.msgpack.encode(_Body(instance, addresses[:MAX_ADDRESSES]))
    return PREFIX + urlsafe_b64encode(body + _checksum(body)).decode("ascii").rstrip("=")


def parse_contact(text: str) -> Contact:
    """What one entry of ``bootstrap=`` says: a ticket or ``"host:port"`` (``"[::1]:port"`` for IPv6).

    Raises:
        TicketError: it is neither, or names an address that nobody can be reached at; a ``ValueError``.
    """
    if not isinstance(text, str):
        raise OptionTypeError(f"bootstrap takes tickets and 'host:port' strings, not {type(text).__name__}: {text!r}")
    text = text.strip()
    if text.startswith(PREFIX) and ":" not in text:
        return _parse_ticket(text)
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535
    is_host = 0 < len(host) <= MAX_NAME and host.isprintable() and not set(host) & set(" /")
    if not (colon and is_host and is_port):
        raise TicketError(f"{text[:80]!r} is neither a ticket (`swarm.ticket` of a running swarm) nor 'host:port', port 1 to 65535")
    if _is_nowhere(host):
        raise TicketError(f"nobody can be reached at {host}: give the address of the machine that is to be found")
    return Contact(((host, int(port)),))


def parse_bootstrap(entries: str | Iterable[str] | None) -> tuple[Contact, ...]:
    """All entries of ``bootstrap=``: one, several, or none."""
    if entries is None:
        return ()
    if isinstance(entries, str):
        return (parse_contact(entries),)
    if not isinstance(entries, Iterable):
        raise OptionTypeError(f"bootstrap takes a ticket, 'host:port', or a list of them, not {type(entries).__name__}")
    return tuple(parse_contact(entry) for entry in entries)


def _parse_ticket(text: str) -> Contact:
    encoded = text[len(PREFIX) :]
    try:
        raw = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
        if checksum != _checksum(body):
            raise TicketError("the ticket is damaged (its checksum is wrong): copy it again, whole")
        ticket = msgspec.msgpack.decode(body, type=_Body)
        for host, _ in ticket.addresses:
            ipaddress.ip_address(host)
            # Attack: a ticket, once pasted, would have us send to a whole network, or to ourselves.
            if _is_nowhere(host):
                raise TicketError(f"the ticket names {host}, where nobody can be reached: ask for another")
    except (binascii.Error, msgspec.DecodeError, RecursionError, ValueError) as error:
        if isinstance(error, TicketError):
            raise
        raise TicketError(f"not a ticket of this version: {text[:40]!r}; copy it again, whole") from error
    return Contact(ticket.addresses, ticket.instance)


def _is_nowhere(host: str) -> bool:
    """Whether it is an IP literal that no machine has: unspecified, multicast, broadcast, reserved. Names are not looked up."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    # 0.0.0.0/8 is "this network" (RFC 1122); 240.0.0.0/4 holds the broadcast address.
    return ip.is_unspecified or ip.is_multicast or (ip.version == 4 and (ip.is_reserved or ip.packed[0] == 0))


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECKSUM, person=b"solyd ticket").digest()
