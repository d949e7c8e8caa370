"""Forgeries and replays: neither delivered nor relayed, and none keeps the original out."""

import pytest
from simulated import Puppet, come_back, digests, gossip, mesh

from solyd_swarm.core import wire
from solyd_swarm.core.envelope import Envelope, seal
from solyd_swarm.core.events import Publish, Received
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.network import TOPIC_ID, Network
from solyd_swarm.simulation.peer import Peer

SHORT = OverlayConfig(window=20.0)


def transfer(envelope: Envelope, age: int = 0) -> wire.Transfer:
    return wire.Transfer(age, 0, envelope.body, envelope.signature)


def forgeries(original: Envelope, liar: Puppet) -> list[tuple[bytes, bytes]]:
    """What a forger without the author's key can make of an envelope."""
    body, signature = bytearray(original.body), bytearray(original.signature)
    body[-1] ^= 1
    signature[0] ^= 1
    in_the_name_of = seal(TOPIC_ID, original.author, original.epoch, original.first, original.time, (b"forged",), liar.sign)
    elsewhere = seal(b"another topic...", liar.author, 1, 1, 1, (b"other topic",), liar.sign)
    return [
        (original.body, bytes(signature)),
        (bytes(body), original.signature),
        (in_the_name_of.body, in_the_name_of.signature),
        (elsewhere.body, elsewhere.signature),
        (b"", bytes(64)),
    ]


def published(net: Network, peer: Peer, payload: bytes) -> Envelope:
    """Publishes, and returns the envelope before anyone else has it."""
    net.publish(peer, payload)
    found = [record.envelope for _, id in peer.overlay.log.items if (record := peer.overlay.log.get(id)) is not None]
    return next(envelope for envelope in found if envelope is not None and payload in envelope.body)


def hand(net: Network, puppet: Puppet, peer: Peer, *frames: wire.Frame) -> None:
    """Frames that are there before all others."""
    net.feed(peer, Received(puppet.peer.id, [wire.encode(frame) for frame in frames]))


@pytest.mark.parametrize("kind", [wire.Gossip, wire.Transfer])
@pytest.mark.parametrize("which", range(5))
def test_a_forgery_that_comes_first_does_not_suppress_the_original(which: int, kind: type[wire.Gossip | wire.Transfer], seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 4)
    puppet = Puppet(net)
    others = [peers[0], *peers[2:]]
    for peer in others:
        puppet.connect(peer)
    original = published(net, peers[1], b"original")
    for peer in others:
        hand(net, puppet, peer, kind(0, 0, *forgeries(original, puppet)[which]))
        assert [close.peer for close in peer.closed] == [puppet.peer.id]
    net.run(3.0)
    assert all(peer.messages == [b"original"] for peer in others)
    assert len(digests(peers)) == 1


def test_an_envelope_is_judged_by_its_author_not_by_who_brings_it(seed: int) -> None:
    """Another's honest envelope, in a stranger's frame and with a made-up age, is as good as from anyone."""
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    original = published(net, peers[1], b"original")
    hand(net, puppet, peers[0], gossip(original, age=100_000, hops=9))
    net.run(2.0)
    assert peers[0].messages == peers[2].messages == [b"original"]
    assert not peers[0].closed


