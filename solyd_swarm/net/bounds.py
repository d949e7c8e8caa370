"""How much an endpoint takes in, and who goes when there is too much."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from solyd_swarm.net.connection import Connection
from solyd_swarm.net.dialler import CONNECT_TIMEOUT
from solyd_swarm.net.limits import DEFAULT_LIMITS, Limits

STRANGER_FRAME = 64 * 1024
"""Longest frame of a peer with which no topic was ever shared: bounds what a stranger can make us buffer."""


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """Bounds of an endpoint, times in seconds. Other values than these are for tests.

    Attributes:
        channels: in use at a time: bounds a flood of instances. One that no topic uses goes, of the host that has most of those;
            where all are used the newcomer is refused.
        strangers: accepted connections that are not in use yet: bounds a flood of half-open ones. The oldest of the host that has
            most goes, so that a flood from one place leaves others in peace.
        stranger: a channel on which no topic was ever agreed lasts so long from its connection on, handshake included: however slow
            or busy an outsider is, it is sent away within ten seconds.
        idle: a channel that no topic uses stays open so long.
        meeting: a channel has so long to be taken into use, and then to agree on a topic it was wanted for.
        sweep: between two looks at all that.
        connect: for one address to be dialled, handshake included.
        channel: of each channel.
    """

    channels: int = 256
    strangers: int = 128
    stranger: float = 8.0
    idle: float = 10.0
    meeting: float = 3.0
    sweep: float = 1.0
    connect: float = CONNECT_TIMEOUT
    channel: Limits = DEFAULT_LIMITS


DEFAULT_BOUNDS = EndpointLimits()


def oldest_of_busiest_host(connections: Sequence[Connection]) -> Connection:
    """The first of those of the host that has most of them."""
    hosts = Counter(connection.host for connection in connections)
    return max(connections, key=lambda connection: hosts[connection.host])
