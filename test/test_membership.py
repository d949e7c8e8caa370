"""HyParView: views that are symmetric, bounded and connected, however peers come and go, and whatever a hostile one says."""

import random

import pytest
from simulated import Puppet, mesh, star

from solyd_swarm.core import wire
from solyd_swarm.core.events import Dial, Discovered, LinkDown
from solyd_swarm.core.membership import MAX_SHUFFLE_ROUTES, MembershipConfig
from solyd_swarm.core.wire import MAX_ADDRESSES, MAX_PEERS, PeerInfo
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

SIZES = MembershipConfig()


def full_peer(peers: list[Peer]) -> Peer:
    """One that asks nobody for a place."""
    return next(peer for peer in peers if len(peer.overlay.neighbors) == SIZES.active_size)


def assert_healthy(net: Network, peers: list[Peer]) -> None:
    for peer in peers:
        membership = peer.overlay.membership
        assert len(membership.active) <= SIZES.active_size
        assert len(membership.passive) <= SIZES.passive_size
        assert peer.id not in membership.active
        assert peer.id not in membership.passive
        assert not membership.active.keys() & membership.passive.keys()
    # A request may be on its way at any moment: views are symmetric in between.
    assert net.run_until(lambda: not net.asymmetric(), 2.0), net.asymmetric()
    assert net.graph_is_connected()


@pytest.mark.parametrize("block", range(4))
def test_a_star_of_eight_that_joins_at_once_leaves_nobody_isolated(block: int) -> None:
    """Seeds are fixed: a hundred of them, as this has to hold always."""
    for seed in range(block * 25, block * 25 + 25):
        net = Network(seed)
        peers = star(net, 8)
        net.run(5.0)
        assert all(peer.overlay.neighbors for peer in peers), seed
        assert_healthy(net, peers)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 30])
def test_joins_back_to_back_end_in_one_swarm(count: int, seed: int) -> None:
    net = Network(seed)
    peers = star(net, count, gap=0.05)
    net.run(5.0)
    assert_healthy(net, peers)
    if count <= SIZES.active_size + 1:
        assert all(len(peer.overlay.neighbors) == count - 1 for peer in peers)


def test_a_chain_of_introductions_ends_in_one_swarm(seed: int) -> None:
    net = Network(seed)
    peers = [net.add_peer() for _ in range(20)]
    for one, other in zip(peers[1:], peers, strict=False):
        net.discover(one, other)
    net.run(10.0)
    assert_healthy(net, peers)


def test_peers_that_learn_of_one_another_at_once_end_in_one_swarm(seed: int) -> None:
    """Both dial, both ask: crossing requests."""
    net = Network(seed)
    peers = [net.add_peer() for _ in range(8)]
    for one in peers:
        for other in peers:
            if one is not other:
                net.discover(one, other)
    net.run(5.0)
    assert_healthy(net, peers)


def test_views_stay_healthy_while_time_passes(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 20)
    for _ in range(10):
        net.run(10.0)
        assert_healthy(net, peers)
    assert sum(len(peer.overlay.neighbors) for peer in peers) >= 4 * 20


def test_half_of_the_peers_crash_and_the_rest_stay_one_swarm(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 30, settle=30.0)
    for peer in net.rng.sample(peers, 15):
        net.crash(peer)
    net.run(20.0)
    living = net.living
    assert len(living) == 15
    assert_healthy(net, living)
    gone = {peer.id for peer in peers if not peer.alive}
    assert not any(gone & peer.overlay.neighbors.keys() for peer in living)


def test_who_leaves_is_forgotten(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 8)
    neighbours = [net.find(other) for other in peers[3].overlay.neighbors]
    net.leave(peers[3])
    net.run(5.0)
    assert_healthy(net, net.living)
    for peer in net.living:
        assert peers[3].id not in peer.overlay.neighbors
    for peer in neighbours:
        assert [down.reason for down in peer.neighbor_downs if down.peer == peers[3].id][-1] == "left"


def test_a_cut_link_is_replaced(seed: int) -> None:
    net = Network(seed)
    one, other = mesh(net, 2)
    net.cut(one, other)
    assert not one.overlay.neighbors
    assert net.run_until(lambda: bool(one.overlay.neighbors and other.overlay.neighbors), 3.0)
    assert_healthy(net, [one, other])


def test_requests_that_cross_are_both_granted_though_there_is_no_room(seed: int) -> None:
    """Each side's yes is on its way already: a no would leave one of them with a neighbour that has it not."""
    net = Network(seed)
    peers = mesh(net, 8)
    victim = full_peer(peers)
    puppet = Puppet(net)
    puppet.connect(victim, join=False)
    puppet.send(victim, wire.Neighbor(False))
    net.run(0.1)
    assert [reply.accepted for reply in puppet.heard_of(wire.NeighborReply)] == [False]
    victim.overlay.membership.request(victim.overlay.link(puppet.peer.id), net.now, high=True)
    puppet.send(victim, wire.Neighbor(False))
    net.run(0.1)
    assert [reply.accepted for reply in puppet.heard_of(wire.NeighborReply)] == [False, True]
    assert puppet.peer.id in victim.overlay.neighbors
    assert len(victim.overlay.neighbors) == SIZES.active_size


