"""Anti-entropy by itself: what it costs to find differences, to catch up, to expire, and to do nothing."""

from dataclasses import replace

from solyd_swarm.core import wire
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.experiment import Progress, Run, Senders, form, prepare, publish
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.peer import Peer
from solyd_swarm.simulation.recorder import DIGEST_TYPES, Recorder, Traffic
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

REFERENCE = {"scattered": 109_000, "clustered": 4_500}
"""Bytes that the reference implementation of Negentropy takes for 100 differences among 100,000 items."""
TALK = (wire.Summary.TYPE, wire.InSync.TYPE, wire.Reconcile.TYPE, wire.Done.TYPE)


def _pair(seed: int, config: OverlayConfig | None = None) -> tuple[Network, Peer, Peer]:
    net = Network(seed, latency=(0.005, 0.005), jitter=0.001, config=config, sham_signatures=True, keep=False)
    one, other = net.add_peer(), net.add_peer()
    net.discover(one, other)
    net.run(2.0)
    return net, one, other


def _history(net: Network, author: Peer, count: int, progress: Progress) -> None:
    """So many messages of one envelope each, over five minutes by the author's clock, told as they come."""
    pause = 200.0 / count
    for number in range(count):
        net.publish(author, net.rng.randbytes(100))
        if number % 100 == 99:
            net.run(100 * pause)
            progress(number / count)


def _equal(one: Peer, other: Peer) -> bool:
    return one.overlay.log.items.summary() == other.overlay.log.items.summary()


