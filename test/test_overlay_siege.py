"""Members that stall, withhold, and ask for work without end: what one of them can do to the others is bounded."""

import pytest
from simulated import Puppet, gossip, mesh, star

from solyd_swarm.core import log as log_module
from solyd_swarm.core import wire
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.events import Dial, NeighborDown, Received, Send
from solyd_swarm.core.membership import MembershipConfig
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.core.wire import encode
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

QUIET = OverlayConfig(antientropy=AntiEntropyConfig(digest_interval=100.0, digest_interval_max=100.0), heal_interval=1000.0)
NOTHING = bytes([0x61, 0, 0, 2, 0])
"""A Negentropy message: no ids at all, up to infinity."""


def publish(net: Network, peer: Peer, count: int) -> list[bytes]:
    """So many messages of an envelope each; returns their ids."""
    for number in range(count):
        net.publish(peer, b"%d" % number)
        if number % 10 == 9:
            net.run(0.01)
    net.run(1.0)
    return [record.id for record in peer.overlay.log.records()]


# -- work and memory ----------------------------------------------------------------------------------------------


def test_who_says_again_and_again_that_it_holds_nothing_is_offered_everything_once_in_a_while(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer()
    puppet = Puppet(net)
    publish(net, peer, 1000)
    puppet.connect(peer, join=False)
    net.run(1.0)
    count = len(peer.overlay.log.items)
    frames = []
    for number in range(1, 51):  # the steps of a conversation can be foreseen
        frames += [encode(wire.Summary(number, count, bytes(16))), encode(wire.Reconcile(number, False, NOTHING, number))]
    actions = peer.overlay.handle(Received(puppet.peer.id, frames), net.now)
    assert sum(len(action.data) for action in actions if isinstance(action, Send)) < 3 * 32 * count
    net.run(1.0)
    puppet.heard.clear()
    puppet.send(peer, wire.Summary(99, count, bytes(16)))
    net.run(0.2)
    assert puppet.heard_of(wire.Reconcile)


def test_a_neighbour_that_never_answers_is_asked_for_days_on_end(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(peer)
    puppet.send(peer, wire.Have([net.rng.randbytes(32)]))
    net.run(1.0)
    peer.overlay.antientropy.pulls._queues[puppet.peer.id].failures = 5000
    puppet.send(peer, wire.Have([net.rng.randbytes(32)]))
    net.run(200.0)
    other = net.add_peer()
    net.discover(other, peer)
    net.run(1.0)
    net.publish(other, b"hello")
    net.run(1.0)
    assert peer.messages == [b"hello"]


def test_goodbye_and_join_repeated_set_off_walks_once(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 20, settle=30.0)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    net.run(2.0)
    before = net.frames_by_type[wire.ForwardJoin.TYPE]
    puppet.send(peers[0], *[wire.Disconnect(), wire.Join()] * 100)
    net.run(1.0)
    one_join = 5 * 7  # each of five neighbours begins a walk of at most seven steps
    assert net.frames_by_type[wire.ForwardJoin.TYPE] - before <= one_join


def test_ids_that_somebody_made_up_take_no_place_of_what_we_hold(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_IDS", 400)
    monkeypatch.setattr(log_module, "MAX_HEARSAY", 200)
    net = Network(seed)
    peer = net.add_peer()
    publish(net, peer, 100)
    for _ in range(1000):
        peer.overlay.log.add_gone(net.rng.randbytes(32), 1, 0.0, net.now)
    records = list(peer.overlay.log.records())
    assert sum(record.envelope is not None for record in records) == 100
    assert sum(record.stream is None for record in records) == 200
    assert peer.overlay.log.max_age(net.now) == peer.overlay.log.window


# -- withholding --------------------------------------------------------------------------------------------------


def test_who_answers_something_else_does_not_keep_what_it_was_asked_for_to_itself(seed: int) -> None:
    net = Network(seed)
    members = star(net, 4)
    ids = publish(net, members[0], 300)
    joiner = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(joiner)
    puppet.send(joiner, wire.Have(ids))
    net.run(0.1)
    for member in members:
        net.discover(joiner, member)
    made_up: set[bytes] = set()
    for _ in range(60):
        if net.now % 0.5 < 0.25:
            made_up.add(id := net.rng.randbytes(32))
            puppet.send(joiner, wire.Have([id]))
        asked = {id for pull in puppet.heard_of(wire.Pull) for id in pull.ids}
        puppet.heard.clear()
        puppet.send(joiner, *[wire.Gone(id, False, 0, 0) for id in asked & made_up])
        net.run(0.25)
    assert len(joiner.messages) == 300


def test_who_begins_one_conversation_after_the_other_lets_others_have_their_turn(seed: int) -> None:
    net = Network(seed, latency=(0.02, 0.03))
    members = star(net, 4)
    publish(net, members[0], 1000)
    joiner = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(joiner)
    puppet.send(joiner, wire.Summary(1, 2**52, bytes(16)))
    net.run(0.1)
    for member in members:
        net.discover(joiner, member)
    round, seen, begun = 1, 0, net.now
    for _ in range(200):
        net.run(0.5)
        for query in [query for query in puppet.heard_of(wire.Reconcile) if query.step > seen]:
            seen = query.step
            if net.now < begun + 20.0:  # something differs, over and over
                answer = bytes([0x61, 0, 0, 1]) + net.rng.randbytes(16)
                puppet.send(joiner, wire.Reconcile(query.round, False, answer, query.step))
                continue
            round, begun = round + 1, net.now
            end = wire.Reconcile(query.round, False, bytes([0x61]), query.step)
            puppet.send(joiner, end, wire.Summary(round, 2**52, bytes(16)))
        puppet.heard.clear()
        if len(joiner.messages) == 1000:
            return
    pytest.fail(f"the joiner has {len(joiner.messages)} of 1000")


def test_who_is_late_with_its_answers_does_not_delay_what_another_announces(seed: int) -> None:
    net = Network(seed, config=QUIET)
    peer = net.add_peer()
    slow, quick = Puppet(net, "slow"), Puppet(net, "quick")
    slow.connect(peer)
    quick.connect(peer)
    net.run(1.0)
    link, other = (peer.overlay.neighbors[puppet.peer.id] for puppet in (slow, quick))
    for _ in range(20):
        link.round_trip.sample(4.0)
        other.round_trip.sample(0.02)
    envelope = quick.seal(1, b"news")
    slow.send(peer, wire.Ihave([envelope.id], [1]))
    net.run(0.05)
    quick.send(peer, wire.Ihave([envelope.id], [1]))
    assert net.run_until(lambda: bool(quick.heard_of(wire.Graft)), 2.0)


def test_what_no_neighbour_keeps_is_had_from_somebody_else(seed: int) -> None:
    """Members without replay know what was published before they came, and have none of it to give."""
    config = OverlayConfig(membership=MembershipConfig(active_size=2, mixes=0))
    net = Network(seed)
    holder = net.add_peer()
    publish(net, holder, 20)
    without = [net.add_peer(config=OverlayConfig(replay=False)) for _ in range(12)]
    for peer in without:
        net.discover(peer, holder)
    net.run(60.0)
    joiner = net.add_peer(config=config)
    for peer in without[:2]:
        net.discover(joiner, peer)
    assert net.run_until(lambda: len(joiner.messages) == 20, 60.0)


# -- divisions that there are not ---------------------------------------------------------------------------------


def test_ids_without_bodies_do_not_make_a_swarm_believe_that_it_is_divided(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 15, settle=60.0)
    for peer in peers:
        for other in net.rng.sample(peers, 6):
            net.discover(peer, other)
    puppet = Puppet(net)
    puppet.connect(peers[0], join=False)
    net.run(10.0)
    before = sum(len(peer.neighbor_downs) for peer in peers)
    made_up: list[bytes] = []
    for _ in range(20):
        made_up.append(net.rng.randbytes(32))
        puppet.send(peers[0], wire.Have(made_up[-6:]))  # for 60 s each, so that it is said to be gone twice
        net.run(5.0)
        for asker, frame in puppet.heard:
            if isinstance(frame, wire.Pull):
                puppet.send(net.find(asker), *[wire.Gone(id, True, 1000, 10_000) for id in frame.ids if id in made_up])
        puppet.heard.clear()
        net.run(5.0)
        if peers[0].id not in puppet.peer.links:
            puppet.connect(peers[0], join=False)
    assert any(peer.overlay.log.rumours for peer in peers[1:])  # it has got about
    assert sum(len(peer.neighbor_downs) for peer in peers) - before <= 2


def test_what_is_caught_up_on_does_not_count_as_a_failure_of_the_tree(seed: int) -> None:
    net = Network(seed, config=QUIET)
    peer = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(peer)
    net.run(5.0)
    for age, failing in ((60_000, False), (0, True)):
        for number in range(1, 6):
            envelope = puppet.seal(number, b"x", epoch=1 + failing)
            puppet.send(peer, wire.Ihave([envelope.id], [0]))
            assert net.run_until(lambda: bool(puppet.heard_of(wire.Graft)), 5.0)
            puppet.heard.clear()
            puppet.send(peer, gossip(envelope, age=age))
            net.run(0.1)
        assert peer.overlay.broadcast.is_failing == failing


# -- no neighbour, few neighbours ---------------------------------------------------------------------------------


def test_whoever_is_alone_asks_the_members_it_has_a_link_to(seed: int) -> None:
    config = OverlayConfig(membership=MembershipConfig(active_size=1, mixes=0), heal_interval=1000.0)
    net = Network(seed, config=config)
    peer = net.add_peer()
    one, other = Puppet(net, "one"), Puppet(net, "other")
    one.connect(peer)
    other.connect(peer, join=False)
    net.run(5.0)
    assert list(peer.overlay.neighbors) == [one.peer.id]
    other.heard.clear()
    one.send(peer, wire.Leave())
    net.run(0.1)
    assert other.heard_of(wire.Join)


def test_a_few_that_nobody_has_room_for_get_a_place_all_the_same(seed: int) -> None:
    """A clique of three that knows of one of six: all six views are full."""
    config = OverlayConfig(antientropy=AntiEntropyConfig(rounds=False), heal_interval=1000.0)
    net = Network(seed, config=config)
    six = star(net, 6)
    net.run(20.0)
    assert all(len(peer.overlay.neighbors) == 5 for peer in six)
    three = star(net, 3)
    net.run(5.0)
    for peer in three:
        net.discover(peer, six[0])
    assert net.run_until(net.graph_is_connected, 30.0)
    net.run(60.0)
    before = sum(len(peer.neighbor_downs) for peer in net.peers)
    net.run(300.0)
    assert net.graph_is_connected()
    assert sum(len(peer.neighbor_downs) for peer in net.peers) == before  # and it comes to rest


def test_no_trade_is_none(seed: int) -> None:
    net = Network(seed, config=OverlayConfig(membership=MembershipConfig(mixes=0), heal_interval=1000.0))
    peers = mesh(net, 30, settle=40.0)
    changes = [len(peer.neighbor_downs) for peer in peers]
    net.run(60.0)
    assert [len(peer.neighbor_downs) for peer in peers] == changes
    assert all(peer.overlay.membership._mixes == 0 for peer in peers)


# -- smaller matters ----------------------------------------------------------------------------------------------


def test_a_round_that_was_never_ended_does_not_keep_us_from_the_next(seed: int) -> None:
    net = Network(seed, config=QUIET)
    peer = net.add_peer()
    publish(net, peer, 50)
    puppet = Puppet(net)
    puppet.connect(peer, join=False)
    for round in range(1, 4):
        puppet.heard.clear()
        puppet.send(peer, wire.Summary(round, 0, bytes(16)))
        net.run(0.2)
        answers = puppet.heard_of(wire.Summary)
        assert answers
        puppet.send(peer, wire.Reconcile(answers[-1].round, True, NOTHING, 1))  # takes it up, and never says Done
        net.run(30.0)
        if peer.id not in puppet.peer.links:
            puppet.do(Dial(peer.id, peer.address))
            net.run(0.2)


def test_the_gap_of_one_author_does_not_hide_that_of_another(seed: int) -> None:
    net = Network(seed, config=QUIET)
    peer = net.add_peer()
    one, other = Puppet(net, "one"), Puppet(net, "other")
    for puppet in (one, other):
        puppet.connect(peer)
    net.run(5.0)
    one.send(peer, gossip(one.seal(1, b"1")), gossip(one.seal(3, b"3")))
    net.run(0.5)
    other.heard.clear()
    other.send(peer, gossip(other.seal(1, b"1")), gossip(other.seal(3, b"3")))
    net.run(0.5)
    assert other.heard_of(wire.Summary)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_held_in_doubt_goes_to_every_neighbour_when_we_leave(seed: int, lazy: bool) -> None:
    net = Network(seed)
    peer = net.add_peer()
    neighbour, giver = Puppet(net, "neighbour"), Puppet(net, "giver")
    neighbour.connect(peer)
    net.run(5.0)
    giver.connect(peer, join=False)
    if lazy:
        neighbour.send(peer, wire.Prune())
    net.run(0.1)
    envelope = giver.seal(1, b"news")
    giver.send(peer, wire.Transfer(0, 0, envelope.body, envelope.signature))
    net.run(0.1)
    assert len(peer.overlay.doubts) == 1
    neighbour.heard.clear()
    net.leave(peer)
    net.run(0.2)
    assert [frame.body for frame in neighbour.heard_of(wire.Gossip)] == [envelope.body]


@pytest.mark.parametrize("kind", [wire.Have, wire.Ihave])
def test_a_neighbour_that_offers_it_ends_a_doubt(seed: int, kind: type[wire.Frame]) -> None:
    config = OverlayConfig(membership=MembershipConfig(active_size=1, mixes=0))
    net = Network(seed, config=config)
    peer = net.add_peer()
    neighbour, giver = Puppet(net, "neighbour"), Puppet(net, "giver")
    neighbour.connect(peer)
    net.run(5.0)
    giver.connect(peer, join=False)
    envelope = giver.seal(1, b"news")
    giver.send(peer, wire.Transfer(0, 0, envelope.body, envelope.signature))
    net.run(0.1)
    assert len(peer.overlay.doubts) == 1
    neighbour.send(peer, wire.Have([envelope.id]) if kind is wire.Have else wire.Ihave([envelope.id], [3]))
    net.run(0.1)
    assert not len(peer.overlay.doubts)
    giver.heard.clear()
    net.run(8.0)
    assert not giver.heard_of(wire.Neighbor)
    assert not [down for down in peer.neighbor_downs if isinstance(down, NeighborDown)]
