"""One run: form a swarm, let it settle, publish, let things happen to it, and measure."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.broadcast import BroadcastConfig
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.directory import Directory
from solyd_swarm.simulation.graph import Graph, measure
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.peer import Peer
from solyd_swarm.simulation.recorder import Broadcast, Recorder, Traffic, percentile

JOIN_PAUSE = 0.002
"""Seconds between two joins, where they come one after the other."""
GRACE = 5.0
"""Seconds before whoever has no neighbour counts as isolated."""

SLICES = 20
"""In which a long time passes, so that progress can be told meanwhile."""

Progress = Callable[[float], None]
"""Told which share of the run (0 to 1) is done, about."""


@dataclass
class Run:
    """A run in progress, and what it left behind."""

    parameters: Parameters
    net: Network
    recorder: Recorder
    directory: Directory | None
    measured: list[Broadcast]
    traffic: Traffic
    graph: Graph | None = None
    seconds_to_complete: float | None = None


def overlay_config(parameters: Parameters) -> OverlayConfig:
    """The default, but for what the parameters switch off or set."""
    config = OverlayConfig()
    if not parameters.antientropy:
        config = replace(config, antientropy=AntiEntropyConfig(rounds=False))
    if parameters.hops is not None:
        config = replace(config, broadcast=BroadcastConfig(optimization_threshold=parameters.hops))
    return config


def prepare(parameters: Parameters, *, config: OverlayConfig | None = None, keep: bool = False) -> Run:
    """An empty network."""
    least, most = parameters.latency
    net = Network(
        parameters.seed,
        latency=(least / 1000, most / 1000),
        jitter=parameters.jitter / 1000,
        config=config or overlay_config(parameters),
        sham_signatures=True,
        keep=keep,
    )
    recorder = Recorder(net)
    directory = Directory(net) if parameters.directory else None
    return Run(parameters, net, recorder, directory, [], recorder.traffic())


def form(run: Run, progress: Progress = lambda share: None) -> None:
    """All peers join, as the parameters say."""
    net, count = run.net, run.parameters.peers
    if run.parameters.join == "simultaneous":
        peers = [net.add_peer() for _ in range(count)]
        for peer in peers:
            net.discover(peer, _another(net, peer))
    else:
        for index in range(count):
            peer = net.add_peer()
            if index:
                known = {"star": 0, "chain": index - 1}.get(run.parameters.join)
                net.discover(peer, net.peers[net.rng.randrange(index) if known is None else known])
            if run.parameters.join != "star":
                net.run(JOIN_PAUSE)
            progress(index / count)
    if run.directory is not None:
        for peer in net.peers:
            run.directory.enlist(peer)


def _another(net: Network, peer: Peer) -> Peer:
    other = net.rng.randrange(len(net.peers) - 1)
    return net.peers[other + (other >= peer.index)]


class Senders:
    """Who publishes next: so many peers in turn, replaced when they die."""

    def __init__(self, net: Network, count: int) -> None:
        self._net = net
        self._peers = net.rng.sample(net.living, min(count, len(net.living)))
        self._turn = 0

    def next(self) -> Peer:
        place = self._turn % len(self._peers)
        self._turn += 1
        if not self._peers[place].alive:
            self._peers[place] = self._net.rng.choice(self._net.living)
        return self._peers[place]


def publish(run: Run, senders: Senders, count: int, progress: Progress = lambda share: None) -> list[Broadcast]:
    """So many messages, one an interval."""
    done = []
    for number in range(count):
        peer = senders.next()
        done.append(run.recorder.publish(peer, run.net.rng.randbytes(run.parameters.size)))
        run.net.run(run.parameters.interval)
        progress(number / count)
    return done


def fail(run: Run) -> None:
    """A share of the peers dies at once; two are left at least."""
    net, count = run.net, len(run.net.living)
    for peer in net.rng.sample(net.living, min(round(run.parameters.fail * count), count - 2)):
        net.crash(peer)


def start_churn(run: Run, until: float) -> None:
    """Replaces peers at an even pace: one dies, as its neighbours notice at once, a new one comes by a random living one."""
    net = run.net
    pause = 60.0 / (run.parameters.churn * run.parameters.peers)

    def one() -> None:
        if net.now >= until:
            return
        living = net.living
        net.crash(net.rng.choice(living))
        newcomer = net.add_peer()
        net.discover(newcomer, net.rng.choice([peer for peer in living if peer.alive]))
        if run.directory is not None:
            run.directory.enlist(newcomer)
        net.after(pause, one)

    net.after(pause, one)


def drain(run: Run, seconds: float, *, latecomers: bool = False) -> float | None:
    """Lets time pass until nobody misses anything that was measured; how long that took, or None if it did not come to that."""
    net, start = run.net, run.net.now
    left = list(run.measured)
    while True:
        # Looked at twice a second, but told exactly, by when the last delivery was.
        left = [each for each in left if not run.recorder.is_complete(each, run.recorder.obliged(each, latecomers=latecomers))]
        if not left:
            return max(0.0, max(each.last_at for each in run.measured) - start)
        if net.now - start >= seconds:
            return None
        net.run(0.5)


def let_pass(net: Network, seconds: float, progress: Progress) -> None:
    """As `Network.run`, to the very same moment: the last step is so short that its end is exact."""
    end = net.now + seconds
    for number in range(1, SLICES):
        net.run(seconds / SLICES)
        progress(number / SLICES)
    net.run(end - net.now)


def perform(parameters: Parameters, progress: Progress = lambda share: None) -> Run:
    """The whole run."""
    run = prepare(parameters)
    net = run.net
    form(run, lambda share: progress(0.2 * share))
    let_pass(net, parameters.settle, lambda share: progress(0.2 + 0.2 * share))
    progress(0.4)
    net.loss = parameters.loss
    net.reordering = parameters.loss > 0  # as with datagrams: what was lost keeps nothing waiting
    senders = Senders(net, parameters.senders)
    publish(run, senders, parameters.warmup)
    net.run(1.0)
    run.graph = measure(net.peers, parameters.seed)
    if parameters.fail:
        fail(run)
        net.run(parameters.wait)
    run.traffic = run.recorder.traffic()
    start = net.now
    if parameters.partition:
        halves = net.rng.sample(net.peers, len(net.peers))
        net.partition((halves[: len(halves) // 2], halves[len(halves) // 2 :]))
    if parameters.churn:
        start_churn(run, net.now + parameters.messages * parameters.interval)
    run.measured = publish(run, senders, parameters.messages, lambda share: progress(0.4 + 0.5 * share))
    if parameters.partition:
        net.run(max(0.0, start + parameters.partition - net.now))
        net.heal()
    run.seconds_to_complete = drain(run, parameters.drain)
    run.recorder.missing(run.measured)
    if parameters.fail or parameters.churn or parameters.partition:
        net.run(GRACE)  # who has joined or lost its neighbours this very moment is not isolated yet
        run.graph = measure(net.peers, parameters.seed)
    progress(1.0)
    return run


def report(run: Run) -> dict[str, Any]:
    """The figures of a run, by the names of `recorder` and `graph`; nothing in it depends on the machine."""
    net, graph = run.net, run.graph or measure(run.net.peers, run.parameters.seed)
    traffic = run.recorder.traffic().since(run.traffic)
    reliabilities = []
    for each in run.measured:
        obliged = len(run.recorder.obliged(each))
        reliabilities.append(1 - each.missed / obliged if obliged else 1.0)
    latencies = sorted(1000 * latency for each in run.measured for latency in each.latencies)
    hops = sorted(float(each.hops) for each in run.measured)
    receivers = sum(len(each.receivers) for each in run.measured)
    living = max(1, len(net.living))
    rounds = max(1, traffic.frames[0x40])
    return {
        "parameters": asdict(run.parameters),
        "reliability": sum(reliabilities) / len(reliabilities),
        "reliability_worst": min(reliabilities),
        "missed": sum(each.missed for each in run.measured),
        "duplicates": sum(each.duplicates for each in run.recorder.broadcasts),
        "late": sum(each.late for each in run.measured),
        "isolated": graph.isolated,
        "components": len(graph.components),
        "rmr": traffic.payload_frames / receivers - 1 if receivers else 0.0,
        "ldh": {"mean": sum(hops) / len(hops), "p99": percentile(hops, 0.99), "max": hops[-1]},
        "ldh_distribution": {str(hop): count for hop, count in sorted(Counter(each.hops for each in run.measured).items())},
        "latency_ms": {
            "p50": percentile(latencies, 0.5),
            "p99": percentile(latencies, 0.99),
            "max": latencies[-1] if latencies else 0.0,
        },
        "seconds_to_complete": run.seconds_to_complete,
        "in_degree": {str(degree): count for degree, count in graph.in_degree.items()},
        "clustering": graph.clustering,
        "path": graph.path,
        "diameter": graph.diameter,
        "control_bytes_per_peer": traffic.control_bytes / living,
        "payload_bytes_per_peer": traffic.payload_bytes / living,
        "digest_bytes_per_round": traffic.digest_bytes / rounds,
        "frames": sum(traffic.frames),
        "simulated_seconds": net.now,
        "events": net.events,
    }
