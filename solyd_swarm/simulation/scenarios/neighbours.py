"""One neighbour that does not do its part: it forwards nothing, hears only, does not read, or says two things at once."""

from collections.abc import Callable

from solyd_swarm.core import wire
from solyd_swarm.core.events import Congested
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


def _latencies(size: int, seed: int, stop: bool, bytes_each: int) -> tuple[Run, Peer, set[int], int, list[Broadcast]]:
    """Messages of a sender of whom that neighbour stops by which the fewest got theirs, and who they are."""
    run, author, senders = _swarm(size, seed)
    publish(run, senders, 1)
    latest = max(author.overlay.log.records(), key=lambda record: record.born).id
    below = {other: _below(run.net, run.net.find(other), latest) for other in author.overlay.neighbors}
    slow = run.net.find(min(below, key=lambda other: (len(below[other]), run.net.find(other).index)))
    driver = Driver(run.net, slow) if stop else None
    messages = []
    for _ in range(400):
        messages.append(run.recorder.publish(author, run.net.rng.randbytes(bytes_each)))
        run.net.run(run.parameters.interval)
    return run, slow, below[slow.id], driver.longest if driver else 0, messages


def slow_neighbour(size: int, seed: int, progress: Progress) -> Outcome:
    """A neighbour of the sender stops reading; those not below it are held to 10 % of the same run without that."""
    outcome = Outcome()
    bytes_each = 30_000
    run, slow, _, _, usual = _latencies(size, seed, False, bytes_each)
    events, calm = run.net.events, _by_peer(usual, slow.index)
    progress(0.5)
    run, slow, below, longest, messages = _latencies(size, seed, True, bytes_each)
    with_slow = _by_peer(messages, slow.index)
    changes = {index: with_slow[index] / calm[index] - 1 for index in calm}
    worst = max((change for index, change in changes.items() if index not in below), key=abs)
    missed = sum(1 for each in messages for peer in run.recorder.obliged(each) if peer is not slow and not each.reached[peer.index])
    outcome.must(
        "change of the median latency of a peer that is not below the slow one in the tree", "<= 10 %", f"{worst:+.1%}", abs(worst) <= 0.1
    )
    # Those have another way from now on, of another length. The slow one was chosen for having the fewest of them.
    rehung = " ".join(f"{changes[index]:+.1%}" for index in sorted(below)) or "none"
    outcome.note("the same of each that is below it", rehung, "<= 10 %, not required yet")
    values = sorted(latency for each in messages for latency in each.latencies)
    before = sorted(latency for each in usual for latency in each.latencies)
    tail = " / ".join(f"{1000 * percentile(each, 0.99):.1f}" for each in (before, values))
    outcome.note("latency p99 of all others, usually / with the slow one, ms", tail)
    sent = bytes_each * len(messages)
    most = min(LAG_BYTES + HIGH_MARK, sent // 4)
    outcome.must("longest queue for the slow one, bytes", f"<= {most:,} (of {sent:,} sent)", f"{longest:,}", longest <= most)
    gone = slow.id not in {other for peer in run.net.living if peer is not slow for other in peer.overlay.neighbors}
    outcome.must(f"dropped after {STALL_TIMEOUT:.0f} s", "yes", "yes" if gone else "no", gone)
    outcome.must("missed by others", "0", str(missed), missed == 0)
    held_up = sum(change > 0.1 for index, change in changes.items() if index not in below)
    outcome.note("peers not below it, held up by more than 10 %", str(held_up), "all of its neighbours' (iroh-gossip, issue 47)")
    outcome.figures |= {"missed": missed, "worst_change": worst, "longest_queue": longest, "events": events + run.net.events}
    return outcome


def _by_peer(messages: list[Broadcast], without: int) -> dict[int, float]:
    """Median latency of each peer."""
    found: dict[int, list[float]] = {}
    for each in messages:
        for index, latency in zip(each.receivers, each.latencies, strict=True):
            if index != without:
                found.setdefault(index, []).append(latency)
    return {index: percentile(sorted(latencies), 0.5) for index, latencies in sorted(found.items())}


SCENARIOS = (
    Scenario("bypass", "A neighbour forwards nothing; a link works one way only.", bypass, 60, 1000),
    Scenario("slow-neighbour", "A neighbour of the sender stops reading.", slow_neighbour, 30, 100, least=3),
)