def test_a_no_that_follows_a_yes_that_was_taken_back_counts(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    assert puppet.peer.id in peers[0].overlay.neighbors
    puppet.send(peers[0], wire.NeighborReply(False))
    net.run(0.02)
    assert puppet.peer.id not in peers[0].overlay.neighbors
    assert peers[0].neighbor_downs[-1].reason == "has no room"


def test_a_lost_neighbour_is_sought_among_candidates_without_an_instance_too(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(2.0)
    third = net.add_peer()
    full = MembershipConfig(active_size=1)
    one.overlay.membership.config = full
    net.discover(one, third, tell_instance=False)
    net.run(0.5)
    assert third.id not in one.overlay.neighbors
    net.leave(other)
    assert net.run_until(lambda: third.id in one.overlay.neighbors, 2.0)


def test_a_source_that_repeats_itself_causes_no_second_dial(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(2.0)
    for tell_instance in (True, False):
        net.discover(one, other, tell_instance=tell_instance)
    stranger = Discovered(b"s" * 32, (("10.9.9.9", 1),))
    dials = [each for _ in range(5) for each in one.overlay.handle(stranger, net.now) if isinstance(each, Dial)]
    assert len(dials) == 1
    net.run(5.0)
    assert one.neighbor_downs == other.neighbor_downs == []


def test_a_replaced_channel_makes_the_two_neighbours_again(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(2.0)
    net.cut(one, other)
    net.run(3.0)
    assert [down.reason for down in one.neighbor_downs] == ["connection lost"]
    assert other.id in one.overlay.neighbors
    assert one.id in other.overlay.neighbors


# -- hostile peers --------------------------------------------------------------------------------------------


def made_up(n: int) -> PeerInfo:
    return PeerInfo(n.to_bytes(32, "big"), ((f"203.0.113.{n % 250}", 1 + n % 60_000),))


def dials_of(net: Network, peer: Peer) -> list[Dial]:
    """What the peer dials from now on."""
    dials: list[Dial] = []
    handle = peer.overlay.handle

    def spy(event: object, now: float) -> object:
        actions = handle(event, now)  # type: ignore[arg-type]
        dials.extend(each for each in actions if isinstance(each, Dial))
        return actions

    peer.overlay.handle = spy  # type: ignore[assignment, method-assign]
    return dials


def test_made_up_walks_do_not_have_us_dial_all_the_world(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 4)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    dials = dials_of(net, peers[0])
    for n in range(500):
        puppet.send(peers[0], wire.ForwardJoin(made_up(n), n % 7))
    net.run(1.0)
    assert len(dials) <= 40
    assert len(peers[0].overlay.membership._requests) <= SIZES.active_size
    net.run(20.0)
    assert_healthy_but_for(net, peers, puppet)


def assert_healthy_but_for(net: Network, peers: list[Peer], puppet: Puppet) -> None:
    puppet.peer.died = 0.0
    for peer in peers:
        net.cut(puppet.peer, peer)
    net.run(30.0)
    assert_healthy(net, peers)


def test_a_hostile_neighbour_cannot_fill_a_passive_view(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 25, settle=40.0)
    victim = peers[0]
    puppet = Puppet(net)
    puppet.connect(victim)
    honest = {peer.id for peer in peers}
    before = len(honest & victim.overlay.membership.passive.keys())
    for n in range(300):
        batch = [made_up(n * MAX_PEERS + k) for k in range(MAX_PEERS)]
        puppet.send(victim, wire.ShuffleReply(victim.id, batch), wire.Shuffle(made_up(n), 1, batch))
        puppet.send(victim, wire.NeighborReply(True, batch))
    net.run(0.5)
    assert puppet.peer.id in victim.overlay.neighbors
    passive = victim.overlay.membership.passive
    assert len(passive) <= SIZES.passive_size
    assert before >= 10
    assert len(honest & passive.keys()) >= 5


def test_hearsay_does_not_replace_what_a_peer_said_of_itself(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 12, settle=10.0)
    victim = peers[0]
    puppet = Puppet(net)
    puppet.connect(victim)
    known = victim.overlay.membership.passive
    before = {id: info.addresses for id, (info, _) in known.items() if id != puppet.peer.id}
    assert before
    puppet.send(victim, wire.ShuffleReply(victim.id, [PeerInfo(peer.id, (("203.0.113.1", 1),)) for peer in peers]))
    net.run(0.1)
    assert all(known[id][0].addresses == addresses for id, addresses in before.items() if id in known)


def test_a_join_repeated_sets_off_no_more_walks(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 6)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    net.run(1.0)
    before = net.frames_sent
    for _ in range(100):
        puppet.send(peers[0], wire.Join())
    net.run(0.3)
    assert net.frames_sent - before < 100 + 100 + 100  # each is answered, and that is all


def test_the_longest_shuffle_is_answered_by_no_longer_one(seed: int) -> None:
    """Else the honest peer that answers would be cut off by the honest peer that passes the answer on."""
    net = Network(seed)
    peers = mesh(net, 8)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    for n in range(40):
        peers[0].overlay.membership.discovered(*([made_up(n).instance, made_up(n).addresses]))
    assert len(peers[0].overlay.membership.passive) + len(peers[0].overlay.neighbors) > MAX_PEERS
    puppet.send(peers[0], wire.Shuffle(PeerInfo(puppet.peer.id), 1, [made_up(n) for n in range(MAX_PEERS)]))
    net.run(0.5)
    assert [len(reply.peers) for reply in puppet.heard_of(wire.ShuffleReply)] == [MAX_PEERS]
    assert not any(peer.closed for peer in peers)


def test_routes_of_walks_are_bounded(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 4)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    for n in range(1000):
        puppet.send(peers[0], wire.Shuffle(made_up(n), 6, []))
    net.run(0.5)
    assert len(peers[0].overlay.membership._shuffle_routes) <= MAX_SHUFFLE_ROUTES


def test_walks_are_taken_of_neighbours_only(seed: int) -> None:
    net = Network(seed)
    victim = full_peer(mesh(net, 8))
    puppet = Puppet(net)
    puppet.connect(victim, join=False)
    puppet.send(victim, wire.ForwardJoin(made_up(1), 0), wire.Shuffle(made_up(2), 0, [made_up(3)]))
    puppet.send(victim, wire.ShuffleReply(victim.id, [made_up(4)]), wire.NeighborReply(False, [made_up(5)]))
    net.run(0.1)
    assert not victim.overlay.membership.passive.keys() & {made_up(n).instance for n in range(9)}


def test_who_accepts_what_was_not_asked_for_is_told_no(seed: int) -> None:
    net = Network(seed)
    victim = full_peer(mesh(net, 8))
    puppet = Puppet(net)
    puppet.connect(victim, join=False)
    puppet.send(victim, wire.NeighborReply(True))
    net.run(0.1)
    assert puppet.peer.id not in victim.overlay.neighbors
    assert len(puppet.heard_of(wire.Disconnect)) == 1


def test_an_address_that_no_member_would_take_is_not_passed_on(seed: int) -> None:
    net = Network(seed)
    one, other = mesh(net, 2)
    long = tuple(("h" * 200, port) for port in range(1, 50)) + tuple(("192.0.2.1", port) for port in range(1, 50))
    net.feed(one, Discovered(b"x" * 32, long))
    net.run(60.0)
    assert one.closed == other.closed == []
    info, _ = one.overlay.membership.passive.get(b"x" * 32, (PeerInfo(b"x" * 32), b""))
    assert len(info.addresses) <= MAX_ADDRESSES


def test_random_frames_of_membership_from_a_neighbour_leave_the_rest_healthy(seed: int) -> None:
    net = Network(seed)
    rng = random.Random(seed)
    peers = mesh(net, 8)
    puppet = Puppet(net)
    for peer in peers:
        puppet.connect(peer, join=False)
    kinds = [
        lambda: wire.Join(),
        lambda: wire.Neighbor(rng.random() < 0.5),
        lambda: wire.NeighborReply(rng.random() < 0.5, [made_up(rng.randrange(99))]),
        lambda: wire.ForwardJoin(PeerInfo(rng.choice(peers).id, rng.choice(peers).address), rng.randrange(7)),
        lambda: wire.Shuffle(made_up(rng.randrange(99)), rng.randrange(7), [made_up(rng.randrange(99))]),
        lambda: wire.ShuffleReply(rng.choice(peers).id, [made_up(rng.randrange(99))]),
        lambda: wire.Disconnect([made_up(rng.randrange(99))]),
    ]
    for _ in range(1000):
        puppet.send(rng.choice(peers), rng.choice(kinds)())
        net.run(0.005)
    assert not any(peer.closed for peer in peers)
    assert_healthy_but_for(net, peers, puppet)


def test_a_link_that_is_lost_twice_is_lost_once(seed: int) -> None:
    net = Network(seed)
    one, other = mesh(net, 2)
    assert one.overlay.handle(LinkDown(b"nobody" * 5 + b"!!", "never there"), net.now) is not None
    net.cut(one, other)
    one.overlay.handle(LinkDown(other.id, "again"), net.now)
    assert len(one.neighbor_downs) == 1
