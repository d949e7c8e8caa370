"""Candidates outside our views: two halves that formed apart become one swarm, and equal ones are left in peace."""

import pytest
from simulated import digests, mesh, star

from solyd_swarm.core.doubts import DIVIDED_AGE, MAX_DOUBTS, Doubts
from solyd_swarm.core.events import Dial, DialFailed, Discovered, LinkUp
from solyd_swarm.core.healing import ASK_PAUSE, MAX_CANDIDATES, Healing
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


def halves(net: Network, size: int) -> tuple[list[Peer], list[Peer]]:
    """Two swarms that know nothing of each other, each with something to say."""
    both = star(net, size), star(net, size)
    net.run(5.0)
    for place, half in enumerate(both):
        net.publish(half[0], b"of half %d" % place)
    net.run(5.0)
    return both


@pytest.mark.parametrize("tell_instance", [True, False])
@pytest.mark.parametrize("size", [2, 7, 15])
def test_two_halves_become_one_within_45_seconds(size: int, tell_instance: bool, seed: int) -> None:
    net = Network(seed)
    one, other = halves(net, size)
    assert not net.graph_is_connected()
    for near, far in zip(one, other, strict=True):
        net.discover(near, far, tell_instance=tell_instance)
    assert net.run_until(net.graph_is_connected, 45.0)
    assert net.run_until(lambda: len(digests([*one, *other])) == 1, 10.0)
    for half in (one, other):
        assert all(sorted(peer.messages) == [b"of half 0", b"of half 1"] for peer in half[1:])
    net.run(60.0)
    assert net.graph_is_connected()
    assert net.run_until(lambda: not net.asymmetric(), 2.0)


def test_one_that_is_told_of_the_other_half_is_enough(seed: int) -> None:
    net = Network(seed)
    one, other = halves(net, 8)
    net.discover(one[3], other[5])
    assert net.run_until(lambda: len(digests([*one, *other])) == 1, 60.0)


def test_a_candidate_that_has_no_room_for_us_is_no_less_one(seed: int) -> None:
    """We have room, it has none: refused at first, it is compared with, and kept since it differs."""
    net = Network(seed)
    few, many = star(net, 2), star(net, 6)
    net.run(10.0)
    assert all(len(peer.overlay.neighbors) == 5 for peer in many)
    net.publish(many[0], b"of the many")
    net.run(2.0)
    net.discover(few[0], many[3], tell_instance=bool(seed % 2))
    assert net.run_until(lambda: few[1].messages == [b"of the many"], 60.0)
    assert net.run_until(net.graph_is_connected, DIVIDED_AGE + 1.0)


def test_halves_that_talk_all_the_time_become_one(seed: int) -> None:
    """Each comparison carries over what is new: too young to tell the halves apart by its age, and equal from then on."""
    net = Network(seed)
    one, other = star(net, 12), star(net, 12)
    net.run(10.0)
    for near, far in zip(one, other, strict=True):
        net.discover(near, far)
    begun = net.now
    while not net.graph_is_connected():
        for half in (one, other):
            net.publish(half[0], b"at %f" % net.now)
        net.run(0.5)
        assert net.now - begun <= 15.0
    assert net.run_until(lambda: len(digests([*one, *other])) == 1, 20.0)


@pytest.mark.parametrize("latency", [(0.02, 0.08), (0.05, 0.2)])
def test_a_whole_swarm_under_traffic_keeps_its_neighbours(seed: int, latency: tuple[float, float]) -> None:
    """Members compare all the time, and often one is a moment ahead, or has been announced what the other gives."""
    net = Network(seed, latency=latency, jitter=0.01)
    peers = mesh(net, 30, settle=45.0)
    for peer in peers:
        for other in net.rng.sample(peers, 8):
            if other is not peer:
                net.discover(peer, other)
    downs = sum(len(peer.neighbor_downs) for peer in peers)
    for turn in range(150):
        net.publish(net.rng.choice(peers), b"message %d" % turn)
        net.run(0.2)
    assert sum(len(peer.neighbor_downs) for peer in peers) - downs <= 2
    net.run(15.0)
    assert len(digests(peers)) == 1


