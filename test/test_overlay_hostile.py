"""A linked peer that sends whatever it likes: its channel is closed at worst, nobody else's is, and nothing grows without bound."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from simulated import Puppet, digests, disordered, gossip, mesh, repeated

from solyd_swarm.core import wire
from solyd_swarm.core.doubts import MAX_DOUBTS
from solyd_swarm.core.events import Close, Received
from solyd_swarm.core.order import OVERHEAD
from solyd_swarm.core.ordered import fingerprint_of
from solyd_swarm.core.wire import ALL_FRAMES, Frame, PeerInfo, encode
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


class Fiend:
    """Makes frames of every type: of real ids, peers and envelopes, of made-up ones, and of the limits of each field."""

    def __init__(self, rng: random.Random, net: Network, peers: list[Peer], puppet: Puppet) -> None:
        self.rng = rng
        self.net = net
        self.peers = peers
        self.puppet = puppet
        self.sequence = 0
        self.by_type: dict[type[Frame], Callable[[], Frame]] = {
            wire.Join: wire.Join,
            wire.ForwardJoin: lambda: wire.ForwardJoin(self.info(), rng.randrange(17)),
            wire.Neighbor: lambda: wire.Neighbor(rng.random() < 0.5, rng.choice([b"", self.info().instance])),
            wire.NeighborReply: lambda: wire.NeighborReply(rng.random() < 0.5, self.infos()),
            wire.Shuffle: lambda: wire.Shuffle(self.info(), rng.randrange(17), self.infos()),
            wire.ShuffleReply: lambda: wire.ShuffleReply(self.info().instance, self.infos()),
            wire.Disconnect: lambda: wire.Disconnect(self.infos()),
            wire.Leave: wire.Leave,
            wire.View: lambda: wire.View(self.infos()),
            wire.Gossip: lambda: wire.Gossip(self.age(), self.hops(), *self.body()),
            wire.Ihave: lambda: wire.Ihave(ids := self.ids(), [self.hops() for _ in ids]),
            wire.Graft: lambda: wire.Graft(self.ids()),
            wire.Prune: wire.Prune,
            wire.Ack: lambda: wire.Ack(rng.choice([0, 0, 0, 1, 2, 5, 2**53 - 1])),
            wire.Summary: lambda: wire.Summary(self.round(), rng.choice([0, 5, 2**53 - 1]), rng.randbytes(16)),
            wire.InSync: lambda: wire.InSync(self.round()),
            wire.Reconcile: lambda: wire.Reconcile(self.round(), rng.random() < 0.5, self.negentropy()),
            wire.Have: lambda: wire.Have(self.ids()),
            wire.Done: lambda: wire.Done(self.round()),
            wire.Pull: lambda: wire.Pull(self.ids(), self.age(), [(self.id(), self.id()) for _ in range(rng.choice([0, 0, 1, 40]))]),
            wire.Transfer: lambda: wire.Transfer(self.age(), self.hops(), *self.body()),
            wire.Gone: lambda: wire.Gone(self.id(), rng.random() < 0.5, rng.choice([0, 1, 2**63 - 1]), self.age()),
            wire.GoneRun: self.gone_run,
            wire.Seek: lambda: wire.Seek(self.age(), [self.row() for _ in range(rng.choice([0, 1, 3, 40]))]),
            wire.Unmatched: lambda: wire.Unmatched(self.ids() + self.sought()),
            wire.Proof: lambda: wire.Proof(self.age(), *self.body(), *self.body()),
        }

    def frame(self) -> bytes:
        kind = self.rng.choice(ALL_FRAMES)
        if kind is wire.Leave and self.rng.random() < 0.9:  # the link ends with it
            kind = wire.Gossip
        raw = encode(self.by_type[kind]())
        if self.rng.random() < 0.01:
            place = self.rng.randrange(len(raw))
            return raw[:place] + self.rng.randbytes(1) + raw[place + 1 :]
        return raw

    def pulls(self) -> list[bytes]:
        """What the puppet was asked for."""
        return [id for pull in self.puppet.heard_of(wire.Pull)[-3:] + self.puppet.heard_of(wire.Graft)[-3:] for id in pull.ids]

    def sought(self) -> list[bytes]:
        """The first ids of rows that the puppet was asked for."""
        return [first[1] for seek in self.puppet.heard_of(wire.Seek)[-3:] for first, _, _ in seek.rows]

    def id(self) -> bytes:
        known = [id for _, id in self.rng.choice(self.peers).overlay.log.items]
        return self.rng.choice([*known[-20:], *self.pulls(), self.rng.randbytes(32)])

    def ids(self) -> list[bytes]:
        return [self.id() for _ in range(self.rng.choice([0, 1, 1, 3, 40]))]

    def item(self) -> tuple[int, bytes]:
        known = list(self.rng.choice(self.peers).overlay.log.items)
        return self.rng.choice([*known, (self.rng.choice([0, 1, 2**63 - 1]), self.id())])

    def row(self) -> tuple[tuple[int, bytes], tuple[int, bytes], bytes]:
        """Often one that there is."""
        items = self.rng.choice(self.peers).overlay.log.items
        first, last = self.item(), self.item()
        lower, upper = items.places(first, last)
        return first, last, items.fingerprint(lower, upper) if lower < upper else bytes(16)

    def gone_run(self) -> wire.GoneRun:
        """Mostly of what the puppet was asked for, for any other is an answer to nothing."""
        asked = [pull.ids for pull in self.puppet.heard_of(wire.Pull)[-3:] if pull.ids]
        ids = self.rng.choice([*asked, *asked, self.ids() or [self.id()]])
        timestamps = [self.rng.choice([0, 1, 10**15])] + [self.rng.randrange(-1, 2) for _ in ids[1:]]
        ages = [abs(self.age() - 10)] + [self.rng.randrange(-1, 2) for _ in ids[1:]]
        return wire.GoneRun(ids[0], ids[-1], self.rng.choice([fingerprint_of(ids), bytes(16)]), timestamps, ages)

    def info(self) -> PeerInfo:
        if self.rng.random() < 0.5:
            peer = self.rng.choice([*self.peers, self.puppet.peer])
            return PeerInfo(peer.id, self.rng.choice([peer.address, ()]))
        return PeerInfo(self.rng.randbytes(32), ((f"203.0.113.{self.rng.randrange(256)}", self.rng.randrange(1, 65536)),))

    def infos(self) -> list[PeerInfo]:
        return [self.info() for _ in range(self.rng.choice([0, 1, 5, wire.MAX_PEERS]))]

    def age(self) -> int:
        return self.rng.choice([0, 0, 1, 1000, 599_999, 600_001, 1_199_999, 1_200_001, wire.MAX_AGE])

    def hops(self) -> int:
        return self.rng.choice([0, 1, 7, wire.MAX_HOPS])

    def round(self) -> int:
        heard = [frame.round for frame in self.puppet.heard_of(wire.Summary)[-2:] + self.puppet.heard_of(wire.Reconcile)[-2:]]
        return self.rng.choice([*heard, 0, 1, 2**53 - 1])

    def negentropy(self) -> bytes:
        heard = [frame.message for frame in self.puppet.heard_of(wire.Reconcile)[-2:]]
        return self.rng.choice([*heard, b"", b"a", b"a" + self.rng.randbytes(20), b"a\0\0\0", b"a\0\0\2\1" + self.rng.randbytes(32)])

    def body(self) -> tuple[bytes, bytes]:
        """Mostly well signed, for a forgery ends the channel, and that is that."""
        kind = self.rng.random()
        if kind < 0.02:
            return self.rng.randbytes(50), self.rng.randbytes(64)
        if kind < 0.5:
            self.sequence += self.rng.choice([0, 1, 1, 1, 9])
            payloads = [self.rng.randbytes(self.rng.choice([0, 10, 1000]))] * self.rng.randrange(1, 4)
            envelope = self.puppet.seal(max(1, self.sequence), *payloads, epoch=self.rng.randrange(1, 40))
            return envelope.body, envelope.signature
        known = [
            record.envelope
            for _, id in self.rng.choice(self.peers).overlay.log.items
            if (record := self.rng.choice(self.peers).overlay.log.get(id)) is not None and record.envelope is not None
        ]
        if not known:
            return self.puppet.seal(1, b"first").body, self.puppet.seal(1, b"first").signature
        envelope = self.rng.choice(known)
        return envelope.body, envelope.signature


def assert_bounded(peer: Peer) -> None:
    overlay = peer.overlay
    membership = overlay.membership
    assert len(membership.active) <= membership.config.active_size
    assert len(membership.passive) <= membership.config.passive_size
    assert len(membership._requests) <= 10
    concealed = sum(record.concealed for record in overlay.log.records())
    assert len(overlay.log) == len(overlay.log.items) + concealed <= 5000
    assert concealed <= len(overlay.doubts) <= MAX_DOUBTS
    assert overlay.log.bytes <= 3_000_000
    assert len(overlay.log._by_birth) <= 2 * len(overlay.log) + 1024
    assert overlay.sequencer._waiting_bytes == sum(
        envelope.size + OVERHEAD for stream in overlay.sequencer._streams.values() for envelope, _, _ in stream.waiting.values()
    )
    assert not overlay._out


def count_of(peer: Peer, authors: set[bytes]) -> int:
    """Messages of these authors that were delivered."""
    return sum(len(each.envelope.payloads) for each in peer.delivered if each.envelope.author in authors)


@pytest.mark.parametrize("round", range(3))
def test_frames_of_every_type_with_arbitrary_contents(round: int, seed: int) -> None:
    rng = random.Random(seed + round)
    net = Network(seed + round)
    peers = mesh(net, 5)
    sent = 0
    puppet = Puppet(net)
    fiend = Fiend(rng, net, peers, puppet)
    assert fiend.by_type.keys() == set(ALL_FRAMES)
    for step in range(1000):
        victim = rng.choice(peers)
        if victim.overlay.link(puppet.peer.id) is None:
            net.cut(victim, puppet.peer)
            puppet.connect(victim, join=rng.random() < 0.7)
        puppet.send(victim, *[fiend.frame() for _ in range(rng.randrange(1, 4))])
        net.run(rng.choice([0.0, 0.001, 0.02]))
        if step % 50 == 0:
            net.publish(rng.choice(peers), b"honest %d" % step)
            sent += 1
        if step % 300 == 0:
            net.run(3.0)
    for peer in peers:
        assert_bounded(peer)
        assert {close.peer for close in peer.closed} <= {puppet.peer.id}  # honest peers never close on one another
    puppet.peer.died = 0.0
    for peer in peers:
        net.cut(puppet.peer, peer)
    honest = {peer.overlay.author for peer in peers}
    assert net.run_until(lambda: all(count_of(peer, honest) == sent - peer.next_sequence + 1 for peer in peers), 60.0)
    assert net.run_until(lambda: not net.asymmetric(), 30.0)
    net.run(1300.0)  # who says two things about its ages and epochs may leave members divided about itself, but not for longer
    assert len(digests(peers)) == 1
    for peer in peers:
        assert not repeated(peer)
        assert not disordered(peer)
        assert all(close.peer == puppet.peer.id for close in peer.closed)


@pytest.mark.parametrize("kind", ALL_FRAMES)
def test_frames_before_any_place_is_asked_for_do_no_harm(kind: type[Frame], seed: int) -> None:
    rng = random.Random(seed)
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    fiend = Fiend(rng, net, peers, puppet)
    for _ in range(60):
        if peers[0].overlay.link(puppet.peer.id) is None:
            net.cut(peers[0], puppet.peer)
            puppet.connect(peers[0], join=False)
        puppet.send(peers[0], fiend.by_type[kind]())
        net.run(0.01)
    net.publish(peers[1], b"heard")
    net.run(3.0)
    assert b"heard" in peers[0].messages


def test_after_a_bad_frame_nothing_more_of_that_peer_is_taken(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    frames = [encode(gossip(puppet.seal(1, b"before"))), b"\x30garbage", encode(gossip(puppet.seal(2, b"after")))]
    actions: list[Any] = peers[0].overlay.handle(Received(puppet.peer.id, frames), net.now)
    assert [action.peer for action in actions if isinstance(action, Close)] == [puppet.peer.id]
    assert peers[0].overlay.link(puppet.peer.id) is None
    assert peers[0].overlay.log.holds(puppet.seal(1, b"before").id)
    assert not peers[0].overlay.log.holds(puppet.seal(2, b"after").id)
    assert peers[0].overlay.handle(Received(puppet.peer.id, frames), net.now) == []


def test_frames_of_a_peer_that_is_not_linked_are_ignored(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    assert not [
        action
        for kind in ALL_FRAMES
        for action in peers[0].overlay.handle(Received(puppet.peer.id, [bytes([kind.TYPE]) + b"x"]), net.now)
        if isinstance(action, Close)
    ]


def test_frames_of_an_unknown_type_are_skipped(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], b"\x7fof a later version", gossip(puppet.seal(1, b"heard")))
    net.run(0.5)
    assert peers[0].messages == [b"heard"]
    assert not peers[0].closed


def test_leave_and_come_back_over_the_same_channel_is_no_way_in(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], wire.Leave(), wire.Join(), gossip(puppet.seal(1, b"ghost")))
    net.run(1.0)
    assert puppet.peer.id not in peers[0].overlay.neighbors
    assert peers[0].messages == []
    assert peers[0].neighbor_downs[-1].reason == "left"
