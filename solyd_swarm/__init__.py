"""Serverless publish/subscribe for plain Python scripts.

    >>> from solyd_swarm import pubsub
    >>> swarm = pubsub("foobar")
    >>> _ = swarm.on("message", print)
    >>> _ = swarm.leave()

Peers interested in the same topic find one another by multicast DNS, a Kademlia DHT of their own, BitTorrent's, or a ticket;
connect over encrypted channels, and gossip signed messages: fast along a broadcast tree, and surely by periodic anti-entropy digests.
"""

from solyd_swarm.errors import (
    DiscoveryError,
    ForkedError,
    IdentityError,
    InterfaceError,
    ListenError,
    MessageTooLarge,
    OptionError,
    OptionTypeError,
    PayloadError,
    PublishError,
    RemoteProtocolError,
    SwarmBusy,
    SwarmError,
    SwarmLeft,
    TicketError,
    TopicError,
    TopicTypeError,
    UnpublishableType,
    UnpublishableValue,
)
from solyd_swarm.message import Message, Peer, Stats
from solyd_swarm.pending import Pending
from solyd_swarm.pubsub import Node, pubsub
from solyd_swarm.swarm import Swarm

__all__ = [
    "DiscoveryError",
    "ForkedError",
    "IdentityError",
    "InterfaceError",
    "ListenError",
    "Message",
    "MessageTooLarge",
    "Node",
    "OptionError",
    "OptionTypeError",
    "PayloadError",
    "Peer",
    "Pending",
    "PublishError",
    "RemoteProtocolError",
    "Stats",
    "Swarm",
    "SwarmBusy",
    "SwarmError",
    "SwarmLeft",
    "TicketError",
    "TopicError",
    "TopicTypeError",
    "UnpublishableType",
    "UnpublishableValue",
    "pubsub",
]
__version__ = "0.1.0"
