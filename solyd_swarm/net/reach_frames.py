"""The frames of a channel by which two instances help one another to be reached: where one is seen, whether an address can be
dialled, and what is passed on between two that cannot dial each other.

An IP address travels as its 4 or 16 bytes; IPv4 mapped into IPv6 as IPv4, and never a zone, which means nothing elsewhere.
"""

from ipaddress import IPv6Address, ip_address
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from solyd_swarm.core.wire import Instance
from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net.matching import Number

MAX_PORTS = 3
"""Ports that one may ask another to dial at: bounds the connections that one request can cause."""

FAILED, REACHED, REFUSED = 0, 1, 2
"""What has become of a dial that was asked for (TRIED)."""
ASK, ANSWER, GO, DECLINE = 0, 1, 2, 3
"""Steps of two that dial each other at once (PUNCH, PUNCHED)."""

AnyPort = Annotated[int, Meta(ge=0, le=65535)]


class ReachFrame(msgspec.Struct, frozen=True, array_like=True):
    """Base of these frames; `TYPE` is the byte that leads it."""

    TYPE: ClassVar[int] = -1


class _About(ReachFrame, frozen=True, array_like=True):
    ip: Annotated[bytes, Meta(max_length=16)]
    port: AnyPort

    @property
    def address(self) -> tuple[str, int]:
        """IP literal and port."""
        return unpack_host(self.ip), self.port


class Seen(_About, frozen=True, array_like=True):
    """Where the sender sees the receiver: from the responder where a dial came from, from the initiator where it has dialled."""

    TYPE: ClassVar[int] = 0x07


class Try(_About, frozen=True, array_like=True):
    """A request: dial me there, from another port than you have used, and tell."""

    TYPE: ClassVar[int] = 0x08


class Tried(_About, frozen=True, array_like=True):
    """The answer: `FAILED`, `REACHED` (the asker's own instance key was proven there), or `REFUSED`."""

    TYPE: ClassVar[int] = 0x09
    outcome: Annotated[int, Meta(ge=0, le=255)]


class Punch(ReachFrame, frozen=True, array_like=True):
    """To be passed on to `instance`, a member of the topic of this number like us: we may be dialled at these ports."""

    TYPE: ClassVar[int] = 0x0A
    number: Number
    instance: Instance
    step: Annotated[int, Meta(ge=0, le=255)]
    ports: Annotated[tuple[AnyPort, ...], Meta(max_length=MAX_PORTS)] = ()


class Punched(ReachFrame, frozen=True, array_like=True):
    """Passed on: what `instance` says, which the sender sees at this IP address (none: it is the sender that declines)."""

    TYPE: ClassVar[int] = 0x0B
    number: Number
    instance: Instance
    step: Annotated[int, Meta(ge=0, le=255)]
    ports: Annotated[tuple[AnyPort, ...], Meta(max_length=MAX_PORTS)] = ()
    ip: Annotated[bytes, Meta(max_length=16)] = b""


_KINDS: tuple[type[ReachFrame], ...] = (Seen, Try, Tried, Punch, Punched)
_DECODERS = {kind.TYPE: msgspec.msgpack.Decoder(kind).decode for kind in _KINDS}
TYPES = frozenset(_DECODERS)
_encode = msgspec.msgpack.Encoder().encode


def encode(frame: ReachFrame) -> bytes:
    """The frame as it goes over a channel."""
    return bytes([frame.TYPE]) + _encode(frame)


def decode(data: bytes) -> ReachFrame:
    """One of `TYPES`. Raises `RemoteProtocolError`."""
    try:
        frame = _DECODERS[data[0]](memoryview(data)[1:])
    except (msgspec.DecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"a malformed frame of type {data[0]:#04x}: {error}") from None
    ip = getattr(frame, "ip", None)
    if ip is not None and len(ip) not in ((0, 4, 16) if isinstance(frame, Punched) else (4, 16)):
        raise RemoteProtocolError(f"a malformed frame of type {data[0]:#04x}: no IP address")
    return frame


def pack_host(host: str) -> bytes:
    """An IP literal as bytes, without its zone. Raises ``ValueError``."""
    ip = ip_address(host.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).packed


def unpack_host(ip: bytes) -> str:
    """The IP literal of 4 or 16 bytes; empty for none."""
    if not ip:
        return ""
    found = ip_address(ip)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)
