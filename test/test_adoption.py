"""Whoever is behind a neighbour that has stopped reading gets a link to whoever is before it, beside what either has."""

import pytest
from simulated import Puppet, mesh

from solyd_swarm.core import wire
from solyd_swarm.core.adoption import ASK_PAUSE, SHED_PAUSE, TELL_PAUSE
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.events import Congested, Drained, LinkUp
from solyd_swarm.core.membership import MembershipConfig
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.core.wire import PeerInfo
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

SIZES = MembershipConfig()
# Puppets answer nothing: neither digests nor requests for a place; trades would disturb what is counted.
CALM = OverlayConfig(
    membership=MembershipConfig(mixes=0, shuffle_interval=10_000.0),
    antientropy=AntiEntropyConfig(digest_interval=10_000.0, digest_interval_max=10_000.0),
    heal_interval=10_000.0,
)


class Scene:
    """A peer whose five neighbours are puppets, the first of them the slow one; and others that it knows nothing of."""

    def __init__(self, seed: int) -> None:
        self.net = Network(seed, latency=(0.001, 0.001), config=CALM)
        self.peer = self.net.add_peer()
        self.slow, *self.rest = self.near = [Puppet(self.net, f"near {number}") for number in range(5)]
        self.far = [Puppet(self.net, f"far {number}") for number in range(6)]
        for puppet in self.near:
            puppet.connect(self.peer)
        assert self.neighbors == self.near

    @property
    def neighbors(self) -> list[Puppet]:
        return [puppet for puppet in (*self.near, *self.far) if puppet.peer.id in self.peer.overlay.neighbors]

    def tell(self, *others: Puppet) -> None:
        """The slow one tells of its neighbours."""
        self.slow.send(self.peer, wire.View([info(other) for other in others]))
        self.net.run(0.01)

    def stop(self, *which: Puppet) -> None:
        for puppet in which or (self.slow,):
            self.net.feed(self.peer, Congested(puppet.peer.id))
        self.net.run(0.1)

    def asked(self) -> list[Puppet]:
        """Who was asked for a place instead of the slow one."""
        return [puppet for puppet in (*self.near, *self.far) if wire.Neighbor(False, self.slow.peer.id) in puppet.heard_of(wire.Neighbor)]

    def answer(self, *puppets: Puppet, accepted: bool = True) -> None:
        for puppet in puppets:
            puppet.send(self.peer, wire.NeighborReply(accepted))
        self.net.run(0.01)

    def ask(self, puppet: Puppet, instead: Puppet) -> bool:
        """Asks the peer for a place."""
        puppet.connect(self.peer, join=False)
        puppet.send(self.peer, wire.Neighbor(False, instead.peer.id))
        self.net.run(0.01)
        return puppet.heard_of(wire.NeighborReply)[-1].accepted


def info(puppet: Puppet, *, tells_addresses: bool = True) -> PeerInfo:
    return PeerInfo(puppet.peer.id, puppet.peer.address if tells_addresses else ())


def neighbours_of(peer: Peer) -> set[bytes]:
    return set(peer.overlay.neighbors)


def test_neighbours_are_told_of_one_another_once_views_rest(seed: int) -> None:
    scene = Scene(seed)
    scene.net.run(TELL_PAUSE)
    for puppet in scene.near:
        assert [other.instance for other in puppet.heard_of(wire.View)[-1].peers] == [
            other.peer.id for other in scene.near if other is not puppet
        ]
        puppet.heard.clear()
    scene.net.run(25.0)
    assert not any(puppet.heard_of(wire.View) for puppet in scene.near)
    scene.slow.send(scene.peer, wire.Leave())
    scene.net.run(0.9 * TELL_PAUSE)
    assert not any(puppet.heard_of(wire.View) for puppet in scene.near)
    scene.net.run(0.2 * TELL_PAUSE)
    assert [len(puppet.heard_of(wire.View)) for puppet in scene.near] == [0, 1, 1, 1, 1]
    assert all(len(puppet.heard_of(wire.View)[0].peers) == 3 for puppet in scene.rest)


def test_whoever_was_behind_the_slow_one_becomes_a_neighbour(seed: int) -> None:
    scene = Scene(seed)
    behind = scene.far[:4]
    scene.tell(*behind)
    assert scene.asked() == []
    scene.stop()
    assert scene.asked() == behind
    scene.answer(*behind)
    assert scene.neighbors == [*scene.near, *behind]  # nobody had to go
    assert len(scene.neighbors) == SIZES.active_most
    for puppet in behind:
        puppet.heard.clear()
    scene.net.publish(scene.peer, b"a message")
    scene.net.run(0.01)
    assert [len(puppet.heard_of(wire.Gossip)) for puppet in behind] == [1, 1, 1, 1]
    assert not scene.slow.heard_of(wire.Gossip)


