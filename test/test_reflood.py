"""Where the tree has failed, the next envelope goes over all links, and the fastest stays."""

import pytest
from simulated import Puppet, gossip

from solyd_swarm.core import link as module
from solyd_swarm.core import wire
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.envelope import envelope_id
from solyd_swarm.core.lateness import SOLO
from solyd_swarm.core.link import Link
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.core.wire import PeerInfo
from solyd_swarm.simulation.network import Network

QUIET = OverlayConfig(antientropy=AntiEntropyConfig(digest_interval=1000.0, digest_interval_max=1000.0), heal_interval=1000.0)


class Scene:
    """A peer whose tree leads to `branch` and to `child`; `first` and `second` are lazy. The branch is the author."""

    def __init__(self, seed: int) -> None:
        self.net = Network(seed, latency=(0.001, 0.001), config=QUIET)
        self.peer = self.net.add_peer()
        self.branch, self.child, self.first, self.second = self.all = [Puppet(self.net, name) for name in ("branch", "child", "1st", "2nd")]
        for each in self.all:
            each.connect(self.peer)
        for lazy in (self.first, self.second):
            self.link(lazy).eager = False
        self.number = 0

    def link(self, puppet: Puppet) -> Link:
        return self.peer.overlay.neighbors[puppet.peer.id]

    def next(self, age: int = 0) -> wire.Gossip:
        self.number += 1
        return gossip(self.branch.seal(self.number, b"%d" % self.number), age=age, hops=2)

    def usual(self, count: int = SOLO + 2) -> None:
        """Messages that come over the tree, before anybody announces them."""
        for _ in range(count):
            self.branch.send(self.peer, self.next())
            self.net.run(0.1)
        self.forget()

    def forget(self) -> None:
        for each in self.all:
            each.heard.clear()

    def fail(self) -> wire.Gossip:
        """A message that the branch does not bring; `first` announces it, is asked and gives it."""
        message = self.next()
        self.first.send(self.peer, wire.Ihave([wire_id(message)], [2]))
        self.net.run(0.15)
        assert [graft.ids for graft in self.first.heard_of(wire.Graft)] == [[wire_id(message)]]
        self.first.send(self.peer, message)
        self.net.run(0.1)
        return message


def wire_id(message: wire.Gossip) -> bytes:
    return envelope_id(message.body)


def grafts(puppet: Puppet) -> int:
    return sum(not graft.ids for graft in puppet.heard_of(wire.Graft))


def test_after_a_failure_the_fastest_link_stays(seed: int) -> None:
    scene = Scene(seed)
    scene.usual()
    message = scene.fail()
    assert scene.peer.overlay.broadcast.ways.refloods == 1
    assert [grafts(each) for each in scene.all] == [0, 0, 0, 1]
    assert [len(each.heard_of(wire.Gossip)) for each in scene.all] == [1, 1, 0, 0]  # not to whom had it, nor to whom it is announced
    assert [wire_id(message)] in [announced.ids for announced in scene.second.heard_of(wire.Ihave)]
    scene.forget()
    following = scene.next()
    for each in (scene.second, scene.first, scene.branch):
        each.send(scene.peer, following)
        scene.net.run(0.01)
    assert [scene.link(each).eager for each in scene.all] == [False, True, False, True]
    assert [len(each.heard_of(wire.Prune)) for each in scene.all] == [1, 0, 1, 0]
    assert len(scene.peer.messages) == scene.number


def test_a_second_copy_of_what_was_grafted_changes_no_link(seed: int) -> None:
    """It was on its way before the race began."""
    scene = Scene(seed)
    scene.usual()
    message = scene.fail()
    for each in (scene.branch, scene.second):
        each.send(scene.peer, message)
    scene.net.run(0.1)
    assert all(scene.link(each).eager for each in scene.all)
    scene.branch.send(scene.peer, message)  # a third one is what it always was
    scene.net.run(0.1)
    assert not scene.link(scene.branch).eager


def test_a_link_that_was_lazy_before_it_was_asked_goes_back_to_that(seed: int) -> None:
    """The tree was only slower than usual: the branch brings the message when it has been asked for already."""
    scene = Scene(seed)
    scene.usual(3)
    message = scene.next()
    scene.first.send(scene.peer, wire.Ihave([wire_id(message)], [2]))
    scene.net.run(0.15)
    assert scene.first.heard_of(wire.Graft)
    assert scene.link(scene.first).eager
    scene.branch.send(scene.peer, message)
    scene.net.run(0.01)
    scene.first.send(scene.peer, message)
    scene.net.run(0.1)
    assert scene.peer.overlay.broadcast.ways.refloods == 0  # others may speak
    assert [scene.link(each).eager for each in scene.all] == [True, True, False, False]


