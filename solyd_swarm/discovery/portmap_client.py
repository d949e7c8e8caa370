"""What the ways of asking a router for a port have in common: the mapping, the bounds, questions over UDP, the router's clock."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from solyd_swarm.discovery.gateway import Gateway
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import DiscoveryError, RemoteProtocolError

Transport = Literal["tcp", "udp"]
Answer = TypeVar("Answer")

MAX_DATAGRAM = 1100
"""Bytes of a PCP message (RFC 6887, section 7); NAT-PMP's are far shorter. Longer ones are refused unread."""

GOODBYE_WAITS = (0.12, 0.24)
"""Seconds waited for the answer to a withdrawal, sent so many times: closing must not take long."""

log = logging.getLogger("solyd_swarm.discovery.portmap")


class RouterError(DiscoveryError):
    """The router maps nothing for us; the text says why, in plain words."""


class SilentRouter(RouterError):
    """The router did not answer in time."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A port of ours that the router passes on.

    Attributes:
        transport: ``"tcp"`` or ``"udp"``.
        port: our own port.
        external: what the outside connects to.
        lifetime: seconds until the router forgets it, unless it is renewed.
    """

    transport: Transport
    port: int
    external: Address
    lifetime: float


class Refusals:
    """Counts what was refused, by reason, and logs without being flooded: a router, or whoever poses as one, can send anything.

    Attributes:
        counter: reasons are fixed sentences of ours and never hold what was received, so there are few of them.
    """

    def __init__(self, counter: Counter[str]) -> None:
        self.counter = counter

    def add(self, protocol: str, reason: str) -> None:
        self.counter[f"{protocol}: {reason}"] += 1
        count = self.counter[f"{protocol}: {reason}"]
        if count & (count - 1) == 0:
            log.debug("refused by %s: %s (%d so far)", protocol, reason, count)


class PortMapClient(ABC):
    """One protocol, spoken with one router. All methods run on the loop; after ``close()`` nothing is left of it.

    Args:
        gateway: the router.
        refusals: where refused answers are counted.
    """

    name: ClassVar[str]

    def __init__(self, gateway: Gateway, refusals: Refusals) -> None:
        self.gateway = gateway
        self.refusals = refusals

    @abstractmethod
    async def probe(self) -> None:
        """Find out whether the router speaks this protocol, without changing anything there.

        Raises `RouterError` if it does not, `SilentRouter` if it says nothing within ten seconds.
        """

    @abstractmethod
    async def map(self, transport: Transport, port: int, external_port: int, lifetime: int) -> Mapping:
        """Make a mapping, or renew it.

        Args:
            port: our own port.
            external_port: the one wished for; the router may choose another.
            lifetime: seconds wished for.

        Raises:
            RouterError: it refused, or did not answer.
        """

    @abstractmethod
    async def check(self, mapping: Mapping) -> bool:
        """Whether the router still knows of a mapping. Raises `SilentRouter` if it does not answer."""

    @abstractmethod
    async def unmap(self, transport: Transport, port: int, external_port: int) -> None:
        """Withdraw a mapping, also one whose making was never confirmed. Raises `RouterError` where that is not known to have worked."""

    @abstractmethod
    async def close(self) -> None:
        """Close its sockets. Withdraws nothing."""


class Asker(asyncio.DatagramProtocol, Generic[Answer]):
    """A UDP socket for questions to the router, one at a time, each repeated until it is answered.

    Only datagrams from the very address and port asked count (RFC 6886, section 3.1; RFC 6887, section 8.3). Everything else is
    counted and dropped at once: nothing is queued, so a flood costs the time to look at it and no memory.
    """

    def __init__(self, name: str, gateway: Gateway, refusals: Refusals) -> None:
        self._name = name
        self._gateway = gateway
        self._refusals = refusals
        self._lock = asyncio.Lock()
        self._read: Callable[[bytes], Any] | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self._closed: asyncio.Future[None] | None = None

    async def _open(self) -> asyncio.DatagramTransport:
        if self._transport is None:
            loop = asyncio.get_running_loop()
            try:
                self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(self._gateway.source, 0))
            except OSError as error:
                raise RouterError(f"no socket at {self._gateway.source}: {error}") from error
            self._closed = loop.create_future()
        return self._transport

    async def ask(self, request: bytes, read: Callable[[bytes], Answer], waits: Iterable[float]) -> Answer:
        """The router's answer.

        Args:
            read: takes a datagram apart. Raises `RemoteProtocolError` (a fixed sentence) for what is no answer to this
                question: it is counted, and the real one is still waited for; `RouterError` for a refusal.
            waits: seconds until the question is repeated, and at the end given up.

        Raises:
            SilentRouter: no answer.
            RouterError: a refusal.
        """
        async with self._lock:
            transport = await self._open()
            self._answer = asyncio.get_running_loop().create_future()
            self._read = read
            try:
                for wait in waits:
                    transport.sendto(request, (self._gateway.host, self._gateway.port))
                    await asyncio.wait([self._answer], timeout=wait)
                    if self._answer.done():
                        break
                else:
                    raise SilentRouter("no answer")
                outcome: Answer | RouterError = self._answer.result()
            finally:
                self._read = self._answer = None
            if isinstance(outcome, RouterError):
                raise outcome
            return outcome

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        if addr[:2] != (self._gateway.host, self._gateway.port):
            self._refusals.add(self._name, "a datagram of somebody else")
        elif len(data) > MAX_DATAGRAM:
            self._refusals.add(self._name, "too long")
        elif self._read is None or self._answer is None or self._answer.done():
            self._refusals.add(self._name, "an answer nobody waits for")
        else:
            try:
                self._answer.set_result(self._read(data))
            except RemoteProtocolError as error:
                self._refusals.add(self._name, str(error))
            except RouterError as error:
                self._answer.set_result(error)

    def error_received(self, exc: Exception) -> None:
        log.debug("%s at %s: %s", self._name, self._gateway, exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)

    async def close(self) -> None:
        if self._transport is not None and self._closed is not None:
            self._transport.abort()
            await self._closed


class RouterClock:
    """The router's epoch: seconds since it last lost its mappings. Tells whether it has lost them since.

    RFC 6887, section 8.5, which also serves NAT-PMP (RFC 6886, section 3.6, allows the same eighth and two seconds).
    """

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def lost(self, epoch: int, now: float) -> bool:
        """Whether the mappings are gone.

        Args:
            epoch: seconds, as just received.
            now: our own monotonic clock, in seconds.
        """
        last, self._last = self._last, (epoch, now)
        if last is None:
            return False
        if epoch < last[0] - 1:
            return True
        theirs, ours = epoch - last[0], now - last[1]
        return ours + 2 < theirs - theirs / 16 or theirs + 2 < ours - ours / 16


class DatagramClient(PortMapClient, Generic[Answer]):
    """What PCP and NAT-PMP share: questions over UDP, answers that tell the router's epoch."""

    def __init__(self, gateway: Gateway, refusals: Refusals) -> None:
        super().__init__(gateway, refusals)
        self._asker: Asker[Answer] = Asker(self.name, gateway, refusals)
        self._clock = RouterClock()
        self._lost = False  # since the last mapping was made

    def note(self, epoch: int) -> None:
        """The router told its epoch."""
        self._lost |= self._clock.lost(epoch, asyncio.get_running_loop().time())

    async def close(self) -> None:
        await self._asker.close()
