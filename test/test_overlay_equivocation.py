"""An author that says two things under one number: reported once at every member, silenced, and the digests agree again."""

import random

import pytest
from simulated import Puppet, come_back, digests, gossip, mesh

from solyd_swarm.core import wire
from solyd_swarm.core.envelope import equivocation_id
from solyd_swarm.core.events import Equivocated
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


def assert_convicted(net: Network, peers: list[Peer], author: bytes, epoch: int = 1) -> None:
    assert net.run_until(lambda: all(peer.overlay.log.ledger.is_silenced(author, epoch) for peer in peers), 20.0)
    assert net.run_until(lambda: len(digests(peers)) == 1, 60.0)
    for peer in peers:
        assert [(each.author, each.epoch) for each in peer.equivocations] == [(author, epoch)]
        record = peer.overlay.log.get(equivocation_id(author, epoch))
        assert record is not None
        assert record.proof is not None
        assert not peer.closed


def test_members_that_saw_different_things_first_agree(seed: int) -> None:
    rng = random.Random(seed)
    net = Network(seed)
    peers = mesh(net, 10)
    puppet = Puppet(net)
    versions = [puppet.seal(1, b"yes"), puppet.seal(1, b"no"), puppet.seal(1, b"yes", b"and no"), puppet.seal(2, b"later")]
    for peer in peers:
        puppet.connect(peer, join=False)
        for version in rng.sample(versions, rng.randrange(1, 4)):
            puppet.send(peer, gossip(version))
    assert_convicted(net, peers, puppet.author)
    for peer in peers:
        assert len([each for each in peer.delivered if each.envelope.first == 1]) <= 1


def test_one_member_that_sees_both_is_enough(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 8)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], gossip(puppet.seal(1, b"yes")))
    net.run(2.0)
    assert all(peer.messages == [b"yes"] for peer in peers)
    puppet.send(peers[0], gossip(puppet.seal(1, b"no")))
    assert_convicted(net, peers, puppet.author)
    puppet.send(peers[0], gossip(puppet.seal(2, b"nothing more")))
    puppet.send(peers[3], gossip(puppet.seal(2, b"nothing more")))
    net.run(3.0)
    assert all(peer.messages == [b"yes"] for peer in peers)


def test_what_waits_for_a_gap_is_not_delivered_any_more(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], gossip(puppet.seal(3, b"waits")))
    net.run(0.5)
    puppet.send(peers[0], gossip(puppet.seal(3, b"or not")))
    assert_convicted(net, peers, puppet.author)
    net.run(10.0)
    assert all(peer.messages == [] for peer in peers)


def test_another_epoch_of_the_author_is_not_silenced(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], gossip(puppet.seal(1, b"yes")), gossip(puppet.seal(1, b"no")))
    puppet.send(peers[0], gossip(puppet.seal(1, b"new life", epoch=2)))
    assert_convicted(net, peers, puppet.author)
    assert all(peer.messages[-1] == b"new life" for peer in peers)


def test_who_joins_later_is_told(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 4)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], gossip(puppet.seal(1, b"yes")), gossip(puppet.seal(1, b"no")))
    assert_convicted(net, peers, puppet.author)
    joiner = net.add_peer()
    puppet.connect(joiner, join=False)
    puppet.send(joiner, gossip(puppet.seal(2, b"believe me")))
    net.run(0.5)
    net.discover(joiner, peers[2])
    assert_convicted(net, [*peers, joiner], puppet.author)


def test_a_member_that_restarts_agrees_again_and_is_not_told_twice(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 4)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], gossip(puppet.seal(1, b"yes")), gossip(puppet.seal(1, b"no")))
    assert_convicted(net, peers, puppet.author)
    again = come_back(net, peers[3], epoch=2)
    net.discover(again, peers[1])
    net.run(2.0)
    assert net.run_until(lambda: len(digests([*peers[:3], again])) == 1, 30.0)
    assert again.equivocations == []


