"""Catching up with one peer at a time: who waits, and for how long at most."""

from simulated import Puppet, digests, gossip, star

from solyd_swarm.core import wire
from solyd_swarm.core.catchup import LONGEST, CatchUp
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.recorder import DIGEST_TYPES

MANY = 1500


def test_others_wait_while_there_is_progress() -> None:
    catch_up = CatchUp(patience=5.0)
    assert not catch_up.is_busy(0.0, 0.0)
    catch_up.begin(b"one", 0.0)
    assert catch_up.is_with(b"one")
    assert catch_up.is_busy(4.9, 0.0)
    assert not catch_up.is_busy(5.0, 0.0)
    assert catch_up.is_busy(9.0, 5.0)
    assert not catch_up.is_busy(LONGEST, LONGEST - 1)


def test_who_waited_gets_a_turn_once() -> None:
    catch_up = CatchUp(patience=5.0)
    catch_up.begin(b"one", 0.0)
    for peer in (b"two", b"three", b"two", b"four"):
        catch_up.put_off(peer)
    catch_up.forget(b"three")
    assert catch_up.end(1.0) == [b"two", b"four"]
    assert not catch_up.is_busy(1.1, 1.1)
    assert catch_up.end(2.0) == []
    assert catch_up.may_begin(b"two", 2.0)
    assert not catch_up.may_begin(b"one", 5.9)  # it comes after those who waited
    assert catch_up.may_begin(b"one", 6.0)


def history(net: Network, count: int) -> None:
    """Members that all hold so many messages, of one envelope each."""
    for _ in range(count):
        net.publish(net.peers[0], b"x")
        net.run(0.001)
    net.run(5.0)


def test_a_newcomer_is_told_the_list_once(seed: int) -> None:
    net = Network(seed)
    peers = star(net, 5)
    history(net, MANY)
    joiner = net.add_peer()
    before = sum(net.bytes_by_type[kind] for kind in DIGEST_TYPES)
    for peer in peers:
        net.discover(joiner, peer)
    assert net.run_until(lambda: len(joiner.messages) == MANY, 20.0)
    net.run(3.0)
    assert len(digests([*peers, joiner])) == 1
    assert (sum(net.bytes_by_type[kind] for kind in DIGEST_TYPES) - before) / MANY < 40
    assert len(joiner.delivered) == MANY


def test_a_newcomer_goes_on_with_others_when_the_first_one_dies(seed: int) -> None:
    net = Network(seed, latency=(0.02, 0.05))
    peers = star(net, 4)
    history(net, MANY)
    joiner = net.add_peer()
    for peer in peers:
        net.discover(joiner, peer)
    assert net.run_until(lambda: len(joiner.overlay.log) > MANY // 4, 20.0)
    assert len(joiner.overlay.log) < MANY
    net.crash(net.find(joiner.overlay.antientropy._catchup.peer))
    assert net.run_until(lambda: len(joiner.messages) == MANY, 20.0)
    assert len(joiner.delivered) == MANY


def test_who_claims_much_and_gives_nothing_holds_a_newcomer_up_for_seconds_only(seed: int) -> None:
    net = Network(seed)
    peers = star(net, 3)
    history(net, MANY)
    joiner = net.add_peer(config=OverlayConfig(heal_interval=1000.0))
    puppet = Puppet(net)
    puppet.connect(joiner)
    puppet.send(joiner, wire.Summary(1, 1_000_000, bytes(16)))
    net.run(0.1)
    assert puppet.heard_of(wire.Reconcile)
    net.discover(joiner, peers[1])
    assert net.run_until(lambda: len(joiner.messages) == MANY, 15.0)


def test_what_is_new_meanwhile_comes_over_the_tree(seed: int) -> None:
    net = Network(seed, latency=(0.02, 0.05))
    peers = star(net, 3)
    history(net, MANY)
    joiner = net.add_peer()
    net.discover(joiner, peers[1])
    assert net.run_until(lambda: bool(joiner.overlay.neighbors), 5.0)
    puppet = Puppet(net)
    puppet.connect(peers[2])
    puppet.send(peers[2], gossip(puppet.seal(1, b"news")))
    assert net.run_until(lambda: len(joiner.overlay.log) > MANY // 4, 20.0)
    assert net.run_until(lambda: b"news" in joiner.messages, 15.0)
    assert net.run_until(lambda: len(joiner.messages) == MANY + 1, 15.0)
