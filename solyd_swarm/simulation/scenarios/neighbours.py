"""One neighbour that does not do its part: it forwards nothing, hears only, does not read, or says two things at once."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

from solyd_swarm.core import wire
from solyd_swarm.core.events import Congested
from solyd_swarm.core.membership import MembershipConfig
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.net.driver import LAG_BYTES, LAG_TIMEOUT
from solyd_swarm.net.limits import HIGH_MARK, MAX_BACKLOG, STALL_TIMEOUT
from solyd_swarm.simulation.channel import Way
from solyd_swarm.simulation.experiment import Progress, Run, Senders, form, prepare, publish
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.peer import Peer
from solyd_swarm.simulation.recorder import Broadcast, percentile
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

Trouble = Callable[[Network, Peer], None]


CALM_MESSAGES = 30
"""Before."""
MESSAGES = 400
"""While one does not read: 40 s, in which it is dropped."""
SMALL_STORE = OverlayConfig(max_bytes=4 * 1024 * 1024)
"""What is kept decides nothing here, but a hundred peers that each keep all need a large machine."""


def _swarm(size: int, seed: int) -> tuple[Run, Peer, Senders]:
    """A swarm whose tree has settled, and its sender."""
    run = prepare(Parameters(peers=size, interval=0.1, latency=(5.0, 10.0), jitter=1.0, directory=False, seed=seed), config=SMALL_STORE)
    form(run)
    run.net.run(40.0)
    senders = Senders(run.net, 1)
    author = senders.next()
    publish(run, senders, 30)
    return run, author, senders


def _branch(author: Peer, net: Network) -> Peer:
    """A neighbour of the author that passes the most on, as far as its links tell."""
    eager = [net.find(other) for other, link in author.overlay.neighbors.items() if link.eager]
    return max(eager, key=lambda peer: (sum(link.eager for link in peer.overlay.neighbors.values()), -peer.index))


def _bypassed_after(run: Run, messages: list[Broadcast], start: float) -> tuple[float, float]:
    """Seconds until messages take no longer than 1 s again (by when the first good one was published); the longest delivery."""
    worst = [max(each.latencies, default=0.0) for each in messages]
    bad = [each.at for each, longest in zip(messages, worst, strict=True) if longest > 1.0]
    return (max(bad) - start + run.parameters.interval if bad else 0.0), max(worst)


def _bypass(outcome: Outcome, size: int, seed: int, name: str, trouble: Trouble) -> int:
    run, author, senders = _swarm(size, seed)
    net, start = run.net, run.net.now
    culprit = _branch(author, net)
    trouble(net, culprit)
    messages = publish(run, senders, 100)
    net.run(5.0)
    # Whoever causes the trouble may go without; nobody else.
    missed = sum(1 for each in messages for peer in run.recorder.obliged(each) if peer is not culprit and not each.reached[peer.index])
    after, longest = _bypassed_after(run, messages, start)
    outcome.must(f"{name}: bypassed after", "<= 3 s", f"{after:.2f} s", after <= 3.0)
    outcome.must(f"{name}: longest delivery of any message", "<= 3 s", f"{longest:.3f} s", longest <= 3.0)
    outcome.must(f"{name}: missed by others", "0", str(missed), missed == 0)
    outcome.figures["missed"] = outcome.figures.get("missed", 0) + missed
    return net.events


def _forwards_nothing(net: Network, culprit: Peer) -> None:
    """Neither bodies nor announcements: it only takes."""
    silent = (wire.Gossip.TYPE, wire.Ihave.TYPE, wire.Transfer.TYPE, wire.Have.TYPE)
    net.filter = lambda sender, receiver, data: sender is not culprit or data[0] not in silent


def _one_way(net: Network, culprit: Peer) -> None:
    """Of its first branch nothing comes back, and nobody says so."""
    far = next(net.find(other) for other, link in culprit.overlay.neighbors.items() if link.eager)
    net.filter = lambda sender, receiver, data: not (sender is culprit and receiver is far)


def bypass(size: int, seed: int, progress: Progress) -> Outcome:
    """A neighbour of the sender forwards nothing any more; a link of the tree works one way only."""
    outcome = Outcome()
    events = _bypass(outcome, size, seed, "one forwards nothing", _forwards_nothing)
    progress(0.5)
    events += _bypass(outcome, size, seed, "one link one way", _one_way)
    outcome.figures["events"] = events
    return outcome


class Driver:
    """What production's driver does about a receiver that does not read (DESIGN 3.12), by its very figures."""

    def __init__(self, net: Network, slow: Peer) -> None:
        self.net = net
        self.longest = 0
        slow.frozen = True
        for way in list(slow.links.values()):
            net.hold(way.back)
            self._watch(way.back, net.now, net.now, False)

    def _watch(self, way: Way, long_since: float, since: float, demoted: bool) -> None:
        net = self.net
        if not way.channel.up:
            return
        self.longest = max(self.longest, way.stuck_bytes)
        if way.stuck_bytes <= HIGH_MARK:
            long_since = net.now
        elif not demoted and (way.stuck_bytes > LAG_BYTES or net.now - long_since >= LAG_TIMEOUT):
            demoted = True
            net.feed(way.sender, Congested(way.receiver.id))
        if not way.stuck_bytes:
            since = net.now
        if net.now - since >= STALL_TIMEOUT or way.stuck_bytes > MAX_BACKLOG:
            net.cut(way.sender, way.receiver)
        else:
            net.after(0.1, self._watch, way, long_since, since, demoted)


def _below(net: Network, top: Peer, id: bytes) -> set[int]:
    """Whom a message came to by way of a peer."""
    parents = {peer.id: record.via for peer in net.living if (record := peer.overlay.log.get(id)) is not None}

    def is_below(id: bytes) -> bool:
        while id in parents and id != top.id:
            id = parents[id]
        return id == top.id

    return {peer.index for peer in net.living if peer is not top and is_below(peer.id)}


