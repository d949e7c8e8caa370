"""What the tests of the core share: swarms in a seeded network, and a peer whose frames a test writes itself."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from nacl.bindings import crypto_sign

from solyd_swarm.core.envelope import Envelope, seal
from solyd_swarm.core.events import Action, Dial, Event, LinkDown, LinkUp, Received, Send, Tick
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.overlay import Overlay, OverlayConfig
from solyd_swarm.core.wire import Frame, Gossip, Join, PeerInfo, decode, encode
from solyd_swarm.simulation.network import TOPIC_ID, Network
from solyd_swarm.simulation.peer import Peer, key_pair

F = TypeVar("F", bound=Frame)


def star(net: Network, count: int, *, config: OverlayConfig | None = None, gap: float = 0.0) -> list[Peer]:
    """Peers that all know of the first one only."""
    peers: list[Peer] = []
    for _ in range(count):
        peers.append(net.add_peer(config=config))
        if len(peers) > 1:
            net.discover(peers[-1], peers[0])
        net.run(gap)
    return peers


def mesh(net: Network, count: int, *, settle: float = 5.0) -> list[Peer]:
    """Peers that know of a few random others each, once their views have settled."""
    peers = [net.add_peer() for _ in range(count)]
    for place, peer in enumerate(peers[1:], 1):
        for other in net.rng.sample(peers[:place], min(3, place)):
            net.discover(peer, other)
    net.run(settle)
    return peers


def come_back(net: Network, peer: Peer, *, epoch: int, forgetful: bool = False) -> Peer:
    """The same author in a new process, which has loaded its ledger unless it is forgetful."""
    net.crash(peer)
    ledger = None if forgetful else Ledger.load(peer.overlay.log.ledger.dump())
    return net.add_peer(name=f"author {peer.index}", epoch=epoch, ledger=ledger)


def digests(peers: Iterable[Peer]) -> set[tuple[int, bytes]]:
    return {peer.overlay.log.items.summary() for peer in peers}


def repeated(peer: Peer) -> list[bytes]:
    """Envelopes delivered more than once."""
    return [id for id, count in Counter(each.envelope.id for each in peer.delivered).items() if count > 1]


def disordered(peer: Peer) -> list[tuple[bytes, int, int]]:
    """Envelopes delivered in another order than their author's, and not said to be late."""
    reached: dict[tuple[bytes, int], int] = {}
    wrong = []
    for each in peer.delivered:
        envelope = each.envelope
        stream = (envelope.author, envelope.epoch)
        if not each.late and envelope.first <= reached.get(stream, 0):
            wrong.append((*stream, envelope.first))
        reached[stream] = max(envelope.last, reached.get(stream, 0))
    return wrong


class Puppet(Overlay):
    """A member that does nothing of itself: a test writes its frames, and reads what it hears."""

    def __init__(self, net: Network, name: str = "puppet") -> None:
        self.net = net
        self.peer = net.add_peer(name=name)
        public, self.secret = key_pair(name)
        super().__init__(PeerInfo(self.peer.id, self.peer.address), TOPIC_ID, public, 1, self.sign, random.Random(0))
        self.heard: list[tuple[bytes, Frame]] = []
        self.linked: set[bytes] = set()
        self._outbox: list[Action] = []
        self.peer.overlay = self

    def sign(self, data: bytes) -> bytes:
        return crypto_sign(data, self.secret)[:64]

    def uses(self, peer: bytes) -> bool:
        return True

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Received():
                frames = [decode(data) for data in event.frames]
                self.heard += [(event.peer, frame) for frame in frames if frame is not None]
            case LinkUp():
                self.linked.add(event.peer)
            case LinkDown():
                self.linked.discard(event.peer)
        out, self._outbox = self._outbox, []
        return out

    def do(self, *actions: Action) -> None:
        self._outbox += actions
        self.net.feed(self.peer, Tick())

    def connect(self, other: Peer, *, join: bool = True) -> None:
        """A channel to a peer, and a place in its active view."""
        self.do(Dial(other.id, other.address))
        self.net.run(0.2)
        if join:
            self.send(other, Join())
            self.net.run(0.1)

    def send(self, other: Peer, *frames: Frame | bytes) -> None:
        self.do(*[Send(other.id, frame if isinstance(frame, bytes) else encode(frame)) for frame in frames])

    def heard_of(self, kind: type[F], sender: Peer | None = None) -> list[F]:
        return [frame for peer, frame in self.heard if isinstance(frame, kind) and sender in (None, self.net.find(peer))]

    def seal(self, first: int, *payloads: bytes, epoch: int = 1, time: int = 1) -> Envelope:
        return seal(TOPIC_ID, self.author, epoch, first, time, payloads, self.sign)


def gossip(envelope: Envelope, *, age: int = 0, hops: int = 0, signature: bytes | None = None) -> Gossip:
    return Gossip(age, hops, envelope.body, envelope.signature if signature is None else signature)