def differences(size: int, seed: int, progress: Progress) -> Outcome:
    """`size` messages in both logs, and 100 that only one of them has."""
    outcome = Outcome()
    events = 0
    for place, kind in enumerate(REFERENCE):
        net, one, other = _pair(seed)
        begin = net.now
        _history(net, one, size, lambda share, place=place: progress((place + share) / 2))  # type: ignore[misc]
        assert net.run_until(lambda: _equal(one, other), 60.0)  # noqa: B023
        net.partition(((one,), (other,)))
        net.run(20.0)
        span = net.now - begin
        for number in range(100):
            # The clock of the author decides where in the order of the digest they are.
            one.clock_offset = -net.rng.random() * span if kind == "scattered" else 0.0
            net.publish(one, b"only here %d" % number)
        net.run(1.0)
        recorder = Recorder(net)
        before = recorder.traffic()
        net.heal()
        net.discover(one, other)
        done = net.run_until(lambda: _equal(one, other), 30.0)  # noqa: B023
        traffic = recorder.traffic().since(before)
        talk = sum(traffic.bytes[type] for type in TALK)
        events += net.events
        limit = 1.5 * REFERENCE[kind]
        what = f"{size:,} messages, 100 differ, {kind}"
        holds = done and (talk <= limit or size != 100_000)
        outcome.must(f"{what}: digest bytes", f"<= 1.5 x {REFERENCE[kind]:,} (at 100,000)", f"{talk:,}", holds)
        outcome.note(f"{what}: digest bytes and asking for the bodies", f"{traffic.digest_bytes:,}")
        outcome.note(f"{what}: round trips of Negentropy", str(traffic.frames[wire.Reconcile.TYPE] // 2), "2" if place == 0 else "3")
        outcome.must(f"{what}: equal again", "yes", "yes" if done else "no", done)
        outcome.figures[kind] = {"talk": talk, "digest": traffic.digest_bytes}
    outcome.figures["events"] = events
    return outcome


def late_joiner(size: int, seed: int, progress: Progress) -> Outcome:
    """A joiner comes to six peers with `size` messages in their window, each in an envelope of its own."""
    outcome = Outcome()
    run = prepare(Parameters(peers=6, latency=(5.0, 20.0), jitter=1.0, directory=False, seed=seed))
    form(run)
    net = run.net
    net.run(10.0)
    _history(net, net.peers[0], size, lambda share: progress(0.8 * share))
    net.run(5.0)
    before = run.recorder.traffic()
    joiner = net.add_peer()
    delivered: dict[int, int] = {}
    late = 0

    def watch(peer: Peer, delivery: object) -> None:
        nonlocal late
        if peer is joiner:
            envelope = delivery.envelope  # type: ignore[attr-defined]
            delivered[envelope.first] = delivered.get(envelope.first, 0) + 1
            late += delivery.late  # type: ignore[attr-defined]

    net.watch = watch
    start = net.now
    net.discover(joiner, net.peers[1])
    done = net.run_until(lambda: len(delivered) >= size, 280.0)
    seconds = net.now - start
    net.run(5.0)
    traffic = run.recorder.traffic().since(before)
    once = len(delivered) == size and all(count == 1 for count in delivered.values())
    outcome.must("all received once", "yes", "yes" if once and done else f"no: {len(delivered)} of {size}", once and done)
    each = traffic.digest_bytes / size
    outcome.must("digest bytes a message, asking for bodies included", "<= 40", f"{each:.1f}", each <= 40)
    outcome.note("delivered late", str(late))
    outcome.note("bodies sent for each that was wanted", f"{traffic.payload_frames / size:.3f}")
    outcome.note("seconds until all were delivered", f"{seconds:.1f}")
    outcome.figures |= {"missed": size - len(delivered), "digest_bytes_per_message": each, "seconds": seconds, "events": net.events}
    return outcome


def expiry(size: int, seed: int, progress: Progress) -> Outcome:
    """Ten windows of traffic; joiners with and without replay; stores of different sizes."""
    outcome = Outcome()
    window = 60.0
    config = replace(OverlayConfig(), window=window)
    small = replace(config, max_bytes=20_000)
    run = prepare(Parameters(peers=size, interval=0.5, latency=(1.0, 20.0), jitter=1.0, directory=False, seed=seed), config=config)
    net = run.net
    for index in range(size):
        peer = net.add_peer(config=small if index % 4 == 3 else config)
        if index:
            net.discover(peer, net.peers[net.rng.randrange(index)])
        net.run(0.05)
    net.run(20.0)
    senders = Senders(net, 3)
    stale = 0
    per_window: list[int] = []
    deliver = net.watch
    assert deliver is not None

    def watch(peer: Peer, delivery: object) -> None:
        nonlocal stale
        record = peer.overlay.log.get(delivery.envelope.id)  # type: ignore[attr-defined]
        if record is not None and net.now - record.born > window + 1.0:
            stale += 1
        deliver(peer, delivery)  # type: ignore[arg-type]

    net.watch = watch
    for number in range(10):
        before: Traffic = run.recorder.traffic()
        for turn in range(4):
            run.measured += publish(run, senders, int(window / run.parameters.interval / 4))
            newcomer = net.add_peer(config=replace(config, replay=turn % 2 == 0))
            net.discover(newcomer, net.rng.choice(net.peers[:size]))
            net.crash(net.peers[-2] if len(net.peers) > size + 4 else newcomer)
        per_window.append(run.recorder.traffic().since(before).digest_bytes)
        progress(number / 10)
    net.run(3.0)
    duplicates = sum(each.duplicates for each in run.recorder.broadcasts)
    missed = run.recorder.missing(run.measured)
    held = max(len(peer.overlay.log) for peer in net.living)
    outcome.must("delivered older than the window", "0", str(stale), stale == 0)
    outcome.must("duplicates delivered", "0", str(duplicates), duplicates == 0)
    outcome.must("missed by whoever was there", "0", str(missed), missed == 0)
    outcome.must("ids held, most", f"<= {int(2.2 * window / run.parameters.interval)} (two windows)", str(held), held <= 2.2 * window / 0.5)
    spread = 0.15 if size >= 50 else 0.5  # few peers differ much from window to window by chance
    early, last = sum(per_window[2:6]) / 4, sum(per_window[6:]) / 4
    ours = f"{early:,.0f} then {last:,.0f}"
    outcome.must("digest bytes a window, windows 3-6 and 7-10", f"flat: within {spread:.0%}", ours, abs(last - early) <= spread * early)
    outcome.figures |= {"missed": missed, "duplicates": duplicates, "stale": stale, "digest_bytes": per_window, "events": net.events}
    outcome.curves.append(("window", "digest bytes", {"all peers": [(float(n), float(b)) for n, b in enumerate(per_window, 1)]}))
    return outcome


def idle(size: int, seed: int, progress: Progress) -> Outcome:
    """Equal logs and nothing to do: with few and many messages, with few and many peers."""
    outcome = Outcome()
    events = 0
    found: list[float] = []
    cases = [(min(100, size), 10), (min(100, size), 2000), (size, 10)]
    for place, (peers, messages) in enumerate(cases):
        run: Run = prepare(Parameters(peers=peers, interval=0.01, latency=(1.0, 5.0), jitter=1.0, directory=False, seed=seed))
        form(run)
        net = run.net
        net.run(40.0)
        publish(run, Senders(net, 1), messages)
        net.run(120.0)  # the interval of rounds grows to its longest meanwhile
        before = run.recorder.traffic()
        net.run(120.0)
        traffic = run.recorder.traffic().since(before)
        each = traffic.digest_bytes / peers / 2
        found.append(each)
        events += net.events
        everything = sum(traffic.bytes) / peers / 2
        outcome.note(f"{peers:,} peers, {messages:,} messages: digest / all bytes per peer and minute", f"{each:.0f} / {everything:.0f}")
        progress((place + 1) / len(cases))
    spread = max(found) / min(found) - 1
    outcome.must("difference between the three", "<= 10 %", f"{spread:.1%}", spread <= 0.1)
    outcome.figures |= {"digest_bytes_per_minute": found, "types": list(DIGEST_TYPES), "events": events}
    return outcome


SCENARIOS = (
    Scenario("differences", "Many messages in both logs (the size), and 100 in one only.", differences, 5000, 100_000),
    Scenario("late-joiner", "A joiner, and many messages in the window (the size).", late_joiner, 3000, 100_000),
    Scenario("expiry", "Ten windows of traffic, joiners with and without replay, small and large stores.", expiry, 12, 50),
    Scenario("idle", "Equal logs, no traffic: what digests cost.", idle, 200, 10_000),
)
