"""The bytes of a DHT datagram: rpcudp's framing, with each part typed and bounded.

A datagram is ``kind (0 request, 1 reply) | 20 random bytes that pair the two | MessagePack``; a request is ``[name, arguments]``.
The package decodes whatever comes; here a datagram only ever raises `RemoteProtocolError`.
"""

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

NodeId = Annotated[bytes, Meta(min_length=20, max_length=20)]
Record = Annotated[bytes, Meta(max_length=MAX_RECORD)]
Token = Annotated[bytes, Meta(max_length=16)]
T = TypeVar("T")


class Ping(Struct, array_like=True, frozen=True):
    """Arguments of ``ping``; the reply is a `Pong`."""

    sender: NodeId


class Find(Struct, array_like=True, frozen=True):
    """Arguments of ``find_node`` and ``find_value``; the reply is a `Found`."""

    sender: NodeId
    key: NodeId


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
        total: how many records it holds under the key.
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