@pytest.mark.parametrize("age", [1_000_000, 2**40])
def test_a_lie_about_its_age_does_not_suppress_an_envelope(age: int, seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    for peer in peers[1:]:
        puppet.connect(peer)
    original = published(net, peers[0], b"original")
    for peer in peers[1:]:
        hand(net, puppet, peer, gossip(original, age=age), transfer(original, age=age))
    net.run(3.0)
    assert peers[1].messages == peers[2].messages == [b"original"]


def test_a_lie_about_its_age_does_not_keep_an_announced_envelope_from_being_asked_for(seed: int) -> None:
    net = Network(seed)
    one, other = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(other)
    one.overlay.neighbors[other.id].eager = False
    original = published(net, one, b"original")
    hand(net, puppet, other, gossip(original, age=int(other.overlay.log.window * 1000) + 1))
    net.run(1.0)
    assert other.messages == [b"original"]


def replay_everywhere(net: Network, puppet: Puppet, peers: list[Peer], envelopes: list[Envelope]) -> None:
    """By every way there is: pushed, announced and served, offered and served; twice."""
    for _ in range(2):
        for peer in peers:
            for envelope in envelopes:
                puppet.send(peer, gossip(envelope), transfer(envelope))
                puppet.send(peer, wire.Ihave([envelope.id], [0]), wire.Have([envelope.id]))
        net.run(1.0)
        for sender, frame in list(puppet.heard):
            if isinstance(frame, wire.Graft | wire.Pull):
                for envelope in envelopes:
                    if envelope.id in frame.ids:
                        puppet.send(net.find(sender), gossip(envelope), transfer(envelope))
        net.run(2.0)


def envelopes_of(peer: Peer) -> list[Envelope]:
    return [each.envelope for each in peer.delivered]


def assert_silent(net: Network, puppet: Puppet, peers: list[Peer], envelopes: list[Envelope]) -> None:
    """Replays, and looks whether anyone delivers or relays."""
    before = [len(peer.messages) for peer in peers]
    relayed: list[bytes] = []

    def watch(sender: Peer, receiver: Peer, data: bytes) -> bool:
        frame = wire.decode(data)
        if sender is not puppet.peer and isinstance(frame, wire.Gossip | wire.Transfer | wire.Ihave):
            relayed.append(data)
        return True

    net.filter = watch
    replay_everywhere(net, puppet, peers, envelopes)
    assert [len(peer.messages) for peer in peers] == before
    assert relayed == []
    assert not any(peer.closed for peer in peers)


def test_a_replay_after_the_ids_have_expired_is_neither_delivered_nor_relayed(seed: int) -> None:
    net = Network(seed, config=SHORT)
    peers = mesh(net, 4)
    for n in range(5):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    net.run(1.0)
    old = envelopes_of(peers[1])
    net.run(50.0)
    assert all(len(peer.overlay.log) == 0 for peer in peers)
    puppet = Puppet(net)
    for peer in peers:
        puppet.connect(peer)
    assert_silent(net, puppet, peers, old)
    assert all(len(peer.overlay.log) == 0 for peer in peers)


@pytest.mark.parametrize("clock", [0, -1_000_000_000, 1_000_000_000])
def test_a_replay_after_its_author_has_restarted_is_neither_delivered_nor_relayed(clock: int, seed: int) -> None:
    """Its epoch is new whatever its clock says, and the time in an envelope means nothing."""
    net = Network(seed, config=SHORT)
    peers = mesh(net, 4)
    net.now += 2000.0
    net.publish(peers[0], b"old")
    net.run(1.0)
    old = envelopes_of(peers[1])
    again = come_back(net, peers[0], epoch=2)
    net.discover(again, peers[1])
    net.run(5.0)
    net.feed(again, Publish(1, max(0, int(net.now * 1e6) + clock * 1000), [b"new"]))
    again.next_sequence = 2
    net.run(2.0)
    members = [*peers[1:], again]
    assert all(peer.messages == [b"old", b"new"] for peer in peers[1:])
    net.run(50.0)
    puppet = Puppet(net)
    for peer in members:
        puppet.connect(peer)
    assert_silent(net, puppet, members, old + envelopes_of(peers[1])[1:])
    net.publish(again, b"newer")
    net.run(2.0)
    assert all(peer.messages == [b"old", b"new", b"newer"] for peer in peers[1:])


def test_a_replay_after_its_receiver_has_restarted_is_neither_delivered_nor_relayed(seed: int) -> None:
    net = Network(seed, config=SHORT)
    peers = mesh(net, 4)
    for n in range(3):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    net.run(1.0)
    old = envelopes_of(peers[1])
    net.run(50.0)
    again = come_back(net, peers[1], epoch=2)
    net.discover(again, peers[2])
    net.run(30.0)
    puppet = Puppet(net)
    members = [peers[0], *peers[2:], again]
    for peer in members:
        puppet.connect(peer)
    assert_silent(net, puppet, members, old)
    assert again.messages == []


def test_a_replay_pushed_to_a_receiver_just_restarted_is_neither_delivered_nor_relayed(seed: int) -> None:
    net = Network(seed, config=SHORT)
    peers = mesh(net, 3)
    net.publish(peers[0], b"old")
    net.run(1.0)
    old = envelopes_of(peers[1])
    net.run(50.0)
    again = come_back(net, peers[1], epoch=2)
    net.discover(again, peers[2])
    puppet = Puppet(net)
    puppet.connect(again)
    net.run(2.0)
    assert_silent(net, puppet, [again, peers[2]], old)


def test_a_receiver_that_restarts_within_the_window_repeats_nothing_misses_nothing_and_serves_others(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    for n in range(10):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    net.run(1.0)
    net.crash(peers[1])
    net.publish(peers[0], b"missed")
    net.run(2.0)
    again = come_back(net, peers[1], epoch=2)
    net.discover(again, peers[2])
    net.run(5.0)
    assert again.messages == [b"missed"]
    assert not any(each.late for each in again.delivered)
    assert len(digests([peers[0], peers[2], again])) == 1
    net.publish(peers[0], b"live")
    net.run(1.0)
    assert again.messages == [b"missed", b"live"]
    # It holds the window again: whoever joins through it misses nothing though all others leave.
    net.crash(peers[0])
    net.crash(peers[2])
    joiner = net.add_peer()
    net.discover(joiner, again)
    net.run(3.0)
    assert joiner.messages == [b"%d" % n for n in range(10)] + [b"missed", b"live"]


@pytest.mark.parametrize("forgetful", [False, True])
def test_an_authors_own_older_epochs_come_back_to_it_and_are_kept_but_not_delivered(forgetful: bool, seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    for n in range(5):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    net.run(1.0)
    again = come_back(net, peers[0], epoch=2, forgetful=forgetful)
    net.discover(again, peers[1])
    net.run(3.0)
    net.publish(again, b"second life")
    net.run(2.0)
    assert again.messages == []
    assert len(digests([again, *peers[1:]])) == 1
    assert peers[1].messages == peers[2].messages == [b"0", b"1", b"2", b"3", b"4", b"second life"]
    for peer in peers[1:]:
        net.crash(peer)
    joiner = net.add_peer()
    net.discover(joiner, again)
    net.run(3.0)
    assert sorted(joiner.messages) == sorted(peers[1].messages)


def test_an_author_cannot_be_made_to_repeat_itself_within_one_life(seed: int) -> None:
    net = Network(seed, config=SHORT)
    one, other = mesh(net, 2)
    net.publish(one, b"old")
    net.run(1.0)
    old = envelopes_of(other)
    net.run(50.0)
    puppet = Puppet(net)
    puppet.connect(one)
    assert_silent(net, puppet, [one], old)
    assert one.equivocations == []
