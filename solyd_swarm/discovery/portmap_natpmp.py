"""NAT-PMP (RFC 6886): a few bytes over UDP, as Apple's and many other home routers take them."""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from solyd_swarm.discovery.gateway import Gateway
from solyd_swarm.discovery.portmap_client import (
    GOODBYE_WAITS,
    DatagramClient,
    Mapping,
    Refusals,
    RouterError,
    Transport,
)
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import RemoteProtocolError

VERSION = 0
EXTERNAL_ADDRESS = 0
OPCODES: dict[Transport, int] = {"udp": 1, "tcp": 2}
RESPONSE = 128

WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""RFC 6886, section 3.1: doubled from 250 ms on. It goes on for a minute; a router one hop away that says nothing for 7.75 s is none."""

RESULTS = {
    1: "it does not take version 0",
    2: "not authorised: port mapping is switched off at the router",
    3: "network failure: the router has no public address",
    4: "out of resources",
    5: "it does not know this request",
}
"""RFC 6886, section 3.5."""

_HEAD = struct.Struct(">BBHI")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that was taken: the epoch, and what follows it."""

    epoch: int
    payload: bytes


def read_reply(data: bytes, opcode: int, payload_size: int) -> Reply:
    """Takes an answer apart (RFC 6886, sections 3.2 and 3.3).

    Raises:
        RemoteProtocolError: it is none to this request.
        RouterError: the router refuses.
    """
    if len(data) < _HEAD.size:
        raise RemoteProtocolError("too short")
    version, got, result, epoch = _HEAD.unpack_from(data)
    if version != VERSION:
        if got & RESPONSE and data[3] == 1:  # RFC 6887, sections 7.2 and 9: unsupported version
            raise RouterError(f"the router speaks PCP version {version} only")
        raise RemoteProtocolError("of another version")
    if got != opcode | RESPONSE:
        raise RemoteProtocolError("an answer to another request")
    if result:
        raise RouterError(RESULTS.get(result, f"refused with code {result}"))
    if len(data) != _HEAD.size + payload_size:
        raise RemoteProtocolError("of a wrong length")
    return Reply(epoch, data[_HEAD.size :])


class NatPmp(DatagramClient[Reply]):
    """NAT-PMP with one router."""

    name = "NAT-PMP"

    def __init__(self, gateway: Gateway, refusals: Refusals) -> None:
        super().__init__(gateway, refusals)
        self._external = ""

    async def probe(self) -> None:
        request = struct.pack(">BB", VERSION, EXTERNAL_ADDRESS)
        reply = await self._asker.ask(request, lambda data: read_reply(data, EXTERNAL_ADDRESS, 4), WAITS)
        self._external = str(IPv4Address(reply.payload))
        self.note(reply.epoch)

    async def map(self, transport: Transport, port: int, external_port: int, lifetime: int) -> Mapping:
        reply = await self._ask_to_map(transport, port, external_port, lifetime, WAITS)
        _, external, granted = struct.unpack(">HHI", reply.payload)
        if not external or not granted:
            raise RouterError("it maps no port")
        # The address is told apart from the mapping, and may have changed since it was asked for last.
        await self.probe()
        self._lost = False
        return Mapping(transport, port, Address(self._external, external), granted)

    async def check(self, mapping: Mapping) -> bool:
        await self.probe()
        return not self._lost and self._external == mapping.external.host

    async def unmap(self, transport: Transport, port: int, external_port: int) -> None:
        await self._ask_to_map(transport, port, 0, 0, GOODBYE_WAITS)

    async def _ask_to_map(self, transport: Transport, port: int, external_port: int, lifetime: int, waits: tuple[float, ...]) -> Reply:
        opcode = OPCODES[transport]

        def read(data: bytes) -> Reply:
            reply = read_reply(data, opcode, 8)
            if int.from_bytes(reply.payload[:2]) != port:
                raise RemoteProtocolError("about another port")
            return reply

        request = struct.pack(">BBHHHI", VERSION, opcode, 0, port, external_port, lifetime)
        reply = await self._asker.ask(request, read, waits)
        self.note(reply.epoch)
        return reply