@dataclass(slots=True)
class _Measured:
    """One run of `slow_neighbour`. Times in seconds; peers by index, the slow one left out.

    Attributes:
        all: latencies, sorted.
        latencies: median of each peer.
        before: the same of the last messages before.
        below: who got messages by way of the slow one, before it stopped.
        neighbours: of the sender.
        views: the size of the largest active view.
        longest: bytes in the longest queue for it.
        gone: whether nobody has it for a neighbour any more.
    """

    all: list[float]
    latencies: dict[int, float]
    before: dict[int, float]
    below: set[int]
    neighbours: int
    events: int
    views: int = 0
    longest: int = 0
    missed: int = 0
    gone: bool = False


def _measure(size: int, seed: int, bytes_each: int, stopping: int | None) -> _Measured:
    """A sender's messages, while the neighbour of that number does not read; or all do."""
    run, author, senders = _swarm(size, seed)
    before = _by_peer(publish(run, senders, CALM_MESSAGES), None)
    net = run.net
    latest = max(author.overlay.log.records(), key=lambda record: record.born).id
    slow = sorted((net.find(other) for other in author.overlay.neighbors), key=lambda peer: peer.index)[stopping or 0]
    neighbours, below = len(author.overlay.neighbors), _below(net, slow, latest)
    driver = Driver(net, slow) if stopping is not None else None
    messages, views = [], 0
    for _ in range(MESSAGES):
        messages.append(run.recorder.publish(author, net.rng.randbytes(bytes_each)))
        net.run(run.parameters.interval)
        views = max(views, *(len(peer.overlay.neighbors) for peer in net.living))
    found = _Measured(
        all=sorted(latency for each in messages for latency in each.latencies),
        latencies=_by_peer(messages, None if driver is None else slow.index),
        before=before,
        below=below,
        neighbours=neighbours,
        events=net.events,
        views=views,
    )
    if driver is not None:
        obliged = ((each, peer) for each in messages for peer in run.recorder.obliged(each) if peer is not slow)
        found.missed = sum(not each.reached[peer.index] for each, peer in obliged)
        found.longest = driver.longest
        found.gone = all(slow.id not in peer.overlay.neighbors for peer in net.living if peer is not slow)
    return found


def slow_neighbour(size: int, seed: int, progress: Progress) -> Outcome:
    """Each neighbour of the sender in turn stops reading, against what it was, and the same run without that."""
    outcome = Outcome()
    bytes_each = 30_000
    usual = _measure(size, seed, bytes_each, None)
    runs = []
    for number in range(usual.neighbours):
        progress((1 + number) / (1 + usual.neighbours))
        runs.append(_measure(size, seed, bytes_each, number))
        gc.collect()  # a swarm is full of cycles, and of what it has stored
    _tell_changes(outcome, runs)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        before, after = percentile(usual.all, share), max(percentile(each.all, share) for each in runs)
        ours = f"{1000 * before:.1f}, {1000 * after:.1f} ({after / before - 1:+.1%})"
        what = f"all latencies of all others, {name}, ms: if all read, with the worst slow one"
        outcome.note(what, ours)
    outcome.note("the longest of all, ms", f"{1000 * usual.all[-1]:.1f}, {1000 * max(each.all[-1] for each in runs):.1f}")
    sent = bytes_each * MESSAGES
    most = min(LAG_BYTES + HIGH_MARK, sent // 4)
    longest = max(each.longest for each in runs)
    outcome.must("longest queue for the slow one, bytes", f"<= {most:,} (of {sent:,} sent)", f"{longest:,}", longest <= most)
    views, bound = max(each.views for each in runs), MembershipConfig().active_most
    outcome.must("largest active view", f"<= {bound}", str(views), views <= bound)
    gone = all(each.gone for each in runs)
    outcome.must(f"dropped after {STALL_TIMEOUT:.0f} s", "yes", "yes" if gone else "no", gone)
    missed = sum(each.missed for each in runs)
    outcome.must("missed by others", "0", str(missed), missed == 0)
    events = sum(each.events for each in (usual, *runs))
    outcome.figures |= {"missed": missed, "longest_queue": longest, "events": events}
    return outcome


def _tell_changes(outcome: Outcome, runs: list[_Measured]) -> None:
    """Of each peer's median latency."""
    changes = [(latency / each.before[index] - 1, index in each.below) for each in runs for index, latency in each.latencies.items()]
    below = [change for change, is_below in changes if is_below]
    worst = max(change for change, _ in changes)
    outcome.must("a peer's median latency, against what it was: worst", "<= 10 % longer", f"{worst:+.1%} of {len(changes)}", worst <= 0.1)
    if below:
        told = f"{max(below):+.1%}, {sum(below) / len(below):+.1%} of {len(below)}"
        outcome.note("of those who had the slow one on their way: worst, mean", told)
    outcome.figures |= {"worst_change": worst, "worst_below": max(below, default=0.0)}


def _by_peer(messages: list[Broadcast], without: int | None) -> dict[int, float]:
    """Median latency of each peer."""
    found: dict[int, list[float]] = {}
    for each in messages:
        for index, latency in zip(each.receivers, each.latencies, strict=True):
            if index != without:
                found.setdefault(index, []).append(latency)
    return {index: percentile(sorted(latencies), 0.5) for index, latencies in sorted(found.items())}


SCENARIOS = (
    Scenario("bypass", "A neighbour forwards nothing; a link works one way only.", bypass, 60, 1000),
    Scenario("slow-neighbour", "Each neighbour of the sender in turn stops reading.", slow_neighbour, 30, 100, least=3),
)
