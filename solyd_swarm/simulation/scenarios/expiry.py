"""What is older than the window, or was published before one came and is not wanted, is neither fetched nor delivered again."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

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


def expiry(size: int, seed: int, progress: Progress) -> Outcome:
    """Ten windows of traffic; joiners with and without replay; stores of different sizes."""
    outcome = Outcome()
    config = replace(OverlayConfig(), window=WINDOW)
    run = prepare(Parameters(peers=size, interval=0.5, latency=(1.0, 20.0), jitter=1.0, directory=False, seed=seed), config=config)
    net = run.net
    for index in range(size):
        peer = net.add_peer(config=replace(config, max_bytes=SMALL) if index % 4 == 3 else config)
        if index:
            net.discover(peer, net.peers[net.rng.randrange(index)])
        net.run(0.05)
    net.run(20.0)
    senders, joiners, watch = Senders(net, 3), _Joiners(run, config), _Watch(run)
    per_window: list[int] = []
    for number in range(10):
        before = run.recorder.traffic()
        for _ in range(4):
            run.measured += publish(run, senders, int(TURN / run.parameters.interval))
            joiners.turn()
        per_window.append(run.recorder.traffic().since(before).digest_bytes)
        progress(number / 10)
    net.run(3.0)
    _check(outcome, run, net.peers[:size], watch, joiners)
    _check_stores(outcome, run, net.peers[:size])
    # Whom a joiner meets decides how much it has to ask: windows differ by that, but must not become dearer.
    spread = 0.15 if size >= 50 else 0.5
    early, last = sum(per_window[2:6]) / 4, sum(per_window[6:]) / 4
    ours = f"{early:,.0f} then {last:,.0f}"
    outcome.must("digest bytes a window, windows 3-6 and 7-10", f"at most {spread:.0%} more", ours, last <= (1 + spread) * early)
    outcome.figures |= {"digest_bytes": per_window, "events": net.events}
    outcome.curves.append(("window", "digest bytes", {"all peers": [(float(n), float(b)) for n, b in enumerate(per_window, 1)]}))
    return outcome


def _check(outcome: Outcome, run: Run, members: Sequence[Peer], watch: _Watch, joiners: _Joiners) -> None:
    duplicates = sum(each.duplicates for each in run.recorder.broadcasts)
    missed = sum(run.recorder.lacks(each, peer) for each in run.measured for peer in members if peer is not each.author)
    outcome.must("delivered, published more than a window ago", "0", str(watch.stale), watch.stale == 0)
    outcome.must("fetched, published more than a window ago", "0", str(watch.fetched_stale), watch.fetched_stale == 0)
    outcome.must("fetched by whoever had it delivered before", "0", str(watch.fetched_again), watch.fetched_again == 0)
    outcome.must("delivered without replay, published before", "0", str(watch.unwanted), watch.unwanted == 0)
    outcome.must("duplicates delivered", "0", str(duplicates), duplicates == 0)
    outcome.must("missed by whoever was there", "0", str(missed), missed == 0)
    outcome.must("missed by joiners, of the window and since", "0", str(joiners.missed), joiners.missed == 0)
    outcome.figures |= {"missed": missed + joiners.missed, "duplicates": duplicates, "stale": watch.stale + watch.fetched_stale}


def _check_stores(outcome: Outcome, run: Run, members: Sequence[Peer]) -> None:
    small = max(peer.overlay.log.bytes for peer in members if peer.overlay.log.max_bytes == SMALL)
    large = min(peer.overlay.log.bytes for peer in members if peer.overlay.log.max_bytes > SMALL)
    outcome.must("bytes of bodies held: small stores, large stores", f"<= {SMALL:,}, more", f"{small:,}, {large:,}", small <= SMALL < large)
    held, most = max(len(peer.overlay.log) for peer in run.net.living), int(2.2 * WINDOW / run.parameters.interval)
    outcome.must("ids held, most", f"<= {most} (two windows)", str(held), held <= most)


SCENARIOS = (
    Scenario("expiry", "Ten windows of traffic, joiners with and without replay, small and large stores.", expiry, 12, 50, least=4),
)