def test_who_refuses_at_once_does_not_set_the_pace(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(3.0)
    healing = one.overlay.healing
    link = one.overlay.link(other.id)
    assert link is not None
    asked: list[bytes] = []
    healing._membership.request = lambda link, now, high=False: asked.append(link.peer)
    healing._keep(link, net.now)
    for _ in range(50):
        healing.tick(net.now)
    assert len(asked) == 2
    assert healing.tick(net.now) <= net.now + ASK_PAUSE
    healing.tick(net.now + ASK_PAUSE)
    assert len(asked) == 3


def test_doubts_are_bounded_and_end() -> None:
    concealed: set[bytes] = set()
    doubts = Doubts(concealed.add, concealed.remove)
    ids = [number.to_bytes(32, "big") for number in range(MAX_DOUBTS + 1)]
    assert all(doubts.hold(id, b"giver", 7.0) for id in ids[:-1])
    assert not doubts.hold(ids[-1], b"giver", 7.0)
    assert doubts.concerns(b"giver")
    assert concealed == set(ids[:-1])
    assert doubts.told(ids[0])
    assert not doubts.told(ids[0])
    assert not doubts.told(ids[-1])
    assert doubts.hold(ids[-1], b"other", 8.0)
    assert doubts.next == 7.0
    assert not doubts.due(6.9)
    assert doubts.due(7.0) == [(id, b"giver") for id in ids[1:-1]]
    assert not doubts.concerns(b"giver")
    assert doubts.release(b"giver") == []
    assert concealed == {ids[-1]}
    assert doubts.release(b"other") == [ids[-1]]
    assert doubts.next is None
    assert not concealed


def test_a_candidate_that_differs_is_kept_and_one_that_does_not_is_let_go(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(seed)
    peers = mesh(net, 20, settle=20.0)
    net.publish(peers[0], b"known to all")
    net.run(3.0)
    near = next(peer for peer in peers if len(peer.overlay.neighbors) == 5)
    far = next(peer for peer in peers if near.overlay.link(peer.id) is None and peer is not near and len(peer.overlay.neighbors) == 5)
    compared, kept = [], []
    compare, keep = Healing._compare, Healing._keep
    monkeypatch.setattr(Healing, "_compare", lambda self, link, now: (compared.append(link.peer), compare(self, link, now)))
    monkeypatch.setattr(Healing, "_keep", lambda self, link, now: (kept.append(link.peer), keep(self, link, now)))
    net.discover(near, far)
    net.run(60.0)
    assert far.id in compared or far.id in near.overlay.neighbors  # by a walk, before it was its turn
    assert not kept
    # It is tried again and again, and may be just now.
    assert net.run_until(lambda: not near.overlay.uses(far.id) or far.id in near.overlay.neighbors, 5.0)
    outsider = net.add_peer()
    net.publish(outsider, b"news")
    net.discover(near, outsider)
    # By this candidate, or by another member that heard of it from this one and was quicker.
    assert net.run_until(lambda: bool(outsider.overlay.neighbors) and len(digests([outsider, *peers])) == 1, 45.0)


def test_a_candidate_without_an_instance_that_is_a_neighbour_already_is_left_alone(seed: int) -> None:
    """Dialling it would replace its channel again and again."""
    net = Network(seed)
    one, other = star(net, 2)
    net.run(3.0)
    dials: list[Dial] = []
    for _ in range(10):
        dials += [each for each in one.overlay.handle(Discovered(b"", other.address), net.now) if isinstance(each, Dial)]
        net.run(10.0)
    assert not dials
    assert not one.neighbor_downs


def test_the_last_neighbours_loss_has_the_candidates_tried_at_once(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 7)
    full = next(peer for peer in peers if len(peer.overlay.neighbors) == 5)
    fresh = net.add_peer()
    net.discover(full, fresh, tell_instance=False)
    full.overlay.membership.passive.clear()
    for other in [net.find(id) for id in full.overlay.neighbors]:
        other.overlay.membership.passive.pop(full.id, None)
        net.leave(other)
        net.run(0.001)
    assert net.run_until(lambda: bool(full.overlay.neighbors), 1.0)


def test_candidates_are_bounded(seed: int) -> None:
    net = Network(seed)
    one, _ = star(net, 2)
    net.run(2.0)
    for n in range(2000):
        one.overlay.handle(Discovered(n.to_bytes(32, "big") if n % 2 else b"", (("203.0.113.1", n + 1),)), net.now)
    assert len(one.overlay.healing._candidates) <= MAX_CANDIDATES
    passive_size = one.overlay.membership.config.passive_size
    assert len(one.overlay.membership.passive) <= passive_size
    net.run(100.0)
    assert len(one.overlay.healing._dialled) <= MAX_CANDIDATES + passive_size


def test_we_are_no_candidate_of_ours(seed: int) -> None:
    net = Network(seed)
    one = net.add_peer()
    assert not [each for each in one.overlay.handle(Discovered(one.id, one.address), net.now) if isinstance(each, Dial)]
    assert not [each for each in one.overlay.handle(Discovered(b"x" * 32, ()), net.now) if isinstance(each, Dial)]


def test_a_dial_that_fails_forgets_the_candidate(seed: int) -> None:
    net = Network(seed)
    one = net.add_peer()
    nowhere = Discovered(b"", (("203.0.113.1", 1),))
    assert [each for each in one.overlay.handle(nowhere, net.now) if isinstance(each, Dial)]
    one.overlay.handle(DialFailed(b"", nowhere.addresses), net.now)
    assert not one.overlay.healing._candidates
    assert [each for each in one.overlay.handle(nowhere, net.now) if isinstance(each, Dial)]  # a source may find it again


def test_a_dial_that_fails_because_the_other_sides_came_first_changes_nothing(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(2.0)
    one.overlay.membership._requests[other.id] = net.now + 5
    net.feed(one, DialFailed(other.id, other.address))
    assert other.id in one.overlay.membership._requests
    assert other.id in one.overlay.neighbors


def test_a_channel_that_replaces_another_is_a_link_of_its_own(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(2.0)
    for near, far in ((one, other), (other, one)):
        net.feed(near, LinkUp(far.id, far.overlay.author, far.address, near is one, far.address if near is one else ()))
    net.run(1.0)
    assert one.overlay.neighbors.keys() == {other.id}
    assert other.overlay.neighbors.keys() == {one.id}
    assert [down.reason for down in one.neighbor_downs] == ["replaced by a new connection"]
    net.publish(one, b"goes on")
    net.run(1.0)
    assert other.messages == [b"goes on"]
