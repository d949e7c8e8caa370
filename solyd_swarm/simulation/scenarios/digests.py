"""Anti-entropy by itself: what it costs to find differences, to catch up, and to do nothing."""

from dataclasses import replace

from solyd_swarm.core import wire
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.experiment import Progress, Run, Senders, form, prepare, publish
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.peer import Peer
from solyd_swarm.simulation.recorder import DIGEST_TYPES, Recorder
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
    """So many messages of one envelope each, over 200 seconds, told as they come."""
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
        limit = 1.5 * REFERENCE[kind]  # fewer messages never take more
        what = f"{size:,} messages, 100 differ, {kind}"
        outcome.must(f"{what}: digest bytes", f"<= 1.5 x {REFERENCE[kind]:,} (at 100,000)", f"{talk:,}", talk <= limit)
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


def _lacking(joiner: Peer, peer: Peer, since: float) -> int:
    """Ids published since then that a peer holds and the joiner does not."""
    return sum(record.born >= since and not joiner.overlay.log.holds(record.id) for record in peer.overlay.log.records())


def old_swarm(size: int, seed: int, progress: Progress) -> Outcome:
    """A joiner, with and without replay, comes to six peers that have talked for two windows: half of `size` ids are without bodies."""
    outcome = Outcome()
    events = 0
    for place, replay in enumerate((True, False)):
        config = OverlayConfig(window=100.0)
        run = prepare(Parameters(peers=6, latency=(5.0, 20.0), jitter=1.0, directory=False, seed=seed), config=config)
        form(run)
        net = run.net
        net.run(10.0)
        _history(net, net.peers[0], size, lambda share, place=place: progress((place + 0.9 * share) / 2))  # type: ignore[misc]
        before, told = run.recorder.traffic(), len(net.peers[0].overlay.log)
        joiner = net.add_peer(config=replace(config, replay=replay))
        net.discover(joiner, net.peers[1])
        net.run(30.0)
        each = run.recorder.traffic().since(before).digest_bytes / told
        what = "with replay" if replay else "without"
        outcome.must(f"{what}: digest bytes an id, asking for bodies included", "<= 45", f"{each:.1f}", each <= 45)
        lacking = sum(_lacking(joiner, peer, net.now - 2 * config.window + 1.0) for peer in net.peers)
        outcome.must(f"{what}: ids that others hold and the joiner does not, after 30 s", "0", str(lacking), lacking == 0)
        outcome.figures[what.replace(" ", "_")] = each
        events += net.events
    outcome.figures["events"] = events
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
    Scenario(
        "old-swarm", "A joiner, and as many ids without bodies as messages in the window (half the size each).", old_swarm, 3000, 50_000
    ),
    Scenario("idle", "Equal logs, no traffic: what digests cost.", idle, 200, 10_000),
)
