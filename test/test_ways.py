"""A shorter way that has opened is offered on: the envelope is pushed over all links, and whoever has had it says so."""

from simulated import gossip
from test_reflood import Scene, wire_id

from solyd_swarm.core import wire
from solyd_swarm.core.lateness import SOLO
from solyd_swarm.simulation.network import Network


def pushed(scene: Scene) -> list[int]:
    """How many envelopes each puppet was pushed since."""
    counts = [len(puppet.heard_of(wire.Gossip)) for puppet in scene.all]
    scene.forget()
    return counts


def spreads(scene: Scene) -> int:
    return scene.peer.overlay.broadcast.ways.spreads


def settled(seed: int) -> Scene:
    scene = Scene(seed)
    scene.usual()
    assert spreads(scene) == 0
    return scene


def test_a_way_over_another_link_is_offered_to_all(seed: int) -> None:
    scene = settled(seed)
    message = scene.next()
    scene.first.send(scene.peer, message)
    scene.net.run(0.01)
    assert pushed(scene) == [1, 1, 0, 1]
    assert spreads(scene) == 1
    for each in (scene.branch, scene.child):  # one has had it, and one has a quicker way
        each.send(scene.peer, wire.Prune())
    scene.net.run(0.01)
    scene.first.send(scene.peer, scene.next())
    scene.net.run(0.1)
    assert pushed(scene) == [0, 0, 0, 1]
    assert spreads(scene) == 1


def test_a_way_that_has_become_shorter_before_us_is_offered_to_all(seed: int) -> None:
    for age, expected in ((30, [0, 1, 1, 1]), (44, [0, 1, 1, 1]), (46, [0, 1, 0, 0]), (60, [0, 1, 0, 0])):
        scene = Scene(seed)
        for _ in range(SOLO + 2):
            scene.branch.send(scene.peer, scene.next(age=50))
            scene.net.run(0.1)
        scene.forget()
        scene.branch.send(scene.peer, scene.next(age=age))
        scene.net.run(0.01)
        assert pushed(scene) == expected, age


def test_who_comes_early_after_one_that_was_late_is_as_early_as_ever(seed: int) -> None:
    scene = Scene(seed)
    for number in range(60):
        scene.branch.send(scene.peer, scene.next(age=50 if number % 3 else 70))
        scene.net.run(0.1)
    assert spreads(scene) == 0


def test_what_opens_during_the_pause_is_offered_after_it(seed: int) -> None:
    scene = settled(seed)
    for link in (scene.first, scene.second):
        link.send(scene.peer, scene.next())
        scene.net.run(0.01)
    assert spreads(scene) == 1
    scene.second.send(scene.peer, scene.next())
    scene.net.run(1.0)
    assert spreads(scene) == 1
    scene.forget()
    scene.second.send(scene.peer, scene.next())
    scene.net.run(0.01)
    assert spreads(scene) == 2
    assert pushed(scene) == [1, 1, 1, 0]
    scene.usual(20)  # over the branch again, within the second pause, which has doubled
    assert spreads(scene) == 3


def test_what_had_to_be_asked_for_tells_of_no_shorter_way(seed: int) -> None:
    scene = settled(seed)
    message = scene.next()
    scene.second.send(scene.peer, wire.Ihave([wire_id(message)], [2]))
    scene.net.run(0.06)
    scene.peer.overlay.broadcast._missing[wire_id(message)].asked[scene.second.peer.id] = False
    scene.second.send(scene.peer, message)
    scene.net.run(0.01)
    assert spreads(scene) == 0


def test_where_several_speak_every_way_is_a_compromise(seed: int) -> None:
    scene = settled(seed)
    scene.child.send(scene.peer, gossip(scene.child.seal(1, b"another author's"), hops=2))
    scene.net.run(0.1)
    scene.usual(SOLO - 1)
    scene.first.send(scene.peer, scene.next())
    scene.net.run(0.01)
    assert spreads(scene) == 0


def test_where_frames_get_lost_no_way_is_offered(seed: int) -> None:
    scene = settled(seed)
    scene.peer.overlay.broadcast._grafted_share = 0.5
    scene.first.send(scene.peer, scene.next())
    scene.net.run(0.01)
    assert spreads(scene) == 0


def test_who_does_not_read_is_offered_nothing(seed: int) -> None:
    scene = settled(seed)
    scene.link(scene.second).congested = True
    scene.first.send(scene.peer, scene.next())
    scene.net.run(0.01)
    assert spreads(scene) == 1
    assert pushed(scene) == [1, 1, 0, 0]


def test_a_tree_at_rest_stays_so(seed: int) -> None:
    """Latencies of real networks jitter; a second copy of everything would be the price of every shorter way that is none."""
    net = Network(seed, latency=(0.005, 0.02), jitter=0.002)
    peers = [net.add_peer() for _ in range(20)]
    for place, peer in enumerate(peers[1:], 1):
        net.discover(peer, peers[place // 2])
    net.run(30.0)
    for number in range(600):
        net.publish(peers[0], b"%d" % number)
        net.run(0.05)
    before = net.frames_by_type[wire.Gossip.TYPE]
    for number in range(200):
        net.publish(peers[0], b"more %d" % number)
        net.run(0.05)
    assert net.frames_by_type[wire.Gossip.TYPE] - before <= 1.02 * 200 * 19