def test_two_halves_that_believed_different_things_agree_when_they_meet(seed: int) -> None:
    net = Network(seed)
    halves = [mesh(net, 3), [net.add_peer() for _ in range(3)]]
    for peer in halves[1][1:]:
        net.discover(peer, halves[1][0])
    net.run(2.0)
    puppet = Puppet(net)
    for half, word in zip(halves, (b"yes", b"no"), strict=True):
        puppet.connect(half[0])
        puppet.send(half[0], gossip(puppet.seal(1, word)), gossip(puppet.seal(2, b"the same to both")))
    net.run(3.0)
    assert [peer.messages for half in halves for peer in half] == [[b"yes", b"the same to both"]] * 3 + [[b"no", b"the same to both"]] * 3
    net.discover(halves[1][2], halves[0][2])
    assert_convicted(net, [*halves[0], *halves[1]], puppet.author)


@pytest.mark.parametrize("age", [0, 5_000, 2**40, 1_199_998])
def test_a_proof_in_an_epoch_too_old_to_remember_ends_nowhere_in_a_storm(age: int, seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 5)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    for epoch in range(100, 130):
        puppet.send(peers[0], gossip(puppet.seal(1, b"x", epoch=epoch)))
    net.run(3.0)
    one, other = puppet.seal(1, b"yes", epoch=2), puppet.seal(1, b"no", epoch=2)
    before = net.frames_sent
    puppet.send(peers[0], wire.Proof(age, one.body, one.signature, other.body, other.signature))
    net.run(20.0)
    assert net.frames_sent - before < 600
    assert all(len(peer.equivocations) == 1 for peer in peers)


def test_what_proves_nothing_closes_the_channel(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    good, bad = puppet.seal(1, b"yes"), puppet.seal(1, b"no")
    for proof in (
        wire.Proof(0, good.body, good.signature, good.body, good.signature),
        wire.Proof(0, good.body, good.signature, bad.body, good.signature),
        wire.Proof(0, good.body, good.signature, puppet.seal(2, b"yes").body, puppet.seal(2, b"yes").signature),
        wire.Proof(0, good.body, good.signature, puppet.seal(1, b"no", epoch=2).body, puppet.seal(1, b"no", epoch=2).signature),
        wire.Proof(0, b"", good.signature, bad.body, bad.signature),
    ):
        closed = len(peers[0].closed)
        puppet.connect(peers[0])
        puppet.send(peers[0], proof)
        net.run(0.5)
        assert len(peers[0].closed) == closed + 1
    assert not any(peer.equivocations for peer in peers)


def test_an_author_convicted_by_its_stolen_key_hears_of_it(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    net.publish(peers[0], b"mine")
    net.run(1.0)
    thief = Puppet(net, "author 0")
    assert thief.author == peers[0].overlay.author
    thief.connect(peers[1])
    thief.send(peers[1], gossip(thief.seal(1, b"not mine")))
    assert_convicted(net, peers, thief.author)
    net.publish(peers[0], b"nobody would take this")
    net.run(1.0)
    assert all(peer.messages == [b"mine"] for peer in peers[1:])


def test_an_equivocation_comes_with_its_proof(seed: int) -> None:
    net = Network(seed, config=OverlayConfig())
    peers = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    puppet.send(peers[0], gossip(puppet.seal(1, b"yes")), gossip(puppet.seal(1, b"no")))
    net.run(1.0)
    (event,) = peers[1].equivocations
    assert isinstance(event, Equivocated)
    assert sorted(envelope.payloads for envelope in event.proof) == [(b"no",), (b"yes",)]


def test_a_proof_that_fits_no_frame_is_shown_by_the_envelopes_themselves(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    half = wire.MAX_ENVELOPE // 2
    puppet.send(peers[0], gossip(puppet.seal(1, b"1" * half)))
    puppet.send(peers[0], gossip(puppet.seal(1, b"2" * half)))
    assert_convicted(net, peers, puppet.author)
    longest = 0

    def measure(sender: Peer, receiver: Peer, data: bytes) -> bool:
        nonlocal longest
        longest = max(longest, len(data))
        return True

    net.filter = measure
    joiner = net.add_peer()
    net.discover(joiner, peers[1])
    assert_convicted(net, [*peers, joiner], puppet.author)
    assert half < longest < wire.MAX_ENVELOPE + 100