def test_in_a_swarm_all_neighbours_of_the_slow_one_come_over(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 40, settle=60.0)
    author = peers[7]
    slow = net.find(next(iter(author.overlay.neighbors)))
    behind = neighbours_of(slow) - {author.id}
    before = neighbours_of(author)
    net.feed(author, Congested(slow.id))
    net.run(1.0)
    assert behind <= neighbours_of(author)
    assert before <= neighbours_of(author)
    assert net.run_until(lambda: not net.asymmetric(), 5.0)
    assert all(len(peer.overlay.neighbors) <= SIZES.active_most for peer in peers)
    net.publish(author, b"a message")
    net.run(2.0)
    assert all(b"a message" in peer.messages for peer in peers if peer is not author)


def test_who_refuses_or_is_not_there_is_forgotten(seed: int) -> None:
    scene = Scene(seed)
    scene.tell(*scene.far[:3])
    scene.net.crash(scene.far[2].peer)
    scene.stop()
    scene.answer(scene.far[0], accepted=False)
    scene.net.run(2 * SIZES.request_timeout)
    assert scene.neighbors == scene.near
    membership = scene.peer.overlay.membership
    assert not membership._adopting
    assert not membership._requests


def test_a_grant_that_comes_too_late_is_taken_back(seed: int) -> None:
    """Views stay symmetric."""
    scene = Scene(seed)
    scene.tell(scene.far[0])
    scene.stop()
    scene.net.run(2 * SIZES.request_timeout)
    scene.answer(scene.far[0])
    assert scene.neighbors == scene.near
    assert scene.far[0].heard_of(wire.Disconnect)


def test_where_most_do_not_drain_our_own_line_is_slow(seed: int) -> None:
    scene = Scene(seed)
    scene.tell(*scene.far[:4])
    scene.stop(*scene.rest[:3])
    scene.stop()
    assert scene.asked() == []
    for puppet in scene.rest[:3]:
        scene.net.feed(scene.peer, Drained(puppet.peer.id))
    scene.stop()
    assert scene.asked() == scene.far[:4]


def test_only_who_is_behind_a_neighbour_of_ours_may_ask(seed: int) -> None:
    """Nobody gets a place beyond the usual by naming just anybody."""
    scene = Scene(seed)
    one, two, three, four, five, six = scene.far
    assert not scene.ask(one, scene.slow)  # it has told of nobody yet
    scene.tell(one, two, three, four, five)
    assert not scene.ask(six, scene.slow)
    assert not scene.ask(one, six)
    assert not scene.ask(one, one)
    for puppet in (one, two, three, four):
        assert scene.ask(puppet, scene.slow)
    assert scene.neighbors == [*scene.near, one, two, three, four]
    assert not scene.ask(five, scene.slow)  # nine are enough
    assert scene.ask(four, scene.slow)  # it is a neighbour
    assert len(scene.neighbors) == SIZES.active_most


def test_what_a_neighbour_has_told_goes_with_it(seed: int) -> None:
    scene = Scene(seed)
    scene.tell(scene.far[0])
    scene.slow.send(scene.peer, wire.Disconnect())
    scene.net.run(0.01)
    assert not scene.peer.overlay.adoption._heard
    scene.far[5].connect(scene.peer)  # so that there is no room
    assert not scene.ask(scene.far[0], scene.slow)
    scene.stop()
    assert scene.asked() == []


def test_only_neighbours_are_listened_to(seed: int) -> None:
    scene = Scene(seed)
    stranger = scene.far[0]
    stranger.connect(scene.peer, join=False)
    scene.net.run(SIZES.part_pause)
    stranger.send(scene.peer, wire.View([info(scene.far[1])]))
    scene.net.run(0.01)
    assert not scene.peer.overlay.adoption._heard
    assert stranger.heard_of(wire.Disconnect)  # it takes itself for a neighbour


def test_made_up_views_cause_few_dials(seed: int) -> None:
    scene = Scene(seed)
    made_up = [PeerInfo(scene.net.rng.randbytes(32), (("203.0.113.1", port),)) for port in range(1, wire.MAX_PEERS + 1)]
    for _ in range(20):
        scene.slow.send(scene.peer, wire.View(made_up))
        scene.net.run(0.01)
    assert len(scene.peer.overlay.adoption._heard[scene.slow.peer.id]) == SIZES.active_most
    membership = scene.peer.overlay.membership
    membership._fill_soon()
    scene.net.feed(scene.peer, Congested(scene.slow.peer.id))
    assert len(membership._requests) + len(scene.neighbors) <= SIZES.active_most
    assert len(membership._adopting) == SIZES.active_most - SIZES.active_size
    scene.net.run(2 * SIZES.request_timeout)
    assert not membership._adopting


