"""What goes into the core and what comes out: `overlay.handle(event, now) -> list[Action]`.

Peers are named by their instance key (32 bytes). Times are seconds on one monotonic clock that the driver reads.
"""

from dataclasses import dataclass

from solyd_swarm.core.envelope import Envelope

Addresses = tuple[tuple[str, int], ...]


class Event:
    """Something that happened outside."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class LinkUp(Event):
    """A channel on which both ends have proven to know the topic, and the peer its author key.

    Attributes:
        addresses: where the peer listens, as far as known.
        initiated: we dialled it.
        dialled: the addresses of the `Dial` that led here, where there was one.
    """

    peer: bytes
    author: bytes
    addresses: Addresses
    initiated: bool
    dialled: Addresses = ()


@dataclass(frozen=True, slots=True)
class LinkDown(Event):
    """The channel, or the topic on it, has ended."""

    peer: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Received(Event):
    """Frames of this topic that arrived together from one peer."""

    peer: bytes
    frames: list[bytes]


@dataclass(frozen=True, slots=True)
class Discovered(Event):
    """A source found a candidate. `instance` is empty where the source does not tell it."""

    instance: bytes
    addresses: Addresses


@dataclass(frozen=True, slots=True)
class DialFailed(Event):
    """Nobody of this topic answered at any of these addresses."""

    instance: bytes
    addresses: Addresses


@dataclass(frozen=True, slots=True)
class Publish(Event):
    """What was published in one turn: sequences from `first` on, the clock in microseconds, encoded payloads."""

    first: int
    time: int
    payloads: list[bytes]


@dataclass(frozen=True, slots=True)
class Congested(Event):
    """A peer's queue has not drained for a while although others drain (or is far too long)."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """A congested peer's queue is empty again."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The time asked for by the last `Schedule` has come."""


@dataclass(frozen=True, slots=True)
class Quit(Event):
    """Leave the topic: tell the neighbours."""


class Action:
    """Something to be done outside."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Send(Action):
    """Queue this frame for a peer."""

    peer: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Dial(Action):
    """Connect to a peer. `via` is the peer that told us the addresses (empty: a discovery source)."""

    instance: bytes
    addresses: Addresses
    via: bytes = b""


@dataclass(frozen=True, slots=True)
class Close(Action):
    """Close the channel of a peer that broke the protocol."""

    peer: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Deliver(Action):
    """Messages for the application, in order; `late` ones come after what should have followed them."""

    envelope: Envelope
    propagation_source: bytes
    late: bool


@dataclass(frozen=True, slots=True)
class NeighborUp(Action):
    peer: bytes
    author: bytes


@dataclass(frozen=True, slots=True)
class NeighborDown(Action):
    peer: bytes
    author: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Progress(Action):
    """Acknowledgements of our own messages have moved on.

    Attributes:
        by_any: at least one neighbour has held everything up to this sequence.
        by_all: every present neighbour holds everything up to this sequence (0 without a neighbour).
        lost: messages among them that left our window before anybody was known to hold them.
    """

    by_any: int
    by_all: int
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Equivocated(Action):
    """An author signed two different messages with one number; `proof` holds the two envelopes."""

    author: bytes
    epoch: int
    proof: tuple[Envelope, Envelope]


@dataclass(frozen=True, slots=True)
class Schedule(Action):
    """Hand in a `Tick` at this time; replaces the one asked for before."""

    at: float
