"""Pulls: runs that are asked for by their ends, and what is said again when it was lost."""

import pytest
from simulated import Puppet, digests, star

from solyd_swarm.core import wire
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.events import Tick
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.core.wire import decode
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

QUIET = OverlayConfig(antientropy=AntiEntropyConfig(digest_interval=1000.0, digest_interval_max=1000.0), heal_interval=1000.0)


def published(net: Network, count: int) -> tuple[Peer, list[bytes]]:
    """A peer that has published so many messages, and their ids in the order of the digest."""
    peer = net.add_peer(config=QUIET)
    for n in range(count):
        net.publish(peer, b"%d" % n)
        net.run(0.001)
    return peer, [id for _, id in peer.overlay.log.items]


def ask(net: Network, puppet: Puppet, peer: Peer, *runs: tuple[bytes, bytes], ids: tuple[bytes, ...] = ()) -> list[bytes]:
    """What comes back for a Pull, in order: payloads, or the ids of what is said to be gone."""
    heard = len(puppet.heard)
    puppet.send(peer, wire.Pull(list(ids), wire.MAX_AGE, list(runs)))
    net.run(0.5)
    answers = []
    for _, frame in puppet.heard[heard:]:
        if isinstance(frame, wire.Transfer):
            answers.append(frame.body.rpartition(b"\xc4")[2][1:])  # its one payload is what it ends with
        elif isinstance(frame, wire.Gone):
            answers.append(frame.id)
    return answers


def test_a_run_is_answered_from_end_to_end(seed: int) -> None:
    net = Network(seed)
    peer, ids = published(net, 40)
    puppet = Puppet(net)
    puppet.connect(peer)
    assert ask(net, puppet, peer, (ids[3], ids[9])) == [b"%d" % n for n in range(3, 10)]
    assert ask(net, puppet, peer, (ids[5], ids[5]), (ids[38], ids[39]), ids=(ids[0],)) == [b"0", b"5", b"38", b"39"]


def test_runs_that_make_no_sense_cost_nothing(seed: int) -> None:
    net = Network(seed)
    peer, ids = published(net, 40)
    puppet = Puppet(net)
    puppet.connect(peer)
    assert ask(net, puppet, peer, (ids[9], ids[3])) == []
    unknown = bytes(32)
    assert ask(net, puppet, peer, (ids[9], unknown)) == [b"9", unknown]
    assert not peer.closed


def test_many_runs_are_no_lever(seed: int) -> None:
    """A frame of 70 kB could ask for 1024 times all there is."""
    net = Network(seed)
    peer, ids = published(net, 5000)
    puppet = Puppet(net)
    puppet.connect(peer)
    net.run(1.0)
    before = sum(net.bytes_by_type)
    puppet.send(peer, wire.Pull([], wire.MAX_AGE, [(ids[0], ids[-1])] * wire.MAX_RUNS))
    net.run(1.0)
    assert len(puppet.heard_of(wire.Transfer)) <= wire.MAX_BATCH
    assert sum(net.bytes_by_type) - before < 3 * 1024 * 1024
    assert not peer.closed


def test_what_is_missed_in_a_row_is_asked_for_by_its_ends(seed: int) -> None:
    net = Network(seed)
    peer, _ = published(net, 300)
    other = net.add_peer(config=QUIET)
    asked: list[wire.Pull] = []

    def see(sender: Peer, receiver: Peer, data: bytes) -> bool:
        frame = decode(data)
        if isinstance(frame, wire.Pull):
            asked.append(frame)
        return True

    net.filter = see
    net.discover(other, peer)
    assert net.run_until(lambda: len(other.messages) == 300, 5.0)
    assert sum(len(frame.runs) for frame in asked) <= 30
    assert sum(len(frame.ids) for frame in asked) <= 10


@pytest.mark.parametrize("kind", [wire.Summary, wire.Reconcile, wire.Pull, wire.Transfer, wire.InSync])
def test_what_was_lost_is_said_again(kind: type[wire.Frame], seed: int) -> None:
    """Where nothing else would bring it: no further round is due for a long time."""
    net = Network(seed)
    one, other = star(net, 2, config=QUIET)
    net.run(5.0)
    net.filter = lambda sender, receiver, data: data[0] not in (wire.Gossip.TYPE, wire.Ihave.TYPE)
    net.publish(one, b"lost")
    net.run(1.0)
    dropped = 0

    def lose_one(sender: Peer, receiver: Peer, data: bytes) -> bool:
        nonlocal dropped
        lost = data[0] == kind.TYPE and not dropped
        dropped += lost
        return not lost

    net.filter = lose_one
    one.overlay.antientropy.open_round(one.overlay.neighbors[other.id], net.now)
    net.feed(one, Tick())
    assert net.run_until(lambda: other.messages == [b"lost"] and len(digests([one, other])) == 1, 12.0)
    assert dropped or kind is wire.InSync
