"""The bytes of a DHT datagram: rpcudp's framing, with each part typed and bounded.

A datagram is ``kind (0 request, 1 reply) | 20 random bytes that pair the two | MessagePack``; a request is ``[name, arguments]``.
The package decodes whatever comes; here a datagram only ever raises `RemoteProtocolError`.
"""

from collections.abc import Iterable
from hashlib import blake2b
from ipaddress import ip_address
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from solyd_swarm.discovery.records import MAX_RECORD
from solyd_swarm.errors import RemoteProtocolError

REPLICAS: Final = 8
"""Kademlia's k, as in BEP 5: nodes in a bucket, in a reply, and storing a record."""
REQUEST: Final = 0
REPLY: Final = 1
MAX_DATAGRAM: Final = 1_200
"""Bytes of a datagram: passes every path unfragmented (RFC 8899 starts there), and bounds what a forged request is amplified to."""

HEAD_SIZE: Final = 21
"""Bytes before the MessagePack."""
SKIP_SALT: Final = 8
SKIP_SIZE: Final = 320
"""Bytes of a filter, its salt included: makes a ``find`` a third as long as the longest reply, even if there is nothing to skip."""

NodeId = Annotated[bytes, Meta(min_length=20, max_length=20)]
Record = Annotated[bytes, Meta(max_length=MAX_RECORD)]
Token = Annotated[bytes, Meta(max_length=16)]
T = TypeVar("T")


class Ping(Struct, array_like=True, frozen=True):
    """Arguments of ``ping``; the reply is a `Pong`."""

    sender: NodeId


class Find(Struct, array_like=True, frozen=True):
    """Arguments of ``find_node`` and ``find_value``; the reply is a `Found`.

    Attributes:
        skip: a Bloom filter of the records that the sender has, as `make_skip` makes it; all zero: none.
    """

    sender: NodeId
    key: NodeId
    skip: Annotated[bytes, Meta(max_length=SKIP_SIZE)] = bytes(SKIP_SIZE)

    def skips(self, slot: bytes, sequence: int) -> bool:
        """Whether the sender has this record; sometimes True although it has not."""
        bits = self.skip[SKIP_SALT:]
        if not any(bits):
            return False
        return all(bits[place >> 3] >> (place & 7) & 1 for place in _places(self.skip[:SKIP_SALT], len(bits), slot, sequence))


class Store(Struct, array_like=True, frozen=True):
    """Arguments of ``store``; the reply is a `Stored`."""

    sender: NodeId
    key: NodeId
    public: Annotated[bytes, Meta(min_length=32, max_length=32)]
    record: Record
    token: Token


class Neighbour(Struct, array_like=True, frozen=True):
    """A node in somebody's routing table; ``ip`` is packed, 4 or 16 bytes."""

    id: NodeId
    ip: Annotated[bytes, Meta(min_length=4, max_length=16)]
    port: Annotated[int, Meta(ge=1, le=65_535)]

    @property
    def host(self) -> str:
        """The IP literal; empty if it is none."""
        return str(ip_address(self.ip)) if len(self.ip) in (4, 16) else ""


class Pong(Struct, array_like=True, frozen=True):
    id: NodeId


class Found(Struct, array_like=True, frozen=True):
    """
    Attributes:
        id: of the node that answers.
        token: what it wants to see in a ``store`` from this address.
        nodes: the closest it knows.
        total: how many records it holds under the key, those left out that the sender wants to skip.
        records: as many of them as fit, chosen at random.
    """

    id: NodeId
    token: Token
    nodes: Annotated[list[Neighbour], Meta(max_length=REPLICAS)]
    total: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    records: Annotated[list[Record], Meta(max_length=16)] = []


class Stored(Struct, array_like=True, frozen=True):
    id: NodeId
    accepted: bool


class Request(Struct, array_like=True, frozen=True):
    name: Annotated[str, Meta(max_length=32)]
    arguments: Raw


def frame(kind: int, message_id: bytes, body: Struct) -> bytes:
    """A datagram."""
    return bytes([kind]) + message_id + msgspec.msgpack.encode(body)


def request(message_id: bytes, name: str, arguments: Struct) -> bytes:
    """A datagram that asks for something."""
    return frame(REQUEST, message_id, Request(name, Raw(msgspec.msgpack.encode(arguments))))


def split(datagram: bytes) -> tuple[int, bytes, bytes]:
    """Kind, message id and body of a datagram. Raises `RemoteProtocolError`."""
    if not 22 <= len(datagram) <= MAX_DATAGRAM or datagram[0] not in (REQUEST, REPLY):
        raise RemoteProtocolError("no DHT datagram")
    return datagram[0], datagram[1:21], datagram[21:]


def decode(body: bytes | Raw, kind: type[T]) -> T:
    """The typed body. Raises `RemoteProtocolError`."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"a malformed DHT datagram: {error}") from error


def make_skip(records: Iterable[tuple[bytes, int]], salt: bytes) -> bytes:
    """A filter of (slot, sequence) pairs. With another salt, others are skipped by mistake: of 256 pairs, 2% of the rest.

    Args:
        salt: `SKIP_SALT` random bytes.
    """
    bits = bytearray(SKIP_SIZE - SKIP_SALT)
    for slot, sequence in records:
        for place in _places(salt, len(bits), slot, sequence):
            bits[place >> 3] |= 1 << (place & 7)
    return salt + bytes(bits)


def _places(salt: bytes, size: int, slot: bytes, sequence: int) -> list[int]:
    # A keyed hash, so that no slot can be crafted that hides another one's record whatever the salt.
    digest = blake2b(slot + sequence.to_bytes(8, "big"), key=salt, digest_size=12, person=b"solyd dht skip").digest()
    return [int.from_bytes(digest[start : start + 4], "big") % (8 * size) for start in (0, 4, 8)]
