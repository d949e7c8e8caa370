"""Authors that say two things, clocks that are wrong, halves that never heard of one another."""

from nacl.bindings import crypto_sign

from solyd_swarm.core import wire
from solyd_swarm.core.envelope import Envelope, equivocation_id, seal
from solyd_swarm.core.events import Received
from solyd_swarm.core.log import Record
from solyd_swarm.simulation.experiment import Progress, Run, Senders, drain, form, prepare, publish
from solyd_swarm.simulation.graph import measure
from solyd_swarm.simulation.network import TOPIC_ID, Network
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.peer import Peer, key_pair
from solyd_swarm.simulation.recorder import Recorder
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

DAY = 86_400.0


def equivocation(size: int, seed: int, progress: Progress) -> Outcome:
    """An author tells some peers one thing, and others another under the same number."""
    outcome = Outcome()
    net = Network(seed, latency=(0.005, 0.05))
    for index in range(size):
        net.add_peer()
        if index:
            net.discover(net.peers[index], net.peers[net.rng.randrange(index)])
        net.run(0.01)
    net.run(30.0)
    progress(0.5)
    public, secret = key_pair("two-faced")

    def say(payload: bytes, first: int) -> Envelope:
        return seal(TOPIC_ID, public, 1, first, 1, (payload,), lambda data: crypto_sign(data, secret)[:64])

    def tell(peer: Peer, envelope: Envelope) -> None:
        neighbour = next(iter(peer.overlay.neighbors))
        frame = wire.encode(wire.Gossip(0, 0, envelope.body, envelope.signature))
        net.feed(peer, Received(neighbour, [frame]))

    versions = say(b"yes", 1), say(b"no", 1)
    for place, peer in enumerate(net.rng.sample(net.peers, max(2, size // 10))):
        tell(peer, versions[place % 2])
    id = equivocation_id(public, 1)
    convicted = net.run_until(lambda: all(peer.overlay.log.get(id) is not None for peer in net.living), 30.0)
    at = net.now - 30.0 - 0.01 * size
    tell(net.peers[0], say(b"more", 2))
    net.run(5.0)
    reports = [len(peer.equivocations) for peer in net.living]
    both = sum(1 for peer in net.living if {b"yes", b"no"} <= set(peer.messages))
    after = sum(peer.messages.count(b"more") for peer in net.living)
    digests = {peer.overlay.log.items.summary() for peer in net.living}
    outcome.must("all know of it after", "<= 30 s", f"{at:.2f} s" if convicted else "never", convicted)
    outcome.must("reports of it by each", "1", f"{min(reports)} to {max(reports)}", set(reports) == {1})
    outcome.must("peers that were given both versions", "0", str(both), both == 0)
    outcome.must("deliveries of what the author said afterwards", "0", str(after), after == 0)
    outcome.must("different digests in the end", "1", str(len(digests)), len(digests) == 1)
    outcome.figures |= {"seconds": at, "events": net.events}
    return outcome


def clocks(size: int, seed: int, progress: Progress) -> Outcome:
    """Wall clocks wrong by a day, in both directions: retention must not care."""
    outcome = Outcome()
    run = prepare(Parameters(peers=size, interval=0.2, senders=3, latency=(1.0, 50.0), jitter=5.0, directory=False, seed=seed))
    net = run.net
    net.now = 2 * DAY  # so that a day earlier is a time, too
    form(run)
    for index, peer in enumerate(net.peers):
        peer.clock_offset = (-DAY, 0.0, DAY)[index % 3]
    net.run(20.0)
    run.measured = publish(run, Senders(net, size), 300)
    progress(0.5)
    newcomer = net.add_peer()
    net.discover(newcomer, net.peers[0])
    seconds = drain(run, 60.0, latecomers=True)
    missed = run.recorder.missing(run.measured, latecomers=True)
    apart = max(abs(_age_error(run, peer, record)) for peer in net.living for record in peer.overlay.log.records())
    net.run(2 * run.net.config.window + 10.0)
    left = max(len(peer.overlay.log) for peer in net.living)
    duplicates = sum(each.duplicates for each in run.measured)
    outcome.must("missed, by a late joiner too", "0", str(missed), missed == 0 and seconds is not None)
    outcome.must("ages held differ from the true ones by at most, seconds", "<= 1", f"{apart:.3f}", apart <= 1.0)
    outcome.must("ids left after two windows", "0", str(left), left == 0)
    outcome.must("duplicates delivered", "0", str(duplicates), duplicates == 0)
    outcome.figures |= {"missed": missed, "duplicates": duplicates, "events": net.events}
    return outcome


def _age_error(run: Run, peer: Peer, record: Record) -> float:
    """Seconds by which a peer thinks a message older than it is."""
    assert record.envelope is not None
    broadcast = run.recorder.of(record.envelope)
    assert broadcast is not None
    return peer.overlay.log.age_ms(record, run.net.now) / 1000 - (run.net.now - broadcast.at)


def healing(size: int, seed: int, progress: Progress) -> Outcome:
    """Two swarms that formed apart, and then one member of one is told of one of the other."""
    outcome = Outcome()
    run = prepare(Parameters(peers=size, latency=(1.0, 50.0), jitter=5.0, directory=False, seed=seed))
    net = run.net
    halves: tuple[list[Peer], list[Peer]] = ([], [])
    for index in range(size):
        peer = net.add_peer()
        half = halves[index % 2]
        half.append(peer)
        if len(half) > 1:
            net.discover(peer, net.rng.choice(half[:-1]))
        net.run(0.01)
    net.run(30.0)
    recorder: Recorder = run.recorder
    run.measured = [recorder.publish(net.rng.choice(half), b"of one half %d" % n) for n in range(20) for half in halves]
    net.run(5.0)
    progress(0.5)
    net.discover(halves[0][0], halves[1][0])
    seconds = drain(run, 120.0)
    net.run(20.0)
    components = len(measure(net.peers, seed).components)
    missed = recorder.missing(run.measured)
    text = "never" if seconds is None else f"{seconds:.1f} s"
    outcome.must("all of both halves everywhere, one member being told of one", "<= 45 s", text, seconds is not None and seconds <= 45.0)
    outcome.must("missed", "0", str(missed), missed == 0)
    outcome.must("components in the end", "1", str(components), components == 1)
    outcome.figures |= {"missed": missed, "seconds_to_complete": seconds, "events": net.events}
    return outcome


SCENARIOS = (
    Scenario("equivocation", "An author says two things under one number (real signatures).", equivocation, 30, 300),
    Scenario("wrong-clocks", "Wall clocks wrong by a day, in both directions.", clocks, 15, 300, least=3),
    Scenario("healing", "Two swarms that formed apart become one.", healing, 30, 1000),
)
