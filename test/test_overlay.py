"""One topic as a whole: everything published reaches everybody once, in order, whatever the network does to the frames."""

import pytest
from simulated import digests, disordered, mesh, repeated, star

from solyd_swarm.core.events import Congested, Drained, Publish, Schedule, Tick
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


def published_by_all(net: Network, peers: list[Peer], *, rounds: int = 5, pause: float = 0.05) -> dict[Peer, list[bytes]]:
    """Every peer publishes, in turn, one or several at a time."""
    sent: dict[Peer, list[bytes]] = {peer: [] for peer in peers}
    for n in range(rounds):
        for peer in peers:
            payloads = [b"%d of %d, %d" % (n, peer.index, k) for k in range(1 + n % 3)]
            net.publish(peer, *payloads)
            sent[peer] += payloads
            net.run(pause)
    return sent


def assert_all_have_all(peers: list[Peer], sent: dict[Peer, list[bytes]]) -> None:
    for peer in peers:
        wanted = sorted(payload for other, payloads in sent.items() if other is not peer for payload in payloads)
        assert sorted(peer.messages) == wanted, peer.index
        assert not repeated(peer)
        assert not disordered(peer)


@pytest.mark.parametrize(("count", "loss"), [(2, 0.0), (8, 0.0), (30, 0.0), (2, 0.3), (8, 0.3), (30, 0.3)])
def test_everything_is_delivered_to_all_exactly_once(count: int, loss: float, seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, count)
    net.loss = loss
    sent = published_by_all(net, peers, rounds=5 if count < 30 else 2, pause=0.02)
    complete = lambda: all(len(peer.messages) == sum(map(len, sent.values())) - len(sent[peer]) for peer in peers)  # noqa: E731
    assert net.run_until(complete, 5.0 if not loss else 400.0)
    net.run(1.0)
    assert_all_have_all(peers, sent)
    if not loss:
        assert not any(delivery.late for peer in peers for delivery in peer.delivered)
        assert len(digests(peers)) == 1


def test_everything_is_delivered_while_peers_join(seed: int) -> None:
    net = Network(seed)
    peers = [net.add_peer()]
    sent: dict[Peer, list[bytes]] = {}
    for n in range(12):
        peers.append(net.add_peer())
        net.discover(peers[-1], net.rng.choice(peers[:-1]))
        for peer in peers:
            net.publish(peer, b"%d of %d" % (n, peer.index))
            sent.setdefault(peer, []).append(b"%d of %d" % (n, peer.index))
        net.run(net.rng.random())
    net.run(10.0)
    assert_all_have_all(peers, sent)


def test_no_two_orders_of_one_author(seed: int) -> None:
    net = Network(seed, latency=(0.001, 0.2))
    peers = mesh(net, 10)
    for n in range(200):
        net.publish(peers[0], b"%03d" % n)
        net.run(0.005)
    net.run(10.0)
    for peer in peers[1:]:
        assert peer.messages == [b"%03d" % n for n in range(200)]


def test_what_was_published_before_anyone_was_there_arrives(seed: int) -> None:
    net = Network(seed)
    early = net.add_peer()
    net.publish(early, b"is anybody", b"there?")
    net.run(30.0)
    other = net.add_peer()
    net.publish(other, b"not yet")
    net.discover(other, early)
    net.run(2.0)
    assert other.messages == [b"is anybody", b"there?"]
    assert early.messages == [b"not yet"]


@pytest.mark.parametrize("large", [False, True])
def test_a_late_joiner_gets_the_window(large: bool, seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 5)
    size = 100_000 if large else 10
    payloads = [b"%04d" % n + bytes(size) for n in range(100)]
    for place, payload in enumerate(payloads):
        net.publish(peers[place % 2], payload)
        net.run(0.01)
    net.run(3.0)
    joiner = net.add_peer()
    net.discover(joiner, peers[3])
    net.run(5.0)
    assert sorted(joiner.messages) == payloads
    assert not disordered(joiner)
    assert not any(each.late for each in joiner.delivered)
    assert len(digests([*peers, joiner])) == 1


def test_a_joiner_begins_where_the_window_does(seed: int) -> None:
    net = Network(seed, config=OverlayConfig(window=60.0))
    one, other = mesh(net, 2)
    net.publish(one, b"old")
    net.run(61.0)
    net.publish(one, b"new")
    net.run(1.0)
    joiner = net.add_peer()
    net.discover(joiner, other)
    net.run(2.0)
    assert joiner.messages == [b"new"]
    net.publish(one, b"newest")
    assert net.run_until(lambda: joiner.messages == [b"new", b"newest"], 0.5)
    net.run(150.0)
    assert other.messages == [b"old", b"new", b"newest"]
    assert len(one.overlay.log) == len(joiner.overlay.log) == 0


def test_without_replay_only_what_is_published_after_joining_is_delivered(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 5)
    for n in range(50):
        net.publish(peers[n % 5], b"before")
        net.run(0.05)
    net.run(3.0)
    joiner = net.add_peer(config=OverlayConfig(replay=False))
    net.discover(joiner, peers[0])
    net.run(1.0)
    for n in range(5):
        net.publish(peers[n], b"after %d" % n)
        net.run(0.05)
    net.run(2.0)
    assert sorted(joiner.messages) == [b"after %d" % n for n in range(5)]
    assert not any(each.late for each in joiner.delivered)
    # It knows what it did not want by id, so that nobody offers it again and again.
    assert net.run_until(lambda: len(digests([*peers, joiner])) == 1, 60.0)


