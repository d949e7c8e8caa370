"""What is older than the window, or was published before one came and is not wanted, is neither fetched nor delivered again."""

import gc
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from solyd_swarm.core import wire
from solyd_swarm.core.envelope import envelope_id
from solyd_swarm.core.events import Deliver
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.experiment import Progress, Run, Senders, prepare, publish
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.peer import Peer
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

WINDOW = 60.0
WINDOWS = 10
PAUSE = 0.5
"""Seconds from one message to the next."""
SWARMS = 8
"""At full size. In one swarm the digest bytes of four windows differ from those of the next four by 14 % (standard deviation), so that
of one it says little whether they are 15 % more."""
TURN = WINDOW / 4
"""A joiner comes every so many seconds."""
STAY = 6
"""And stays for so many turns: longer than the window, so that what it has fetched expires with it there."""
SMALL = 5_000
"""Bytes of bodies that a small store keeps: a quarter of what is published in a window."""
SLACK = 1.0
"""Seconds by which ages may differ, what is on its way included."""


class _Watch:
    """Counts what should not be, of what is sent and delivered."""

    def __init__(self, run: Run) -> None:
        self.stale = self.unwanted = self.fetched_stale = self.fetched_again = 0
        self._run = run
        self._published: dict[bytes, float] = {}
        self._delivered: dict[tuple[int, bytes], float] = {}
        self._record = run.net.watch
        run.net.watch, run.net.filter = self._deliver, self._send

    def _deliver(self, peer: Peer, delivery: Deliver) -> None:
        now, id = self._run.net.now, delivery.envelope.id
        broadcast = self._run.recorder.of(delivery.envelope)
        assert broadcast is not None
        assert self._record is not None
        self._published[id] = broadcast.at
        self._delivered[peer.index, id] = now
        self.stale += now - broadcast.at > WINDOW + SLACK
        self.unwanted += not peer.overlay.config.replay and broadcast.at < peer.born - SLACK
        self._record(peer, delivery)

    def _send(self, sender: Peer, receiver: Peer, data: bytes) -> bool:
        if data[0] == wire.Transfer.TYPE:
            frame, now = wire.decode(data), self._run.net.now
            assert isinstance(frame, wire.Transfer)
            id = envelope_id(frame.body)
            self.fetched_stale += now - self._published.get(id, now) > WINDOW + SLACK
            self.fetched_again += now - self._delivered.get((receiver.index, id), now) > SLACK
        return True


class _Joiners:
    """Peers that come, with and without replay, and go after a while."""

    def __init__(self, run: Run, config: OverlayConfig) -> None:
        self.missed = 0
        self._run, self._config = run, config
        self._there: deque[Peer] = deque()
        self._count = 0

    def turn(self) -> None:
        """Who has stayed long enough goes; one comes, by anybody."""
        net: Network = self._run.net
        if len(self._there) == STAY:
            self._part(self._there.popleft())
        newcomer = net.add_peer(config=replace(self._config, replay=self._count % 2 == 0))
        self._count += 1
        net.discover(newcomer, net.rng.choice([peer for peer in net.living if peer is not newcomer]))
        self._there.append(newcomer)

    def _part(self, peer: Peer) -> None:
        """Of what was there for it to be had: what the window held as it came, if it was wanted, and all since."""
        since = peer.born - WINDOW + 5.0 if peer.overlay.config.replay else peer.born + SLACK
        for each in self._run.measured:
            if since <= each.at < self._run.net.now - SLACK:
                self.missed += self._run.recorder.lacks(each, peer)
        self._run.net.crash(peer)


@dataclass(slots=True)
class _Counts:
    """What is found in one swarm or in several."""

    stale: int = 0
    fetched_stale: int = 0
    fetched_again: int = 0
    unwanted: int = 0
    duplicates: int = 0
    missed: int = 0
    missed_by_joiners: int = 0
    held: int = 0
    small: int = 0
    large: int = sys.maxsize
    events: int = 0
    digest_bytes: list[int] = field(default_factory=lambda: [0] * WINDOWS)

    def add(self, run: Run, members: Sequence[Peer], watch: _Watch, joiners: _Joiners) -> None:
        """Adds what there is to be said of a swarm at its end."""
        self.stale += watch.stale
        self.fetched_stale += watch.fetched_stale
        self.fetched_again += watch.fetched_again
        self.unwanted += watch.unwanted
        self.duplicates += sum(each.duplicates for each in run.recorder.broadcasts)
        self.missed += sum(run.recorder.lacks(each, peer) for each in run.measured for peer in members if peer is not each.author)
        self.missed_by_joiners += joiners.missed
        self.held = max(self.held, *(len(peer.overlay.log) for peer in run.net.living))
        self.small = max(self.small, *(peer.overlay.log.bytes for peer in members if peer.overlay.log.max_bytes == SMALL))
        self.large = min(self.large, *(peer.overlay.log.bytes for peer in members if peer.overlay.log.max_bytes > SMALL))
        self.events += run.net.events


