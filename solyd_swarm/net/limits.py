"""When a channel gives up, and how much it queues."""

from dataclasses import dataclass

HANDSHAKE_TIMEOUT = 5.0
KEEPALIVE_INTERVAL = 3.0
SILENCE_TIMEOUT = 10.0
STALL_TIMEOUT = 30.0
DRAIN_TIMEOUT = 0.5
MAX_BACKLOG = 64 * 1024 * 1024
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
