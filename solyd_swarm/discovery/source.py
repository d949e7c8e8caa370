"""The one small interface that every way of finding peers implements (announce, look for, yield candidates)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Address:
    """Where something listens: an IP literal (IPv6 link-local ones with their zone, ``fe80::1%eth0``) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Somewhere a peer may listen. Untrusted: only the channel authenticates.

    Attributes:
        addresses: alternatives for one and the same peer; they are dialled one after the other, shortly, until one answers.
        source: the name of the source that found it (``"mdns"``, ``"dht"``, ``"mainline"``, ``"bootstrap"``, ``"addresses"``).
        instance: the 32-byte instance key (Noise static key) it should have, where the source tells it.
        learned_from: IP literal of whoever told us, where there is one: decides which scopes may be dialled.
    """

    addresses: tuple[Address, ...]
    source: str
    instance: bytes | None = None
    learned_from: str | None = None


Found = Callable[[bytes, Candidate], None]
"""Called with (topic key, candidate), on the loop, any number of times."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a source announces and may use.

    Attributes:
        port: TCP port that the node listens on.
        instance: the node's 32-byte instance key.
        interfaces: IP literals of the local interfaces that may be used; empty: all, loopback included.
        published: tells where others may hear that the node can be dialled (IP literal, TCP port); None: at all of its addresses.
    """

    port: int
    instance: bytes
    interfaces: tuple[str, ...] = field(default=())
    published: Callable[[], tuple[tuple[str, int], ...]] | None = None


class Source(ABC):
    """One way of finding peers. All methods are called on the node's event loop.

    A source owns every task, thread, socket and timer it makes; after ``close()`` none is left.
    """

    name: ClassVar[str]

    @abstractmethod
    async def start(self, endpoint: Endpoint, found: Found) -> None:
        """Begin. Raises `DiscoveryError`, with what to do, where this source cannot work; it then holds nothing."""

    @abstractmethod
    def join(self, topic_key: bytes) -> None:
        """Announce the endpoint under a topic and look for others there, from now on. Returns at once."""

    @abstractmethod
    def leave(self, topic_key: bytes) -> None:
        """Withdraw the announcement of a topic and stop looking. Returns at once."""

    def changed(self) -> None:
        """The network or the clock has changed: what was bound, counted or put off before may be worthless. A `refresh` follows."""
        return

    @abstractmethod
    def refresh(self, topic_key: bytes) -> None:
        """Look again now: the swarm is alone or wants fresh candidates. Cheap to call often: rate-limited inside."""

    def describe(self) -> str:
        """How it does, in words. From any thread."""
        return "on"

    @abstractmethod
    async def close(self) -> None:
        """Withdraw everything and end, within half a second."""
