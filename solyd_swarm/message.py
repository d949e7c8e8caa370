"""What arrives, who it comes from, and what a swarm has done so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from solyd_swarm import payload
from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.events import Deliver
from solyd_swarm.core.keys import format_author, format_message_id
from solyd_swarm.errors import PayloadError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Message:
    """A message with all that is known of it. The names follow the GossipSub family.

    Attributes:
        data: the object that was published.
        id: equal at every peer; names author, epoch and sequence.
        source: the author's id.
        propagation_source: id of the neighbour who gave it to us.
        epoch: number of the author's session, in microseconds since 1970 where its clock is right; grows with every restart.
        sequence: counts the author's messages in this epoch, from 1.
        published_at: the author's clock at publication, in UTC.
        late: it comes after messages that should have followed it.
        topic: the topic's name.
    """

    data: Any
    id: str
    source: str
    propagation_source: str
    epoch: int
    sequence: int
    published_at: datetime
    late: bool
    topic: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A neighbour.

    Attributes:
        id: its author id, as in `Message.source`.
        address: ``"host:port"`` (IPv6: ``"[host]:port"``) of the other end of the channel; where it dialled us, not where it listens.
        since: when it became a neighbour, in UTC.
    """

    id: str
    address: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a swarm since it began; sizes in bytes.

    Attributes:
        neighbors: neighbours now.
        published: messages published.
        acknowledged: of those, how many at least one neighbour holds.
        lost: of those, how many left the window before any neighbour was known to hold them.
        delivered: messages handed to handlers and iterators.
        late: of those, how many came out of order.
        lagged: messages dropped because handlers or iterators were too slow.
        undecodable: messages that arrived and could not be decoded.
        held: envelopes whose ids are known, which is for twice the window.
        held_bytes: bytes of their bodies, which are kept for the window.
        bytes_in, bytes_out: on all channels of the node.
        discovery: each way of finding peers (``mdns``, ``dht``, ``mainline``, ``portmap``, ``bootstrap``; with an identity file
            ``addresses``), and its state in words: off, on and more, or failed and why.
    """

    neighbors: int = 0
    published: int = 0
    acknowledged: int = 0
    lost: int = 0
    delivered: int = 0
    late: int = 0
    lagged: int = 0
    undecodable: int = 0
    held: int = 0
    held_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    discovery: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Messages of one envelope, from number `start` of it on, not decoded yet. `shared`: handlers and iterators both have got them."""

    envelope: Envelope
    propagation_source: bytes
    late: bool
    topic: str
    start: int = 0
    shared: bool = False

    @classmethod
    def of(cls, delivery: Deliver, neighbour: bytes, topic: str) -> "Batch":
        """From what the core delivers; `neighbour` is the author key of who gave it to us."""
        return cls(delivery.envelope, neighbour, delivery.late, topic)

    @property
    def size(self) -> int:
        return self.envelope.size

    @property
    def end(self) -> int:
        """The number after the last message."""
        return len(self.envelope.payloads)

    def __len__(self) -> int:
        return self.end - self.start

    def rest(self, start: int) -> "Batch":
        """What is left from a number on."""
        return Batch(self.envelope, self.propagation_source, self.late, self.topic, start, self.shared)

    def as_shared(self, shared: bool = True) -> "Batch":
        """The same, marked."""
        return Batch(self.envelope, self.propagation_source, self.late, self.topic, self.start, shared)

    def decode(self, index: int) -> Any:
        """The object of message number `index`. Raises `PayloadError`, which names message and author."""
        try:
            return payload.decode(self.envelope.payloads[index])
        except PayloadError as error:
            envelope = self.envelope
            id = format_message_id(envelope.author, envelope.epoch, envelope.first + index)
            raise PayloadError(f"{error} (message {id})", message_id=id, source=format_author(envelope.author)) from error

    def message(self, index: int, data: Any) -> Message:
        """Message number `index`, with `data` as decoded."""
        envelope = self.envelope
        return Message(
            data=data,
            id=format_message_id(envelope.author, envelope.epoch, envelope.first + index),
            source=format_author(envelope.author),
            propagation_source=format_author(self.propagation_source),
            epoch=envelope.epoch,
            sequence=envelope.first + index,
            published_at=_instant(envelope.time),
            late=self.late,
            topic=self.topic,
        )


def _instant(microseconds: int) -> datetime:
    """The author's clock may say anything; what no calendar holds becomes the last instant that it does."""
    try:
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)
