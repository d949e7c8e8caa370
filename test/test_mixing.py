"""Views that mix themselves, and neighbours that only one side takes for neighbours."""

from collections.abc import Callable

import pytest
from simulated import Puppet, gossip, mesh, star

from solyd_swarm.core import wire
from solyd_swarm.core.membership import MembershipConfig
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.graph import measure
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


def chain(net: Network, count: int) -> list[Peer]:
    peers = [net.add_peer()]
    for _ in range(count - 1):
        peers.append(net.add_peer())
        net.discover(peers[-1], peers[-2])
        net.run(0.002)
    return peers


@pytest.mark.parametrize("form", [chain, star])
def test_whatever_the_beginning_the_graph_becomes_a_random_one(form: Callable[[Network, int], list[Peer]], seed: int) -> None:
    """A random graph of 100 peers with 5 neighbours each has a mean path of 3.0; a ring of cliques, as a chain begins, of 10."""
    net = Network(seed, latency=(0.001, 0.02))
    peers = form(net, 100)
    net.run(60.0)
    graph = measure(peers, seed)
    assert graph.components == [100]
    assert graph.path < 5.0
    assert graph.clustering < 0.3


def test_small_swarms_stay_as_they_are(seed: int) -> None:
    net = Network(seed)
    peers = star(net, 6)
    net.run(2.0)
    for peer in peers:
        peer.neighbor_downs.clear()
    net.run(60.0)
    assert not any(peer.neighbor_downs for peer in peers)


def test_trades_end(seed: int) -> None:
    net = Network(seed, config=OverlayConfig(heal_interval=1000.0))
    peers = mesh(net, 40, settle=60.0)
    for peer in peers:
        peer.neighbor_downs.clear()
    net.run(120.0)
    # Peers that are still short of a neighbour may change theirs; the rest is at rest.
    assert sum(len(peer.neighbor_downs) for peer in peers) <= 8


def test_a_lazy_link_goes_rather_than_a_branch_of_the_tree(seed: int) -> None:
    config = OverlayConfig(membership=MembershipConfig(mixes=0), heal_interval=1000.0)
    net = Network(seed, config=config)
    peer = net.add_peer()
    puppets = [Puppet(net, f"puppet {n}") for n in range(6)]
    for puppet in puppets[:5]:
        puppet.connect(peer)
    for puppet in puppets[1:5]:
        peer.overlay.neighbors[puppet.peer.id].eager = puppet is not puppets[3]
    puppets[5].connect(peer)
    assert puppets[3].peer.id not in peer.overlay.neighbors
    assert len(peer.overlay.neighbors) == 5


def test_who_has_missed_that_it_is_no_neighbour_is_told_again_but_not_at_every_frame(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(peer, join=False)
    assert peer.overlay.link(puppet.peer.id) is not None
    puppet.send(peer, gossip(puppet.seal(1, b"at once")))
    net.run(0.1)
    assert not puppet.heard_of(wire.Disconnect)  # it may just be on its way out
    net.run(1.0)
    for n in range(2, 52):
        puppet.send(peer, gossip(puppet.seal(n, b"as if nothing had happened")))
        net.run(0.05)
    assert 2 <= len(puppet.heard_of(wire.Disconnect)) <= 3
    assert len(peer.messages) == 51  # what it says is taken all the same


def test_addresses_go_to_those_only_who_may_be_told(seed: int) -> None:
    """Two networks: an address inside one of them is none of the other's business, whoever passes it on."""
    net = Network(seed, config=OverlayConfig(heal_interval=1000.0))
    told: list[tuple[int, int]] = []

    def may_know(info: wire.PeerInfo, to: bytes) -> bool:
        return net.find(info.instance).index % 2 == net.find(to).index % 2

    def look(sender: Peer, receiver: Peer, data: bytes) -> bool:
        match wire.decode(data):
            case wire.ForwardJoin(peer=info):
                infos = [info]
            case wire.Shuffle(origin=info, peers=others):
                infos = [info, *others]
            case wire.ShuffleReply(peers=others):
                infos = list(others)
            case _:
                infos = []
        told.extend((net.find(info.instance).index, receiver.index) for info in infos if info.addresses)
        return True

    net.filter = look
    peers = [net.add_peer() for _ in range(20)]
    for peer in peers:
        peer.overlay.membership.views.tells = lambda info, to: info if may_know(info, to) else wire.make_peer_info(info.instance, ())
    for peer in peers[1:]:
        net.discover(peer, peers[0])
        net.run(0.1)
    net.run(60.0)
    assert len(told) > 100
    assert all(known % 2 == receiver % 2 for known, receiver in told)