def expiry(size: int, seed: int, progress: Progress) -> Outcome:
    """Ten windows of traffic; joiners with and without replay; stores of different sizes."""
    outcome, counts = Outcome(), _Counts()
    swarms = SWARMS if size >= 50 else 1
    for number in range(swarms):
        _live(size, SWARMS * seed + number, counts, lambda share, number=number: progress((number + share) / swarms))  # type: ignore[misc]
        gc.collect()  # a swarm is full of cycles
    _check(outcome, counts)
    # How deep the tree is decides how often a round finds something on its way: windows differ by that, but must not become dearer.
    spread = 0.15 if swarms > 1 else 0.5
    per_window = [each // swarms for each in counts.digest_bytes]
    early, last = sum(per_window[2:6]) / 4, sum(per_window[6:]) / 4
    ours = f"{early:,.0f} then {last:,.0f}"
    outcome.must("digest bytes a window, windows 3-6 and 7-10", f"at most {spread:.0%} more", ours, last <= (1 + spread) * early)
    outcome.note("swarms of which these are the mean, and the others the sum", str(swarms))
    outcome.figures |= {"digest_bytes": per_window, "events": counts.events}
    outcome.curves.append(("window", "digest bytes", {"all peers": [(float(n), float(b)) for n, b in enumerate(per_window, 1)]}))
    return outcome


def _live(size: int, seed: int, counts: _Counts, progress: Progress) -> None:
    """One swarm for ten windows."""
    config = replace(OverlayConfig(), window=WINDOW)
    run = prepare(Parameters(peers=size, interval=PAUSE, latency=(1.0, 20.0), jitter=1.0, directory=False, seed=seed), config=config)
    net = run.net
    for index in range(size):
        peer = net.add_peer(config=replace(config, max_bytes=SMALL) if index % 4 == 3 else config)
        if index:
            net.discover(peer, net.peers[net.rng.randrange(index)])
        net.run(0.05)
    net.run(20.0)
    senders, joiners, watch = Senders(net, 3), _Joiners(run, config), _Watch(run)
    for number in range(WINDOWS):
        before = run.recorder.traffic()
        for _ in range(4):
            run.measured += publish(run, senders, int(TURN / PAUSE))
            joiners.turn()
        counts.digest_bytes[number] += run.recorder.traffic().since(before).digest_bytes
        progress(number / WINDOWS)
    net.run(3.0)
    counts.add(run, net.peers[:size], watch, joiners)


def _check(outcome: Outcome, counts: _Counts) -> None:
    for what, count in (
        ("delivered, published more than a window ago", counts.stale),
        ("fetched, published more than a window ago", counts.fetched_stale),
        ("fetched by whoever had it delivered before", counts.fetched_again),
        ("delivered without replay, published before", counts.unwanted),
        ("duplicates delivered", counts.duplicates),
        ("missed by whoever was there", counts.missed),
        ("missed by joiners, of the window and since", counts.missed_by_joiners),
    ):
        outcome.must(what, "0", str(count), count == 0)
    small, large = counts.small, counts.large
    outcome.must("bytes of bodies held: small stores, large stores", f"<= {SMALL:,}, more", f"{small:,}, {large:,}", small <= SMALL < large)
    most = int(2.2 * WINDOW / PAUSE)
    outcome.must("ids held, most", f"<= {most} (two windows)", str(counts.held), counts.held <= most)
    missed = counts.missed + counts.missed_by_joiners
    outcome.figures |= {"missed": missed, "duplicates": counts.duplicates, "stale": counts.stale + counts.fetched_stale}


SCENARIOS = (
    Scenario("expiry", "Ten windows of traffic, joiners with and without replay, small and large stores.", expiry, 12, 50, least=4),
)
