"""PCP, the Port Control Protocol (RFC 6887): NAT-PMP's successor, also spoken by providers' own translators."""

import random
import secrets
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from solyd_swarm.discovery.gateway import Gateway
from solyd_swarm.discovery.portmap_client import (
    GOODBYE_WAITS,
    MAX_DATAGRAM,
    DatagramClient,
    Mapping,
    Refusals,
    RouterError,
    Transport,
)
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import RemoteProtocolError

VERSION = 2
ANNOUNCE, MAP = 0, 1
RESPONSE = 0x80
NONCE_SIZE = 12
PROTOCOL_NUMBERS: dict[Transport, int] = {"tcp": 6, "udp": 17}

FIRST_WAIT, WAITS = 3.0, 2
"""RFC 6887, section 8.1.1: three seconds at first, then twice as long, a tenth more or less. Given up after two."""

UNSUPPORTED_OPCODE = 4
RESULTS = {
    1: "it takes no PCP version 2",
    2: "not authorised: port mapping is switched off at the router",
    3: "it calls our request malformed",
    UNSUPPORTED_OPCODE: "it does not know this request",
    7: "network failure: the router has no public address",
    8: "out of resources",
    9: "it does not map this kind of packets",
    10: "we have too many mappings already",
    11: "it cannot give the outer address asked for",
    12: "address mismatch: there is another router between",
    13: "too many peers",
}
"""RFC 6887, section 7.4."""

_HEAD = struct.Struct(">BBBBII12s")
_MAP = struct.Struct(">12sB3xHH16s")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that was taken: lifetime and epoch in seconds, and what follows the header."""

    lifetime: int
    epoch: int
    payload: bytes


def mapped(host: str) -> bytes:
    """An IPv4 literal as PCP writes it: the 16 bytes of an IPv4-mapped IPv6 address (RFC 6887, section 5)."""
    return bytes(10) + b"\xff\xff" + IPv4Address(host).packed


def build_request(opcode: int, lifetime: int, source: str, payload: bytes = b"") -> bytes:
    """RFC 6887, section 7.1."""
    return struct.pack(">BBHI16s", VERSION, opcode, 0, lifetime, mapped(source)) + payload


def read_reply(data: bytes, opcode: int, echoed: bytes = b"") -> Reply:
    """Takes an answer apart (RFC 6887, sections 7.2 and 8.3).

    Args:
        echoed: what the payload must begin with; refusals without payload are taken, too, as some servers send them.

    Raises:
        RemoteProtocolError: it is none to this request.
        RouterError: the router refuses.
    """
    if len(data) >= 4 and data[0] != VERSION:
        if data[0] == 0 and data[1] & RESPONSE and data[2:4] == b"\0\1":  # RFC 6886, section 3.5: unsupported version
            raise RouterError("the router speaks NAT-PMP only")
        raise RemoteProtocolError("of another version")
    if len(data) < _HEAD.size or len(data) % 4 or len(data) > MAX_DATAGRAM:
        raise RemoteProtocolError("of a wrong length")
    _, got, _, result, lifetime, epoch, _ = _HEAD.unpack_from(data)
    payload = data[_HEAD.size :]
    if got != opcode | RESPONSE:
        raise RemoteProtocolError("an answer to another request")
    if (payload or not result) and not payload.startswith(echoed):
        raise RemoteProtocolError("with another nonce, or about another port")
    if result and not (opcode == ANNOUNCE and result == UNSUPPORTED_OPCODE):  # which tells the epoch all the same
        raise RouterError(RESULTS.get(result, f"refused with code {result}"))
    return Reply(lifetime, epoch, payload)


class Pcp(DatagramClient[Reply]):
    """PCP with one router."""

    name = "PCP"

    def __init__(self, gateway: Gateway, refusals: Refusals) -> None:
        super().__init__(gateway, refusals)
        # Renewals and withdrawals must show the nonce of the mapping (RFC 6887, section 11.1): nobody else can forge them.
        self._nonces: dict[Transport, bytes] = {transport: secrets.token_bytes(NONCE_SIZE) for transport in PROTOCOL_NUMBERS}

    async def probe(self) -> None:
        request = build_request(ANNOUNCE, 0, self.gateway.source)
        reply = await self._asker.ask(request, lambda data: read_reply(data, ANNOUNCE), _waits())
        self.note(reply.epoch)

    async def map(self, transport: Transport, port: int, external_port: int, lifetime: int) -> Mapping:
        reply = await self._ask_to_map(transport, port, external_port, lifetime, _waits())
        if len(reply.payload) < _MAP.size:
            raise RouterError("its answer is cut off")
        *_, external, packed = _MAP.unpack_from(reply.payload)
        host = IPv6Address(packed).ipv4_mapped
        if not external or not reply.lifetime or host is None:
            raise RouterError("it maps no port")
        self._lost = False
        return Mapping(transport, port, Address(str(host), external), reply.lifetime)

    async def check(self, mapping: Mapping) -> bool:
        # A server that gets another outer address starts its epoch anew (RFC 6887, section 8.5), so the epoch says it all.
        await self.probe()
        return not self._lost

    async def unmap(self, transport: Transport, port: int, external_port: int) -> None:
        await self._ask_to_map(transport, port, 0, 0, GOODBYE_WAITS)

    async def _ask_to_map(self, transport: Transport, port: int, external_port: int, lifetime: int, waits: tuple[float, ...]) -> Reply:
        payload = _MAP.pack(self._nonces[transport], PROTOCOL_NUMBERS[transport], port, external_port, mapped("0.0.0.0"))
        request = build_request(MAP, lifetime, self.gateway.source, payload)
        echoed = payload[: NONCE_SIZE + 6]  # nonce, protocol, our port
        reply = await self._asker.ask(request, lambda data: read_reply(data, MAP, echoed), waits)
        self.note(reply.epoch)
        return reply


def _waits() -> tuple[float, ...]:
    return tuple(FIRST_WAIT * 2**number * random.uniform(0.9, 1.1) for number in range(WAITS))
