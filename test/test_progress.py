"""What is said of our messages: acknowledged means held, by every neighbour or by one; and when all is quiet it is all."""

import pytest
from simulated import Puppet, gossip, mesh, repeated, star

from solyd_swarm.core import wire
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.events import Congested, Drained, Progress, Received
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


class Auditor:
    """Compares each `Progress` of some peers with what their neighbours hold at that moment."""

    def __init__(self, net: Network, *peers: Peer) -> None:
        self.net = net
        self.reports = 0
        self._ever: dict[Peer, int] = dict.fromkeys(peers, 0)
        for peer in peers:
            self._watch(peer)

    def _watch(self, peer: Peer) -> None:
        handle = peer.overlay.handle

        def spy(event: object, now: float) -> object:
            actions = handle(event, now)  # type: ignore[arg-type]
            for action in actions:
                if isinstance(action, Progress):
                    self._audit(peer, action)
            return actions

        peer.overlay.handle = spy  # type: ignore[assignment, method-assign]

    def _audit(self, peer: Peer, progress: Progress) -> None:
        self.reports += 1
        held = [self.held_by(self.net.find(other), peer) for other in peer.overlay.neighbors]
        self._ever[peer] = max(self._ever[peer], *held, 0)
        assert progress.by_all <= min(held, default=0), (progress, held)
        assert progress.by_any <= self._ever[peer], (progress, held)

    @staticmethod
    def held_by(other: Peer, author: Peer) -> int:
        """How far this peer holds the author's messages without a gap."""
        log, key = other.overlay.log, (author.overlay.author, author.overlay.epoch)
        through = 0
        while log.ledger.refuses(*key, through + 1, through + 1):
            through += 1
        return through


def reached(peer: Peer) -> bool:
    end = peer.overlay.published
    return peer.progress == Progress(end, end)


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_claims_are_true_at_any_time_and_complete_in_the_end(count: int, seed: int) -> None:
    net = Network(seed, latency=(0.005, 0.08))
    peers = star(net, count)
    auditor = Auditor(net, *peers)
    for n in range(60):
        peer = net.rng.choice(peers)
        net.publish(peer, *[b"%d" % n] * net.rng.randrange(1, 4))
        net.run(net.rng.random() * 0.1)
    assert net.run_until(lambda: all(reached(peer) for peer in peers if peer.overlay.published), 20.0)
    assert auditor.reports


def test_claims_are_true_while_links_change(seed: int) -> None:
    net = Network(seed, latency=(0.005, 0.08))
    peers = mesh(net, 10)
    Auditor(net, *peers)
    for n in range(150):
        peer = net.rng.choice(peers)
        net.publish(peer, b"%d" % n)
        what = net.rng.random()
        other = net.find(net.rng.choice(list(peer.overlay.neighbors))) if peer.overlay.neighbors else peer
        if what < 0.2:
            net.cut(peer, other)
        elif what < 0.4 and other is not peer:
            net.feed(peer, net.rng.choice([Congested, Drained])(other.id))
        elif what < 0.6 and other is not peer:  # makes room for another
            link = peer.overlay.neighbors[other.id]
            net.feed(peer, Received(other.id, [wire.encode(wire.Disconnect())]))
            net.feed(other, Received(peer.id, [wire.encode(wire.Disconnect())]))
            assert not link.up
        net.run(net.rng.random() * 0.2)
    for peer in peers:
        for other in list(peer.overlay.neighbors):
            net.feed(peer, Drained(other))
    assert net.run_until(lambda: all(reached(peer) for peer in peers), 60.0)
    assert not any(repeated(peer) for peer in peers)


