"""A simulated channel: two ways between two peers, each with its own order and its own queue."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solyd_swarm.simulation.peer import Peer


class Way:
    """One direction of a channel.

    Attributes:
        arrival: when the last frame arrives, so that the next does not overtake it.
        base: where the pair's latency lies between the least and the most (0 to 1).
        stuck: frames in the sender's queue, where the receiver does not read; else None.
    """

    __slots__ = ("arrival", "back", "base", "channel", "receiver", "sender", "stuck", "stuck_bytes")

    def __init__(self, channel: Channel, sender: Peer, receiver: Peer) -> None:
        self.channel = channel
        self.sender = sender
        self.receiver = receiver
        self.back = self
        self.arrival = 0.0
        self.base = 0.0
        self.stuck: deque[bytes] | None = None
        self.stuck_bytes = 0


class Channel:
    """Both directions; up until it ends, and never again."""

    __slots__ = ("up", "ways")

    def __init__(self, one: Peer, other: Peer) -> None:
        self.up = True
        there, back = Way(self, one, other), Way(self, other, one)
        there.back, back.back = back, there
        self.ways = (there, back)
