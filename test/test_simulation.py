"""The simulator's measures against examples worked out by hand; its parameters, its directory, and its network."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from simulated import mesh

from solyd_swarm.net.limits import SILENCE_TIMEOUT
from solyd_swarm.simulation import experiment
from solyd_swarm.simulation.directory import Directory
from solyd_swarm.simulation.graph import Graph, distances, measure, neighbours
from solyd_swarm.simulation.network import DIAL_TIMEOUT, Network
from solyd_swarm.simulation.parameters import JOINS, LATENCIES, Parameters, parse_latency
from solyd_swarm.simulation.peer import Peer
from solyd_swarm.simulation.recorder import Recorder, percentile

# -- the graph ----------------------------------------------------------------------------------------------------


def peers_of(edges: dict[int, list[int]], dead: tuple[int, ...] = ()) -> list[Peer]:
    """Peers with these active views."""
    found = []
    for index, others in edges.items():
        overlay = SimpleNamespace(neighbors=[b"%d" % other for other in others])
        found.append(cast(Peer, SimpleNamespace(id=b"%d" % index, index=index, alive=index not in dead, overlay=overlay)))
    return found


def test_a_complete_graph() -> None:
    edges = {one: [other for other in range(5) if other != one] for one in range(5)}
    assert measure(peers_of(edges), 1) == Graph({4: 5}, clustering=1.0, path=1.0, diameter=1, isolated=0, components=[5])


def test_a_ring() -> None:
    edges = {place: [(place + 1) % 6, (place - 1) % 6] for place in range(6)}
    # From each one two at 1 hop, two at 2, one at 3.
    assert measure(peers_of(edges), 1) == Graph({2: 6}, clustering=0.0, path=9 / 5, diameter=3, isolated=0, components=[6])


def test_a_star() -> None:
    edges = {0: [1, 2, 3, 4], **{leaf: [0] for leaf in range(1, 5)}}
    # From the centre 4 hops in all, from each leaf 1 + 3 * 2, over 20 pairs.
    assert measure(peers_of(edges), 1) == Graph({1: 4, 4: 1}, clustering=0.0, path=32 / 20, diameter=2, isolated=0, components=[5])


def test_a_triangle_with_a_tail() -> None:
    edges = {0: [1, 2], 1: [0, 2], 2: [0, 1, 3], 3: [2]}
    found = measure(peers_of(edges), 1)
    assert found.clustering == pytest.approx((1 + 1 + 1 / 3 + 0) / 4)
    assert found.in_degree == {1: 1, 2: 2, 3: 1}


def test_parts_and_the_dead() -> None:
    edges = {0: [1, 9], 1: [0], 2: [3], 3: [2], 4: [9], 9: [0, 4, 2]}
    peers = peers_of(edges, dead=(9,))
    assert neighbours(peers) == {0: [1], 1: [0], 2: [3], 3: [2], 4: []}
    found = measure(peers, 1)
    assert (found.components, found.isolated, found.in_degree) == ([2, 2, 1], 1, {0: 1, 1: 4})
    assert (found.path, found.diameter) == (1.0, 1)


def test_distances() -> None:
    assert distances({0: [1], 1: [0, 2], 2: [1], 3: []}, 0) == {0: 0, 1: 1, 2: 2}


# -- percentiles, messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, 0.0),
        ([7.0], 0.0, 7.0),
        ([7.0], 0.99, 7.0),
        ([7.0], 1.0, 7.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, 2.0], 0.51, 2.0),
        ([1.0, 2.0, 3.0], 0.5, 2.0),
        ([float(n) for n in range(1, 101)], 0.0, 1.0),
        ([float(n) for n in range(1, 101)], 0.5, 50.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 101)], 1.0, 100.0),
        ([float(n) for n in range(1, 11)], 0.99, 10.0),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def complete(net: Network, count: int) -> list[Peer]:
    """Peers that are all neighbours of each other."""
    peers = [net.add_peer() for _ in range(count)]
    for place, peer in enumerate(peers):
        for other in peers[:place]:
            net.discover(peer, other)
    net.run(5.0)
    assert all(len(peer.overlay.neighbors) == count - 1 for peer in peers)
    return peers


def test_a_flood_has_the_redundancy_of_its_graph_and_then_there_is_a_tree() -> None:
    net = Network(1, latency=(0.01, 0.01), jitter=0.0, sham_signatures=True)
    recorder = Recorder(net)
    peers = complete(net, 5)
    for expected_frames, expected_rmr in ((4 + 4 * 3, 3.0), (4, 0.0)):  # the first floods: the author to 4, and each of them to 3 others
        run = experiment.Run(Parameters(peers=5), net, recorder, None, [], recorder.traffic())
        run.measured.append(recorder.publish(peers[0], b"x"))
        net.run(0.5)
        recorder.missing(run.measured)
        found = experiment.report(run)
        assert recorder.traffic().since(run.traffic).payload_frames == expected_frames
        assert found["rmr"] == expected_rmr
        assert (found["reliability"], found["missed"], found["duplicates"]) == (1.0, 0, 0)
        assert found["ldh"] == {"mean": 1.0, "p99": 1.0, "max": 1.0}
        assert found["latency_ms"] == pytest.approx({"p50": 10.0, "p99": 10.0, "max": 10.0})
        assert found["in_degree"] == {"4": 5}


def test_who_must_have_a_message_and_who_misses_it() -> None:
    net = Network(1, sham_signatures=True)
    recorder = Recorder(net)
    peers = complete(net, 4)
    net.filter = lambda sender, receiver, data: False  # nothing arrives
    broadcast = recorder.publish(peers[0], b"x")
    net.run(0.5)
    late = net.add_peer()
    net.crash(peers[1])
    assert recorder.obliged(broadcast) == peers[2:4]
    assert recorder.obliged(broadcast, latecomers=True) == [*peers[2:4], late]
    assert recorder.missing([broadcast]) == broadcast.missed == 2
    assert recorder.missing([broadcast], latecomers=True) == 3
    assert not recorder.is_complete(broadcast, recorder.obliged(broadcast))
    net.filter = None
    net.run(30.0)
    assert recorder.missing([broadcast]) == 0
    assert recorder.is_complete(broadcast, recorder.obliged(broadcast))
    assert recorder.unexpected == 0
    net.publish(peers[2], b"y")
    net.run(1.0)
    assert recorder.unexpected == 2  # at the two others that are left and have neighbours


# -- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"peers": 1}, "peers"),
        ({"peers": 10_000_000}, "peers"),
        ({"messages": 0}, "messages"),
        ({"warmup": -1}, "warmup"),
        ({"size": 0}, "size"),
        ({"size": 17_000_000}, "size"),
        ({"senders": 0}, "senders"),
        ({"peers": 10, "senders": 11}, "senders"),
        ({"fail": 0.96}, "fail"),
        ({"fail": -0.1}, "fail"),
        ({"loss": 1.0}, "loss"),
        ({"churn": float("nan")}, "churn"),
        ({"latency": (5.0, 1.0)}, "latency"),
        ({"latency": (-1.0, 1.0)}, "latency"),
        ({"latency": (1.0, float("inf"))}, "latency"),
        ({"latency": (float("nan"), 1.0)}, "latency"),
        ({"jitter": -1.0}, "jitter"),
        ({"interval": -1.0}, "interval"),
        ({"interval": float("inf")}, "interval"),
        ({"settle": float("nan")}, "settle"),
        ({"partition": -1.0}, "partition"),
        ({"drain": -1.0}, "drain"),
        ({"join": "queue"}, "join"),
    ],
)
def test_wrong_parameters_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be "):
        Parameters(**wrong)


def test_a_bound_that_is_crossed_is_the_one_that_is_told() -> None:
    with pytest.raises(ValueError, match=r"^peers must be from 2 to 1,000,000, not 2000000$"):
        Parameters(peers=2_000_000)


def test_latencies() -> None:
    assert parse_latency("lan") == LATENCIES["lan"]
    assert parse_latency("wan") == LATENCIES["wan"]
    assert parse_latency("5-20.5") == (5.0, 20.5)
    assert parse_latency("3") == (3.0, 3.0)
    for wrong in ("", "moon", "1-", "-1", "1-2-3", "1ms", "1-inf", "nan"):
        with pytest.raises(ValueError, match="lan, wan or MIN-MAX"):
            parse_latency(wrong)


@pytest.mark.parametrize("seconds", [0.0, 0.3, 20.0])
def test_time_in_slices_is_the_same_time(seconds: float) -> None:
    ends = []
    shares: list[float] = []
    for slices in (False, True):
        run = experiment.prepare(Parameters(peers=20))
        experiment.form(run)
        if slices:
            experiment.let_pass(run.net, seconds, shares.append)
        else:
            run.net.run(seconds)
        ends.append((run.net.now, run.net.events, run.net.rng.random(), run.net.frames_by_type))
    assert ends[0] == ends[1]
    assert shares == sorted(shares)
    assert len(shares) > 10


@pytest.mark.parametrize("join", JOINS)
def test_every_way_to_join_ends_in_one_swarm(join: str) -> None:
    run = experiment.perform(Parameters(peers=30, messages=3, warmup=3, join=join))
    assert run.graph is not None
    assert run.graph.components == [30]
    assert experiment.report(run)["missed"] == 0


# -- the directory ------------------------------------------------------------------------------------------------


class Answers:
    """Notes what a directory tells: (time, who is told, of whom)."""

    def __init__(self, net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[float, int, int]] = []
        monkeypatch.setattr(net, "discover", lambda peer, other: self.told.append((net.now, peer.index, other.index)))


def enlisted(net: Network, count: int, **options: Any) -> list[Peer]:
    directory = Directory(net, **options)
    peers = [net.add_peer() for _ in range(count)]
    for peer in peers:
        directory.enlist(peer)
    return peers


def test_answers_come_late(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(seed)
    answers = Answers(net, monkeypatch)
    enlisted(net, 10, period=1.0, delay=(100.0, 101.0))
    net.run(99.9)
    assert not answers.told
    net.run(10.0)
    assert {told for _, told, _ in answers.told} == set(range(10))


def test_answers_name_a_few(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(seed)
    answers = Answers(net, monkeypatch)
    enlisted(net, 50, period=10.0, delay=(1.0, 1.0), sample=3)
    net.run(40.0)
    # The delay being fixed, what comes at one moment is one answer.
    by_answer: dict[tuple[float, int], list[int]] = {}
    for at, told, named in answers.told:
        by_answer.setdefault((at, told), []).append(named)
        assert told != named
    assert {len(named) for named in by_answer.values()} == {3}
    assert all(len(set(named)) == 3 for named in by_answer.values())


def test_a_directory_knows_a_share_only(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(seed)
    answers = Answers(net, monkeypatch)
    enlisted(net, 200, share=0.3)
    net.run(60.0)
    assert 25 < len({named for _, _, named in answers.told}) < 100
    assert len({told for _, told, _ in answers.told}) == 200


def test_the_dead_are_named_for_a_while(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(seed)
    answers = Answers(net, monkeypatch)
    peers = enlisted(net, 10, period=2.0, delay=(0.0, 1.0), memory=30.0)
    net.run(10.0)
    net.crash(peers[0])
    net.run(100.0)
    last_named = max(at for at, _, named in answers.told if named == 0)
    assert 25.0 < last_named - 10.0 <= 30.0 + 30.0 / 6 + 1.0  # looked through every sixth of that time
    assert max(at for at, told, _ in answers.told if told == 0) <= 11.0  # it asks no more


def test_no_answer_crosses_a_partition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(seed)
    answers = Answers(net, monkeypatch)
    peers = enlisted(net, 20, period=2.0, delay=(0.0, 0.0))
    net.partition((peers[:10], peers[10:]))
    net.run(20.0)
    assert answers.told
    assert all((told < 10) == (named < 10) for _, told, named in answers.told)
    net.heal()
    net.run(20.0)
    assert any((told < 10) != (named < 10) for _, told, named in answers.told)


# -- the network --------------------------------------------------------------------------------------------------


def across(peers: list[Peer]) -> int:
    """Links between the even and the odd."""
    return sum((way.receiver.index - peer.index) % 2 for peer in peers for way in peer.links.values())


def test_a_partition_and_its_end(seed: int) -> None:
    net = Network(seed, sham_signatures=True)
    peers = mesh(net, 12)
    net.partition((peers[::2], peers[1::2]))
    assert across(peers)
    net.publish(peers[0], b"even")
    net.run(SILENCE_TIMEOUT - 0.1)
    assert across(peers)  # nobody has noticed yet
    assert not any(peer.messages for peer in peers[1::2])
    net.run(0.2)
    assert not across(peers)
    net.discover(peers[1], peers[0])
    net.run(DIAL_TIMEOUT + 1.0)
    assert not across(peers)
    assert not any(peer.messages for peer in peers[1::2])
    net.heal()
    net.discover(peers[1], peers[0])
    net.run(60.0)
    assert across(peers)
    assert all(peer.messages == [b"even"] for peer in peers[1::2])


def test_a_crash_is_noticed_at_once_a_silent_one_by_its_silence(seed: int) -> None:
    net = Network(seed, sham_signatures=True)
    peers = complete(net, 4)
    net.crash(peers[0])
    assert not any(peers[0].id in peer.links or peers[0].id in peer.overlay.neighbors for peer in peers[1:])
    net.crash(peers[1], silently=True)
    net.run(SILENCE_TIMEOUT - 0.1)
    assert not peers[1].alive
    assert all(peers[1].id in peer.links for peer in peers[2:])
    net.run(0.2)
    assert not any(peers[1].id in peer.links or peers[1].id in peer.overlay.neighbors for peer in peers[2:])


def test_what_a_stuck_link_holds_comes_later_and_in_order(seed: int) -> None:
    net = Network(seed, sham_signatures=True)
    one, other = complete(net, 2)
    way = one.links[other.id]
    net.hold(way)
    for number in range(5):
        net.publish(one, b"%d" % number)
    net.run(1.0)
    assert other.messages == []
    assert way.stuck is not None
    assert way.stuck_bytes == sum(map(len, way.stuck)) > 0
    net.release(way)
    net.run(1.0)
    assert other.messages == [b"%d" % number for number in range(5)]
    assert (way.stuck, way.stuck_bytes) == (None, 0)


def test_stand_in_signatures_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = Parameters(peers=20, messages=10, fail=0.2, loss=0.02)
    sham = experiment.report(experiment.perform(parameters))
    monkeypatch.setattr(experiment, "Network", lambda *args, **options: Network(*args, **{**options, "sham_signatures": False}))
    real = experiment.perform(parameters)
    assert len({len(peer.secret) for peer in real.net.peers}) == 1
    assert experiment.report(real) == sham


def test_two_are_left_at_least() -> None:
    run = experiment.perform(Parameters(peers=5, messages=2, fail=0.95, churn=1.0))
    assert len(run.net.living) == 2