def test_over_a_lazy_link_the_claim_waits_for_the_answer(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(3.0)
    Auditor(net, one)
    one.overlay.neighbors[other.id].eager = False
    net.publish(one, b"announced")
    assert one.progress is None or one.progress.by_all == 0
    net.run(0.05)
    assert not reached(one)
    assert net.run_until(lambda: reached(one), 1.0)


def test_what_was_announced_and_came_another_way_is_acknowledged_at_once(seed: int) -> None:
    """By the link that only announced it too, not only when something else crosses that link."""
    quiet = OverlayConfig(antientropy=AntiEntropyConfig(digest_interval=100.0, digest_interval_max=100.0))
    net = Network(seed, config=quiet)
    peers = star(net, 3)
    net.run(10.0)
    one, other, third = peers
    one.overlay.neighbors[other.id].eager = False
    one.overlay.neighbors[third.id].eager = third.overlay.neighbors[other.id].eager = True
    net.publish(one, b"over the third")
    assert net.run_until(lambda: reached(one), 0.12)


def test_an_announcement_is_acknowledged_when_the_body_comes_over_another_link(seed: int) -> None:
    quiet = OverlayConfig(antientropy=AntiEntropyConfig(digest_interval=100.0, digest_interval_max=100.0))
    net = Network(seed, config=quiet)
    one = net.add_peer()
    first, second = Puppet(net, "first"), Puppet(net, "second")
    first.connect(one)
    second.connect(one)
    envelope = first.seal(1, b"announced by one, brought by the other")
    first.send(one, wire.Ihave([envelope.id], [0]))
    net.run(0.05)
    assert not first.heard_of(wire.Ack)
    second.send(one, gossip(envelope))
    net.run(0.05)
    assert [ack.count for ack in first.heard_of(wire.Ack)] == [1]
    assert not second.heard_of(wire.Ack)  # it only passed on what another has published: it waits for no word of it


def test_what_others_published_is_counted_but_not_acknowledged_by_itself(seed: int) -> None:
    net = Network(seed)
    one = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(one)
    foreign = Puppet(net, "author elsewhere").seal(1, b"of another")
    puppet.send(one, gossip(foreign))
    net.run(0.1)
    assert not puppet.heard_of(wire.Ack)
    puppet.send(one, gossip(puppet.seal(1, b"its own")))
    net.run(0.1)
    assert [ack.count for ack in puppet.heard_of(wire.Ack)] == [2]


def test_progress_goes_on_when_new_neighbours_join(seed: int) -> None:
    net = Network(seed)
    peers = star(net, 2)
    net.run(2.0)
    net.publish(peers[0], b"one", b"two")
    net.run(1.0)
    assert reached(peers[0])
    Auditor(net, peers[0])
    joiner = net.add_peer()
    net.discover(joiner, peers[0])
    assert net.run_until(lambda: joiner.id in peers[0].overlay.neighbors, 1.0)
    assert peers[0].progress == Progress(2, 0)  # the newcomer holds nothing yet
    assert net.run_until(lambda: reached(peers[0]), 2.0)


def test_without_a_neighbour_nothing_is_held_by_all(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(2.0)
    net.publish(one, b"heard")
    net.run(1.0)
    assert one.progress == Progress(1, 1)
    net.crash(other)
    assert one.progress == Progress(1, 0)


def test_what_was_published_before_the_first_neighbour_counts(seed: int) -> None:
    net = Network(seed)
    early = net.add_peer()
    net.publish(early, *[b"%d" % n for n in range(300)])
    assert early.progress is None
    Auditor(net, early)
    other = net.add_peer()
    net.discover(other, early)
    assert net.run_until(lambda: reached(early), 3.0)


@pytest.mark.parametrize("size", [10, 60_000])
def test_a_window_that_is_pulled_in_parts_is_acknowledged_when_it_is_there(size: int, seed: int) -> None:
    """More than one answer may carry: the rest is offered, asked for and acknowledged."""
    net = Network(seed)
    early = net.add_peer()
    for n in range(200):
        net.publish(early, b"%04d" % n + bytes(size))
        net.run(0.001)
    Auditor(net, early)
    other = net.add_peer()
    net.discover(other, early)
    assert net.run_until(lambda: reached(early), 10.0)
    assert len(other.messages) == 200


def test_a_message_published_while_a_round_is_on_its_way_is_not_taken_for_held(seed: int) -> None:
    for delay in range(12):
        net = Network(seed + delay, latency=(0.02, 0.03))
        one, other = star(net, 2)
        Auditor(net, one, other)
        for _ in range(delay):
            net.publish(one, b"before")
        net.run(0.02 * delay)
        net.publish(one, b"while")
        net.publish(other, b"meanwhile")
        assert net.run_until(lambda: reached(one) and reached(other), 5.0)  # noqa: B023


def test_an_acknowledgement_of_what_was_never_sent_closes_the_channel(seed: int) -> None:
    net = Network(seed)
    one, _ = star(net, 2)
    net.run(2.0)
    puppet = Puppet(net)
    puppet.connect(one)
    puppet.send(one, wire.Ack(10_000))
    net.run(0.1)
    assert [close.peer for close in one.closed] == [puppet.peer.id]


def test_a_neighbour_that_never_acknowledges_holds_up_all_but_not_any(seed: int) -> None:
    net = Network(seed)
    one, _ = star(net, 2)
    net.run(2.0)
    puppet = Puppet(net)
    puppet.connect(one)
    for n in range(100):
        net.publish(one, b"%d" % n)
        net.run(0.01)
    net.run(1.0)
    assert one.progress == Progress(100, 0)
    net.cut(one, puppet.peer)
    assert one.progress == Progress(100, 100)


def test_what_leaves_the_window_before_anybody_came_is_lost(seed: int) -> None:
    net = Network(seed, config=OverlayConfig(max_bytes=5_000))
    one = net.add_peer()
    for n in range(20):
        net.publish(one, b"%04d" % n + bytes(996))
    assert one.progress is not None
    lost = one.progress.lost
    assert 14 <= lost <= 17
    other = net.add_peer()
    net.discover(one, other)
    assert net.run_until(lambda: one.progress == Progress(20, 20, lost), 5.0)
    assert [int(message[:4]) for message in other.messages] == list(range(lost, 20))
