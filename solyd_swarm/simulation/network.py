"""A seeded discrete-event network that drives `Overlay` objects: same seed, same run.

Links are reliable and ordered, as TCP is, unless told otherwise (`loss`, `duplication`, `cut`), since the core has to survive
that too. What it says of acknowledgements (`Progress`) is true on reliable links only.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heappop, heappush

from nacl.bindings import crypto_sign, crypto_sign_seed_keypair

from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.events import (
    Action,
    Addresses,
    Close,
    Deliver,
    Dial,
    DialFailed,
    Discovered,
    Equivocated,
    Event,
    LinkDown,
    LinkUp,
    NeighborDown,
    NeighborUp,
    Progress,
    Publish,
    Quit,
    Received,
    Schedule,
    Send,
    Tick,
)
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.overlay import Overlay, OverlayConfig
from solyd_swarm.core.wire import PeerInfo

TOPIC_ID = b"simulated topic."
UNUSED_TIMEOUT = 10.0
"""Seconds after which a channel that no topic uses is closed, as a node does."""


def key_pair(seed: str) -> tuple[bytes, bytes]:
    """(public, secret) Ed25519 key from a seed."""
    return crypto_sign_seed_keypair(blake2b(seed.encode(), digest_size=32).digest())


@dataclass(eq=False)
class Peer:
    """One simulated peer, and all that came out of its core."""

    index: int
    overlay: Overlay
    address: Addresses
    secret: bytes
    alive: bool = True
    wake_at: float | None = None
    delivered: list[Deliver] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)
    equivocations: list[Equivocated] = field(default_factory=list)
    neighbor_downs: list[NeighborDown] = field(default_factory=list)
    closed: list[Close] = field(default_factory=list)
    progress: Progress | None = None
    next_sequence: int = 1

    @property
    def id(self) -> bytes:
        return self.overlay.membership.me.instance


class Network:
    """The simulated network and its clock.

    Args:
        seed: decides everything.
        latency: seconds a frame takes, (least, most).
        loss: share of frames lost (0 to 1); 0 is what TCP gives.
    """

    def __init__(
        self, seed: int, *, latency: tuple[float, float] = (0.005, 0.02), loss: float = 0.0, config: OverlayConfig | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.latency = latency
        self.loss = loss
        self.duplication = 0.0
        """Share of frames that arrive twice (0 to 1)."""
        self.config = config or OverlayConfig()
        self.peers: list[Peer] = []
        self.frames_sent = 0
        self.bytes_sent = 0
        self.filter: Callable[[Peer, Peer, bytes], bool] = lambda sender, receiver, data: True
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._links: dict[frozenset[int], int] = {}  # pair -> generation of its link
        self._arrivals: dict[tuple[int, int], float] = {}  # keeps each direction of a link in order
        self._by_address: dict[tuple[str, int], Peer] = {}
        self._by_id: dict[bytes, Peer] = {}

    # -- peers ------------------------------------------------------------------------------------------------

    def add_peer(self, *, config: OverlayConfig | None = None, ledger: Ledger | None = None, name: str = "", epoch: int = 1) -> Peer:
        """A new peer, alone. A `name` given twice is one author come back."""
        index = len(self.peers)
        public, secret = key_pair(name or f"author {index}")
        address: Addresses = ((f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", 7000),)
        instance = blake2b(f"instance {index} {self.rng.random()}".encode(), digest_size=32).digest()
        overlay = Overlay(
            PeerInfo(instance, address),
            TOPIC_ID,
            public,
            epoch,
            lambda data: crypto_sign(data, secret)[:64],
            random.Random(self.rng.random()),
            config or self.config,
            ledger=ledger,
        )
        peer = Peer(index, overlay, address, secret)
        self.peers.append(peer)
        self._by_address[address[0]] = peer
        self._by_id[instance] = peer
        self.feed(peer, Tick())
        return peer

    def discover(self, peer: Peer, other: Peer, *, tell_instance: bool = True) -> None:
        """A source tells `peer` of `other`."""
        self.feed(peer, Discovered(other.id if tell_instance else b"", other.address))

    def publish(self, peer: Peer, *payloads: bytes) -> None:
        """All the payloads in one turn."""
        first, peer.next_sequence = peer.next_sequence, peer.next_sequence + len(payloads)
        self.feed(peer, Publish(first, int(self.now * 1_000_000), list(payloads)))

    def leave(self, peer: Peer) -> None:
        """A goodbye."""
        self.feed(peer, Quit())
        self.after(self.latency[1] * 2, lambda: self._gone(peer))

    def crash(self, peer: Peer) -> None:
        """Gone without a word; neighbours notice at once, as with a reset."""
        self._gone(peer)

    def _gone(self, peer: Peer) -> None:
        peer.alive = False
        for other in self.peers:
            self.cut(peer, other)

    def cut(self, one: Peer, other: Peer) -> None:
        """Ends the link between two peers, if there is one."""
        if self._links.pop(frozenset((one.index, other.index)), None) is not None:
            for near, far in ((one, other), (other, one)):
                if near.alive:
                    self.feed(near, LinkDown(far.id, "connection lost"))

    # -- time -------------------------------------------------------------------------------------------------

    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Runs `action` in simulated time."""
        self._count += 1
        heappush(self._queue, (self.now + delay, self._count, action))

    def run(self, seconds: float) -> None:
        """Lets simulated time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heappop(self._queue)
            action()
        self.now = end

    def run_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Lets time pass until the condition holds; False after `timeout` simulated seconds."""
        end = self.now + timeout
        while not condition():
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return condition()
            self.now, _, action = heappop(self._queue)
            action()
        return True

    # -- driving the cores ------------------------------------------------------------------------------------

    def feed(self, peer: Peer, event: Event) -> None:
        """Hands an event to a core and carries out what it asks for."""
        if peer.alive:
            for action in peer.overlay.handle(event, self.now):
                self._carry_out(peer, action)

    def _carry_out(self, peer: Peer, action: Action) -> None:
        match action:
            case Send():
                self._send(peer, action)
            case Deliver():
                peer.delivered.append(action)
                peer.messages.extend(action.envelope.payloads)
            case Schedule():
                self._schedule(peer, action.at)
            case Dial():
                self.after(self._delay() * 3, lambda: self._connect(peer, action))
            case Close():
                peer.closed.append(action)
                self._hang_up(peer, action.peer)
            case Equivocated():
                peer.equivocations.append(action)
            case Progress():
                peer.progress = action
            case NeighborDown():
                peer.neighbor_downs.append(action)
            case NeighborUp():
                pass

    def _schedule(self, peer: Peer, at: float) -> None:
        peer.wake_at = at
        self.after(max(0.0, at - self.now), lambda: self.feed(peer, Tick()) if peer.wake_at == at else None)

    def _delay(self) -> float:
        return self.rng.uniform(*self.latency)

    def _connect(self, peer: Peer, action: Dial) -> None:
        other = self._by_address.get(action.addresses[0]) if action.addresses else None
        if other is None or not other.alive or not peer.alive or other is peer:
            self.feed(peer, DialFailed(action.instance, action.addresses))
            return
        pair = frozenset((peer.index, other.index))
        if pair in self._links:
            self.feed(peer, DialFailed(action.instance, action.addresses))
            return
        self._count += 1
        self._links[pair] = generation = self._count
        self.after(UNUSED_TIMEOUT, lambda: self._close_unused(peer, other, generation))
        self.feed(peer, LinkUp(other.id, other.overlay.author, other.address, True, action.addresses))
        self.feed(other, LinkUp(peer.id, peer.overlay.author, peer.address, False))

    def _close_unused(self, one: Peer, other: Peer, generation: int) -> None:
        """Ends a link that neither side has a use for, and looks again later where one has."""
        if self._links.get(frozenset((one.index, other.index))) != generation:
            return
        if one.overlay.uses(other.id) or other.overlay.uses(one.id):
            self.after(UNUSED_TIMEOUT, lambda: self._close_unused(one, other, generation))
        else:
            self.cut(one, other)

    def _hang_up(self, peer: Peer, other_id: bytes) -> None:
        self.cut(peer, self.find(other_id))

    def find(self, instance: bytes) -> Peer:
        """The peer with this instance key."""
        return self._by_id[instance]

    def _send(self, peer: Peer, action: Send) -> None:
        other = self.find(action.peer)
        pair = frozenset((peer.index, other.index))
        generation = self._links.get(pair)
        if generation is None:
            return
        self.frames_sent += 1
        self.bytes_sent += len(action.data)
        if not self.filter(peer, other, action.data) or (self.loss and self.rng.random() < self.loss):
            return
        way = (peer.index, other.index)
        arrival = max(self.now + self._delay(), self._arrivals.get(way, 0.0))
        self._arrivals[way] = arrival

        def arrive() -> None:
            if self._links.get(pair) == generation:
                self.feed(other, Received(peer.id, [action.data]))

        self.after(arrival - self.now, arrive)
        if self.duplication and self.rng.random() < self.duplication:
            self.after(arrival - self.now, arrive)

    # -- what tests look at -----------------------------------------------------------------------------------

    @property
    def living(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.alive]

    def graph_is_connected(self) -> bool:
        """Whether the active views of the living join them all."""
        living = self.living
        seen = {living[0].id} if living else set()
        todo = living[:1]
        while todo:
            for other in todo.pop().overlay.neighbors:
                if other not in seen:
                    seen.add(other)
                    todo.append(self.find(other))
        return len(seen) == len(living)

    def asymmetric(self) -> list[tuple[int, int]]:
        """Pairs of which one holds the other for a neighbour, but not the other way round."""
        return [
            (peer.index, self.find(other).index)
            for peer in self.living
            for other in peer.overlay.neighbors
            if peer.id not in self.find(other).overlay.neighbors
        ]

    def envelope_of(self, peer: Peer, index: int = -1) -> Envelope:
        """An envelope that this peer delivered."""
        return peer.delivered[index].envelope