def test_without_replay_what_is_published_while_nobody_is_connected_is_delivered(seed: int) -> None:
    net = Network(seed)
    early = net.add_peer()
    joiner = net.add_peer(config=OverlayConfig(replay=False))
    net.run(10.0)
    net.publish(early, b"after it joined, before they met")
    net.run(10.0)
    net.discover(joiner, early)
    net.run(2.0)
    assert joiner.messages == [b"after it joined, before they met"]


def test_delivery_begins_though_the_first_round_never_ends(seed: int) -> None:
    net = Network(seed)
    one, other = net.add_peer(), net.add_peer()
    net.filter = lambda sender, receiver, data: data[0] not in (0x41, 0x42, 0x44)
    net.discover(one, other)
    net.run(0.5)
    net.publish(one, b"heard")
    net.run(4.0)
    assert other.messages == [b"heard"]


def test_a_window_larger_than_there_is_room_for_is_delivered_all_the_same(seed: int) -> None:
    net = Network(seed)
    one, other = mesh(net, 2)
    for n in range(50):
        net.publish(one, b"%02d" % n + bytes(1000))
        net.run(0.001)
    net.run(1.0)
    joiner = net.add_peer(config=OverlayConfig(max_bytes=5000))
    net.discover(joiner, other)
    net.run(5.0)
    assert [payload[:2] for payload in joiner.messages] == [b"%02d" % n for n in range(50)]
    assert joiner.overlay.log.bytes <= 5000


def test_a_link_that_comes_back_brings_what_was_missed(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 6)
    for other in peers[1:]:
        net.cut(peers[0], other)
    peers[0].overlay.membership.passive.clear()
    net.publish(peers[1], b"missed")
    net.publish(peers[0], b"said meanwhile")
    net.run(0.01)
    net.discover(peers[0], peers[2])
    net.run(5.0)
    assert peers[0].messages == [b"missed"]
    assert all(peer.messages.count(b"said meanwhile") == 1 for peer in peers[1:])


def test_a_neighbour_that_is_congested_now_and_then_still_gets_everything(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 8)
    slow = peers[1]
    for n in range(100):
        for other in list(slow.overlay.neighbors):
            net.feed(net.find(other), Congested(slow.id) if n % 3 else Drained(slow.id))
        net.publish(peers[0], b"%d" % n)
        net.run(0.05)
    net.run(5.0)
    assert slow.messages == [b"%d" % n for n in range(100)]


def test_a_message_of_the_largest_size_travels(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    net.publish(peers[0], b"small", bytes(16 * 1024 * 1024), b"small too")
    net.run(5.0)
    for peer in peers[1:]:
        assert [len(payload) for payload in peer.messages] == [5, 16 * 1024 * 1024, 9]
    assert not any(peer.closed for peer in peers)


def test_time_is_asked_for_only_ahead(seed: int) -> None:
    """A deadline in the past would make the driver spin."""
    net = Network(seed, config=OverlayConfig(window=20.0))
    peers = mesh(net, 4, settle=0.0)
    for peer in peers:
        handle = peer.overlay.handle

        def spy(event: object, now: float, handle: object = handle) -> object:
            actions = handle(event, now)  # type: ignore[operator]
            assert all(action.at > now for action in actions if isinstance(action, Schedule))
            return actions

        peer.overlay.handle = spy  # type: ignore[assignment, method-assign]
    for n in range(40):
        net.publish(net.rng.choice(net.living), b"%d" % n)
        net.run(net.rng.random() * 3)
        if n == 20:
            net.crash(peers[3])


def test_deadlines_are_kept_while_frames_pour_in(seed: int) -> None:
    """Looking at them is skipped for frequent frames, but what is due is done: bodies expire, gaps are given up."""
    net = Network(seed, config=OverlayConfig(window=10.0))
    one, other = mesh(net, 2)
    dropped: list[bytes] = []
    net.filter = lambda sender, receiver, data: b"never arrives" not in data
    net.publish(one, b"never arrives")
    for n in range(1000):
        net.publish(one, b"%d" % n)
        net.run(0.02)
        if n == 200:
            assert other.messages[:3] == [b"0", b"1", b"2"]  # after three digest periods
    assert not dropped
    assert len(one.overlay.log) < 1100
    bodies = sum(1 for _, id in one.overlay.log.items if one.overlay.log.get(id).envelope)  # type: ignore[union-attr]
    assert bodies < 600


def test_after_leaving_nothing_is_done_any_more(seed: int) -> None:
    net = Network(seed)
    one, other = mesh(net, 2)
    net.leave(one)
    assert one.overlay.closed
    assert one.overlay.handle(Publish(1, 1, [b"x"]), net.now) == []
    assert one.overlay.handle(Tick(), net.now + 100) == []
    net.run(1.0)
    assert [down.reason for down in other.neighbor_downs] == ["left"]


def test_a_star_of_eight_hears_the_first_message_within_a_second(seed: int) -> None:
    net = Network(seed)
    peers = star(net, 8)
    net.run(0.5)
    net.publish(peers[-1], b"hello")
    assert net.run_until(lambda: all(peer.messages for peer in peers[:-1]), 1.0)
