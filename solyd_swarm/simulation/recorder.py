"""What happened to every message of a run: who got it, when, over how many hops, and what that cost.

The terms are those of the papers (HyParView, DSN 2007, section 2.5; Plumtree, SRDS 2007, section 4.1).

- *Reliability* of a message: the share of those that had to get it which did get it. They are the peers, but for the author, that were
  there from its publication to the end of the run.
- *RMR*, relative message redundancy: ``m / r - 1``, where ``m`` frames with a body (Gossip, Transfer, Proof) were sent, and ``r``
  deliveries made. For one message that ``n`` peers have in the end it is the paper's ``m / (n - 1) - 1``. 0 is a perfect tree;
  flooding over a graph of degree ``d`` has about ``d - 2``.
- *LDH*, last delivery hop, of a message: the most hops that it made to anyone.
- *Latency*: from publication to delivery to the application, in order; of one message to one peer that was there from the start.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from solyd_swarm.core import wire
from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.events import Deliver
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

PAYLOAD_TYPES = (wire.Gossip.TYPE, wire.Transfer.TYPE, wire.Proof.TYPE)
DIGEST_TYPES = tuple(frame.TYPE for frame in wire.ALL_FRAMES if 0x40 <= frame.TYPE < 0x50 and frame.TYPE not in PAYLOAD_TYPES)


@dataclass(eq=False)
class Broadcast:
    """One envelope on its way through the swarm. Times in simulated seconds."""

    author: Peer
    at: float
    count: int
    reached: bytearray
    receivers: array[int] = field(default_factory=lambda: array("l"))
    latencies: array[float] = field(default_factory=lambda: array("d"))
    hops: int = 0
    last_at: float = 0.0
    duplicates: int = 0
    missed: int = 0
    late: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Frames and bytes, by type byte, up to some moment."""

    frames: list[int]
    bytes: list[int]

    def since(self, earlier: Traffic) -> Traffic:
        return Traffic(
            [now - then for now, then in zip(self.frames, earlier.frames, strict=True)],
            [now - then for now, then in zip(self.bytes, earlier.bytes, strict=True)],
        )

    @property
    def payload_frames(self) -> int:
        return sum(self.frames[kind] for kind in PAYLOAD_TYPES)

    @property
    def payload_bytes(self) -> int:
        return sum(self.bytes[kind] for kind in PAYLOAD_TYPES)

    @property
    def control_bytes(self) -> int:
        """Of everything but bodies."""
        return sum(self.bytes) - self.payload_bytes

    @property
    def digest_bytes(self) -> int:
        """Of anti-entropy, asking for bodies included, but for the bodies."""
        return sum(self.bytes[kind] for kind in DIGEST_TYPES)


class Recorder:
    """Watches a network; every message to be measured is published through it."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.broadcasts: list[Broadcast] = []
        self.unexpected = 0
        """Deliveries of what was not published through the recorder."""
        self._open: dict[tuple[bytes, int, int], Broadcast] = {}
        net.watch = self._delivered

    def publish(self, peer: Peer, *payloads: bytes) -> Broadcast:
        """One envelope, if the payloads fit one."""
        broadcast = Broadcast(peer, self.net.now, len(payloads), bytearray(len(self.net.peers)))
        self._open[peer.overlay.author, peer.overlay.epoch, peer.next_sequence] = broadcast
        self.broadcasts.append(broadcast)
        self.net.publish(peer, *payloads)
        return broadcast

    def of(self, envelope: Envelope) -> Broadcast | None:
        """What was published as this envelope, if it was through the recorder."""
        return self._open.get((envelope.author, envelope.epoch, envelope.first))

    def _delivered(self, peer: Peer, delivery: Deliver) -> None:
        envelope = delivery.envelope
        broadcast = self.of(envelope)
        if broadcast is None:
            self.unexpected += 1
            return
        reached = broadcast.reached
        if peer.index >= len(reached):
            reached.extend(bytes(peer.index + 1 - len(reached)))
        if reached[peer.index]:
            broadcast.duplicates += 1
            return
        reached[peer.index] = 1
        broadcast.receivers.append(peer.index)
        broadcast.last_at = self.net.now
        if peer.born > broadcast.at:
            return  # it caught up: how late it came says nothing about the way
        broadcast.latencies.append(self.net.now - broadcast.at)
        broadcast.late += delivery.late
        record = peer.overlay.log.get(envelope.id)
        if record is not None and record.hops > broadcast.hops:
            broadcast.hops = record.hops

    def traffic(self) -> Traffic:
        """All that was sent so far."""
        return Traffic(self.net.frames_by_type[:], self.net.bytes_by_type[:])

    def obliged(self, broadcast: Broadcast, *, latecomers: bool = False) -> list[Peer]:
        """Who has to have it: who was there from its publication to now. `latecomers`: also whoever came since."""
        return [
            peer
            for peer in self.net.peers
            if peer.died is None and peer is not broadcast.author and (latecomers or peer.born <= broadcast.at)
        ]

    def lacks(self, broadcast: Broadcast, peer: Peer) -> bool:
        """Whether a message has not been delivered to a peer."""
        return peer.index >= len(broadcast.reached) or not broadcast.reached[peer.index]

    def is_complete(self, broadcast: Broadcast, obliged: Iterable[Peer]) -> bool:
        reached = broadcast.reached
        return all(peer.index < len(reached) and reached[peer.index] for peer in obliged)

    def missing(self, broadcasts: Iterable[Broadcast], *, latecomers: bool = False) -> int:
        """Notes on each message by how many it is missed now; returns the sum."""
        total = 0
        for broadcast in broadcasts:
            obliged = self.obliged(broadcast, latecomers=latecomers)
            reached = broadcast.reached
            broadcast.missed = sum(1 for peer in obliged if peer.index >= len(reached) or not reached[peer.index])
            total += broadcast.missed
        return total


def percentile(values: list[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` (0 to 1) of the sorted values do not exceed. 0 without values."""
    return values[max(0, min(len(values) - 1, -int(-share * len(values) // 1) - 1))] if values else 0.0