def test_where_several_speak_nothing_is_flooded(seed: int) -> None:
    """The tree is a compromise between them; it is mended by grafts alone."""
    scene = Scene(seed)
    scene.usual()
    scene.child.send(scene.peer, gossip(scene.child.seal(1, b"another author's"), hops=2))
    scene.net.run(0.1)
    scene.fail()
    assert scene.peer.overlay.broadcast.ways.refloods == 0
    assert [grafts(each) for each in scene.all] == [0, 0, 0, 0]


def test_a_second_failure_right_after_the_first_waits(seed: int) -> None:
    scene = Scene(seed)
    scene.usual()
    scene.fail()
    scene.link(scene.second).eager = False
    scene.forget()
    scene.branch.send(scene.peer, scene.next())
    scene.net.run(0.01)
    scene.forget()
    scene.fail()
    assert scene.peer.overlay.broadcast.ways.refloods == 1
    assert grafts(scene.second) == 0
    scene.usual(140)  # failures so close together are taken for lost frames
    scene.link(scene.second).eager = False
    scene.fail()
    assert scene.peer.overlay.broadcast.ways.refloods == 2
    assert grafts(scene.second) == 1


def test_a_late_message_that_nobody_announced_is_a_failure_too(seed: int) -> None:
    """All neighbours wait where the tree fails further up; then its age tells."""
    scene = Scene(seed)
    scene.usual()
    message = scene.next(age=60)
    scene.branch.send(scene.peer, message)
    scene.child.send(scene.peer, message)
    scene.net.run(0.1)
    assert scene.peer.overlay.broadcast.ways.refloods == 1
    assert [grafts(each) for each in scene.all] == [0, 0, 1, 1]
    assert all(scene.link(each).eager for each in scene.all)  # the second copy was late as well
    scene.branch.send(scene.peer, scene.next(age=60))
    scene.net.run(0.1)
    assert scene.peer.overlay.broadcast.ways.refloods == 1


def test_what_was_caught_up_on_elsewhere_is_no_failure(seed: int) -> None:
    """It is of age where it comes from; the tree has nothing to do with that."""
    scene = Scene(seed)
    scene.usual()
    scene.branch.send(scene.peer, scene.next(age=60_000))
    scene.net.run(0.1)
    assert scene.peer.overlay.broadcast.ways.refloods == 0


def test_who_cannot_take_pushes_is_not_asked_for_them(seed: int) -> None:
    scene = Scene(seed)
    scene.usual()
    scene.link(scene.second).congested = True
    scene.fail()
    assert scene.peer.overlay.broadcast.ways.refloods == 1
    assert grafts(scene.second) == 0
    assert not scene.link(scene.second).eager


def test_where_frames_get_lost_anyway_nothing_is_flooded(seed: int) -> None:
    scene = Scene(seed)
    scene.usual()
    scene.peer.overlay.broadcast._grafted_share = 0.5
    message = scene.next()
    scene.first.send(scene.peer, wire.Ihave([wire_id(message)], [2]))
    scene.net.run(0.5)
    scene.first.send(scene.peer, message)
    scene.net.run(0.1)
    assert scene.peer.overlay.broadcast.ways.refloods == 0


def test_what_was_here_before_a_graft_says_nothing_of_the_link(seed: int) -> None:
    """The other end was pushed it by somebody else, before our pushes could reach it: it has lost no race."""
    scene = Scene(seed)
    scene.usual()
    message = scene.next()
    scene.branch.send(scene.peer, message)
    scene.net.run(0.01)
    scene.first.send(scene.peer, wire.Graft([]))
    scene.net.run(0.01)
    scene.first.send(scene.peer, message)
    scene.net.run(0.1)
    assert scene.link(scene.first).eager
    assert not scene.first.heard_of(wire.Prune)
    message = scene.next()
    for each in (scene.branch, scene.first):
        each.send(scene.peer, message)
        scene.net.run(0.01)
    assert not scene.link(scene.first).eager
    assert len(scene.first.heard_of(wire.Prune)) == 1


def test_our_own_message_that_comes_back_makes_a_link_lazy(seed: int) -> None:
    scene = Scene(seed)
    scene.usual()
    scene.first.send(scene.peer, wire.Graft([]))
    scene.net.run(0.01)
    scene.net.publish(scene.peer, b"ours")
    scene.net.run(0.01)
    (own,) = scene.first.heard_of(wire.Gossip)
    scene.first.send(scene.peer, own)
    scene.net.run(0.1)
    assert not scene.link(scene.first).eager


@pytest.mark.parametrize("count", [module.MAX_SPARED, 10 * module.MAX_SPARED])
def test_copies_that_never_come_do_not_fill_memory(count: int) -> None:
    link = Link(PeerInfo(bytes(32), ()), bytes(32), initiated=True)
    for number in range(count):
        link.spare(b"%d" % number)
    assert len(link._spared) == module.MAX_SPARED
    assert link.is_spared(b"%d" % (count - 1))
    assert not link.is_spared(b"%d" % (count - 1))
    assert not link.is_spared(b"%d" % (count - module.MAX_SPARED - 1))
