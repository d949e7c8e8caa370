"""When a channel gives up, and how much it queues."""

from dataclasses import dataclass

# Three messages, and time for TCP to repeat a lost packet twice (RFC 6298: after 1 s, then 2 s). A stranger holds a place no longer.
HANDSHAKE_TIMEOUT = 5.0
# Three may be lost before silence tells; and far less than the half minute after which some NATs forget a mapping.
KEEPALIVE_INTERVAL = 3.0
# Short enough that whoever hangs by a dead peer is soon elsewhere, long enough for a Wi-Fi handover.
SILENCE_TIMEOUT = 10.0
# DESIGN 3.12: nobody waits for a slow neighbour, so it may take its time.
STALL_TIMEOUT = 30.0
# Of the second in which `leave` is to be done.
DRAIN_TIMEOUT = 0.5
# Four of the largest messages: as much as the window keeps by default.
MAX_BACKLOG = 64 * 1024 * 1024
# A tenth of a second of a line of 100 Mbit/s, and a quarter of that: what is above both is slow, what is below both is not.
HIGH_MARK = 1024 * 1024
LOW_MARK = 256 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """When a channel gives up, in seconds, and how much it queues, in bytes. Other values than these are for tests.

    Attributes:
        handshake: from the connection to the end of the handshake.
        keepalive: nothing sent for so long: a keepalive is sent.
        silence: nothing received for so long: the peer is gone. Longer than three keepalives.
        stall: bytes wait and none has left for so long: the peer takes nothing.
        drain: how long leaving may take.
        backlog: more waits than this: the peer is too slow. This is what a peer that reads slowly can make us hold.
        high_mark, low_mark: `ChannelOwner.channel_backlog` is called when the backlog rises above the one, then when it falls to
            the other.
    """

    handshake: float = HANDSHAKE_TIMEOUT
    keepalive: float = KEEPALIVE_INTERVAL
    silence: float = SILENCE_TIMEOUT
    stall: float = STALL_TIMEOUT
    drain: float = DRAIN_TIMEOUT
    backlog: int = MAX_BACKLOG
    high_mark: int = HIGH_MARK
    low_mark: int = LOW_MARK


DEFAULT_LIMITS = Limits()
