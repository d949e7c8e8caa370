"""A seeded discrete-event network that drives `Overlay` objects, the very ones of production: same seed, same run.

Links are reliable and ordered, as TCP is, unless told otherwise (`loss`, `duplication`, `reordering`, `cut`), since the core has
to survive that too. What it says of acknowledgements (`Progress`) is true on reliable links only.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from hashlib import blake2b
from heapq import heappop, heappush
from typing import Any

from nacl.bindings import crypto_sign

from solyd_swarm.core.envelope import Envelope, Signer, Verifier, verify_ed25519
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
from solyd_swarm.net.limits import SILENCE_TIMEOUT
from solyd_swarm.simulation.channel import Channel, Way
from solyd_swarm.simulation.peer import Peer, key_pair, sign_sham, verify_sham

TOPIC_ID = b"simulated topic."
UNUSED_TIMEOUT = 10.0
"""Seconds after which a channel that no topic uses is closed, as a node does."""
DIAL_TIMEOUT = 5.0
"""Seconds until a dial of a host that does not answer at all is given up."""
DIAL_FLIGHTS = 3
"""One-way delays from a dial to an established channel: TCP's handshake, and the first flight of Noise XX beyond it."""

Watch = Callable[[Peer, Deliver], None]


class Network:
    """The simulated network and its clock.

    Args:
        seed: decides everything.
        latency: seconds a frame takes, (least, most): of each frame anew or, with `jitter`, of each pair of peers.
        jitter: seconds, at most, that a frame takes longer than its pair's latency.
        loss: share of frames lost (0 to 1); 0 is what TCP gives.
        config: of every peer that has none of its own.
        sham_signatures: sign with a stand-in that anyone could forge: for runs where nobody does.
        keep: keep all that was delivered, with the peers; without it only `watch` hears of it.
    """

    def __init__(
        self,
        seed: int,
        *,
        latency: tuple[float, float] = (0.005, 0.02),
        jitter: float | None = None,
        loss: float = 0.0,
        config: OverlayConfig | None = None,
        sham_signatures: bool = False,
        keep: bool = True,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.latency = latency
        self.jitter = jitter
        self.loss = loss
        self.duplication = 0.0
        """Share of frames that arrive twice (0 to 1)."""
        self.reordering = False
        """Whether frames may overtake one another on one link."""
        self.config = config or OverlayConfig()
        self.peers: list[Peer] = []
        self.frames_by_type = [0] * 256
        self.bytes_by_type = [0] * 256
        self.filter: Callable[[Peer, Peer, bytes], bool] | None = None
        """Decides whether a frame goes through: (sender, receiver, data)."""
        self.watch: Watch | None = None
        self.partitioned = False
        """Whether frames between peers of different zones are lost."""
        self.events = 0
        self._sham = sham_signatures
        self._keep = keep
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._by_address: dict[tuple[str, int], Peer] = {}
        self._by_id: dict[bytes, Peer] = {}

    # -- peers ------------------------------------------------------------------------------------------------

    def add_peer(self, *, config: OverlayConfig | None = None, ledger: Ledger | None = None, name: str = "", epoch: int = 1) -> Peer:
        """A new peer, alone. A `name` given twice is one author come back."""
        index = len(self.peers)
        public, secret = key_pair(name or f"author {index}")
        sign: Signer = (lambda data: sign_sham(public, data)) if self._sham else (lambda data: crypto_sign(data, secret)[:64])
        verify: Verifier = verify_sham if self._sham else verify_ed25519
        address: Addresses = ((f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", 7000),)
        instance = blake2b(f"instance {index} {self.rng.random()}".encode(), digest_size=32).digest()
        rng, config = random.Random(self.rng.random()), config or self.config
        overlay = Overlay(PeerInfo(instance, address), TOPIC_ID, public, epoch, sign, rng, config, ledger=ledger, verify=verify)
        peer = Peer(index, instance, overlay, address, secret, self.now)
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
        self.feed(peer, Publish(first, max(0, int((self.now + peer.clock_offset) * 1_000_000)), list(payloads)))

    def leave(self, peer: Peer) -> None:
        """A goodbye."""
        self.feed(peer, Quit())
        self.after(self.latency[1] * 2, self._gone, peer)

    def crash(self, peer: Peer, *, silently: bool = False) -> None:
        """Gone without a word; neighbours notice at once, as with a reset, or, if `silently`, by their keepalives."""
        if not silently:
            self._gone(peer)
        elif peer.alive:
            peer.died = self.now
            for way in list(peer.links.values()):
                self.after(SILENCE_TIMEOUT, self._end, way, "no sign of life")

    def _gone(self, peer: Peer) -> None:
        if peer.alive:
            peer.died = self.now
        for way in list(peer.links.values()):
            self._end(way)

    def cut(self, one: Peer, other: Peer) -> None:
        """Ends the link between two peers, if there is one."""
        way = one.links.get(other.id)
        if way is not None:
            self._end(way)

    def _end(self, way: Way, reason: str = "connection lost") -> None:
        if way.channel.up:
            way.channel.up = False
            for end in (way, way.back):
                del end.sender.links[end.receiver.id]
            for end in (way, way.back):
                self.feed(end.sender, LinkDown(end.receiver.id, reason))

    def partition(self, zones: Iterable[Iterable[Peer]]) -> None:
        """From now on nothing goes from one zone to another; channels in between end when their keepalives notice."""
        for number, zone in enumerate(zones):
            for peer in zone:
                peer.zone = number
        self.partitioned = True
        # As in production a channel that nothing comes over any more is given up.
        for peer in self.peers:
            for way in peer.links.values():
                if way.receiver.zone != peer.zone:
                    self.after(SILENCE_TIMEOUT, self._end_across, way)

    def _end_across(self, way: Way) -> None:
        if self.partitioned:
            self._end(way, "no sign of life")

    def heal(self) -> None:
        """Ends the partition."""
        self.partitioned = False

    # -- time -------------------------------------------------------------------------------------------------

    def after(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """Runs `action(*arguments)` in simulated time."""
        self._count += 1
        heappush(self._queue, (self.now + delay, self._count, action, arguments))

    def run(self, seconds: float) -> None:
        """Lets simulated time pass."""
        end = self.now + seconds
        queue = self._queue
        while queue and queue[0][0] <= end:
            self.now, _, action, arguments = heappop(queue)
            self.events += 1
            action(*arguments)
        self.now = end

    def run_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Lets time pass until the condition holds; False after `timeout` simulated seconds."""
        end = self.now + timeout
        while not condition():
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return condition()
            self.now, _, action, arguments = heappop(self._queue)
            self.events += 1
            action(*arguments)
        return True

    # -- driving the cores ------------------------------------------------------------------------------------

    def feed(self, peer: Peer, event: Event) -> None:
        """Hands an event to a core and carries out what it asks for."""
        if peer.died is None and not peer.frozen:
            for action in peer.overlay.handle(event, self.now):
                if type(action) is Send:
                    self._send(peer, action.peer, action.data)
                else:
                    self._carry_out(peer, action)

    def _carry_out(self, peer: Peer, action: Action) -> None:
        match action:
            case Schedule():
                peer.wake_at = action.at
                self.after(max(0.0, action.at - self.now), self._wake, peer, action.at)
            case Deliver():
                if self.watch is not None:
                    self.watch(peer, action)
                if self._keep:
                    peer.delivered.append(action)
                    peer.messages.extend(action.envelope.payloads)
            case Dial():
                self._dial(peer, action)
            case Close():
                peer.closed.append(action)
                self.cut(peer, self.find(action.peer))
            case Equivocated():
                peer.equivocations.append(action)
            case Progress():
                peer.progress = action
            case NeighborDown():
                if self._keep:
                    peer.neighbor_downs.append(action)
            case Send():
                self._send(peer, action.peer, action.data)

    def _wake(self, peer: Peer, at: float) -> None:
        if peer.wake_at == at:
            self.feed(peer, Tick())

    def _delay(self, one: Peer, other: Peer) -> float:
        least, most = self.latency
        if self.jitter is None:
            return least + (most - least) * self.rng.random()
        return least + (most - least) * self._draw(one, other) + self.jitter * self.rng.random()

    def _draw(self, one: Peer, other: Peer) -> float:
        """A pair's place between the least latency and the most: the same whenever they meet."""
        low, high = sorted((one.index, other.index))
        mixed = ((low * 2_654_435_761 ^ high * 40_503 ^ self.seed * 97) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        return ((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 >> 11 & (2**53 - 1)) / 2**53

    # -- channels ---------------------------------------------------------------------------------------------

    def _dial(self, peer: Peer, action: Dial) -> None:
        other = self._by_address.get(action.addresses[0]) if action.addresses else None
        if other is not None and self.partitioned and other.zone != peer.zone:
            self.after(DIAL_TIMEOUT, self.feed, peer, DialFailed(action.instance, action.addresses))
        else:
            self.after(self._delay(peer, other or peer) * DIAL_FLIGHTS, self._connect, peer, other, action)

    def _connect(self, peer: Peer, other: Peer | None, action: Dial) -> None:
        across = self.partitioned and other is not None and other.zone != peer.zone
        if (
            other is None
            or not other.alive
            or other.frozen
            or peer.frozen
            or not peer.alive
            or other is peer
            or other.id in peer.links
            or across
        ):
            self.feed(peer, DialFailed(action.instance, action.addresses))
            return
        channel = Channel(peer, other)
        for way in channel.ways:
            way.base = self._draw(peer, other)
            way.sender.links[way.receiver.id] = way
        self.after(UNUSED_TIMEOUT, self._close_unused, channel)
        self.feed(peer, LinkUp(other.id, other.overlay.author, other.address, True, action.addresses))
        self.feed(other, LinkUp(peer.id, peer.overlay.author, peer.address, False))

    def _close_unused(self, channel: Channel) -> None:
        """Ends a link that neither side has a use for, and looks again later where one has."""
        there, back = channel.ways
        if not channel.up:
            return
        if there.sender.overlay.uses(back.sender.id) or back.sender.overlay.uses(there.sender.id):
            self.after(UNUSED_TIMEOUT, self._close_unused, channel)
        else:
            self._end(there)

    def find(self, instance: bytes) -> Peer:
        """The peer with this instance key."""
        return self._by_id[instance]

    def _send(self, peer: Peer, to: bytes, data: bytes) -> None:
        way = peer.links.get(to)
        if way is None:
            return
        self.frames_by_type[data[0]] += 1
        self.bytes_by_type[data[0]] += len(data)
        if self.filter is not None and not self.filter(peer, way.receiver, data):
            return
        if way.stuck is not None:
            self._hold_back(way, data)
        else:
            self._transmit(way, data)

    def _transmit(self, way: Way, data: bytes) -> None:
        rng = self.rng
        if self.loss and rng.random() < self.loss:
            return
        if self.partitioned and way.sender.zone != way.receiver.zone:
            return
        least, most = self.latency
        jitter = self.jitter
        if jitter is None:
            arrival = self.now + least + (most - least) * rng.random()
        else:
            arrival = self.now + least + (most - least) * way.base + jitter * rng.random()
        if arrival < way.arrival and not self.reordering:
            arrival = way.arrival
        way.arrival = arrival
        self._count += 1
        heappush(self._queue, (arrival, self._count, self._arrive, (way, data)))
        if self.duplication and rng.random() < self.duplication:
            self._count += 1
            heappush(self._queue, (arrival, self._count, self._arrive, (way, data)))

    def _arrive(self, way: Way, data: bytes) -> None:
        if way.receiver.frozen:
            self.hold(way)
            self._hold_back(way, data)
        elif way.channel.up:
            self.feed(way.receiver, Received(way.sender.id, [data]))

    @staticmethod
    def _hold_back(way: Way, data: bytes) -> None:
        assert way.stuck is not None
        way.stuck.append(data)
        way.stuck_bytes += len(data)

    def hold(self, way: Way) -> None:
        """The receiver stops reading this link: what is sent over it stays in the sender's queue."""
        way.stuck = way.stuck or deque()

    def release(self, way: Way) -> None:
        """The receiver reads again."""
        held, way.stuck, way.stuck_bytes = way.stuck or (), None, 0
        for data in held:
            self._transmit(way, data)

    # -- what tests look at -----------------------------------------------------------------------------------

    @property
    def frames_sent(self) -> int:
        return sum(self.frames_by_type)

    @property
    def bytes_sent(self) -> int:
        return sum(self.bytes_by_type)

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