def test_who_lags_now_and_then_has_us_dial_no_more_often(seed: int) -> None:
    scene = Scene(seed)
    asked = 0
    for _ in range(100):
        scene.tell(*scene.far[:4])
        scene.net.feed(scene.peer, Congested(scene.slow.peer.id))
        asked += len(scene.peer.overlay.membership._adopting)
        scene.net.run(0.1)
        scene.answer(*scene.far[:4], accepted=False)
        scene.net.feed(scene.peer, Drained(scene.slow.peer.id))
    assert asked == 4
    scene.net.run(ASK_PAUSE)
    scene.stop()
    assert len(scene.far[0].heard_of(wire.Neighbor)) == 2


def test_two_that_ask_one_another_both_make_room_for_nobody(seed: int) -> None:
    """The other one's View may not have come yet; but we have asked it."""
    scene = Scene(seed)
    scene.tell(scene.far[0])
    scene.stop()
    del scene.peer.overlay.adoption._heard[scene.slow.peer.id]
    scene.far[0].send(scene.peer, wire.Neighbor(False, scene.slow.peer.id))
    scene.net.run(0.01)
    assert scene.neighbors == [*scene.near, scene.far[0]]


def test_a_channel_from_the_other_side_does_as_well(seed: int) -> None:
    """Both dial, and one of the two channels stays."""
    scene = Scene(seed)
    scene.tell(scene.far[0])
    scene.net.feed(scene.peer, Congested(scene.slow.peer.id))
    scene.net.feed(scene.peer, LinkUp(scene.far[0].peer.id, scene.far[0].author, scene.far[0].peer.address, False))
    assert scene.peer.overlay.membership._adopting
    assert scene.far[0].peer.id in scene.peer.overlay.membership._requests


def test_who_can_not_be_dialled_may_ask_all_the_same(seed: int) -> None:
    """Behind a NAT: others are told of it without addresses, which may not be told to all."""
    scene = Scene(seed)
    scene.slow.send(scene.peer, wire.View([info(scene.far[0], tells_addresses=False)]))
    scene.net.run(0.01)
    scene.stop()
    assert scene.asked() == []
    assert not scene.peer.overlay.membership._requests
    assert scene.ask(scene.far[0], scene.slow)
    assert scene.far[0] in scene.neighbors


def test_places_that_the_tree_does_not_use_are_given_up_one_by_one(seed: int) -> None:
    scene = Scene(seed)
    behind = scene.far[:4]
    scene.tell(*behind)
    scene.stop()
    scene.answer(*behind)
    for puppet in (scene.slow, *behind[:2], scene.rest[0]):
        puppet.send(scene.peer, wire.Prune())
    scene.net.run(0.9 * SHED_PAUSE)
    assert len(scene.neighbors) == 9
    counts = []
    for _ in range(6):
        scene.net.run(SHED_PAUSE)
        counts.append(len(scene.neighbors))
    assert counts == [8, 7, 6, 5, 5, 5]
    assert set(scene.neighbors) == {*scene.rest[1:], *behind[2:]}
    parted = (scene.slow, *behind[:2], scene.rest[0])
    assert all(puppet.heard_of(wire.Disconnect) for puppet in parted)


def test_links_of_the_tree_are_kept_however_many(seed: int) -> None:
    scene = Scene(seed)
    scene.tell(*scene.far[:4])
    scene.stop()
    scene.answer(*scene.far[:4])
    scene.net.cut(scene.peer, scene.slow.peer)
    scene.net.run(10 * SHED_PAUSE)
    assert len(scene.neighbors) == 8


def test_a_newcomer_takes_one_place_of_a_large_view(seed: int) -> None:
    scene = Scene(seed)
    scene.tell(*scene.far[:4])
    scene.stop()
    scene.answer(*scene.far[:4])
    before = scene.neighbors
    scene.far[4].connect(scene.peer)  # by Join, which is always granted
    assert scene.far[4] in scene.neighbors
    assert len(scene.neighbors) == SIZES.active_most
    assert len(set(before) - set(scene.neighbors)) == 1


@pytest.mark.parametrize("count", [2, 3, 6])
def test_in_a_small_swarm_there_is_nobody_to_adopt(seed: int, count: int) -> None:
    net = Network(seed)
    peers = mesh(net, count, settle=10.0)
    assert all(len(peer.overlay.neighbors) == count - 1 for peer in peers)
    one, other = peers[:2]
    net.feed(one, Congested(other.id))
    net.run(60.0)
    assert all(len(peer.overlay.neighbors) == count - 1 for peer in peers)
    assert not net.asymmetric()
