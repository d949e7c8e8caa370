"""The broadcast tree where nothing fails: what Plumtree's paper (SRDS 2007, section 4) and iroh-gossip's simulator measure."""

from solyd_swarm.core import wire
from solyd_swarm.simulation.experiment import Progress, Run, Senders, form, perform, prepare, publish, report
from solyd_swarm.simulation.graph import distances, neighbours
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario


def _common(outcome: Outcome, run: Run, most_rmr: float) -> None:
    figures = report(run)
    outcome.figures |= figures
    outcome.must("missed", "0", str(figures["missed"]), figures["missed"] == 0)
    outcome.must("duplicates delivered", "0", str(figures["duplicates"]), figures["duplicates"] == 0)
    outcome.must("RMR", f"< {most_rmr}", f"{figures['rmr']:.4f}", figures["rmr"] < most_rmr)
    latency = figures["latency_ms"]
    outcome.note("latency p50 / p99 / max, ms", " / ".join(f"{latency[key]:.1f}" for key in ("p50", "p99", "max")))
    outcome.note("control / payload bytes per peer", f"{figures['control_bytes_per_peer']:.0f} / {figures['payload_bytes_per_peer']:.0f}")


def _flood_hops(run: Run) -> int:
    """Hops of a flood from the author of the measured messages over the very same graph, all links being equally fast."""
    edges = neighbours(run.net.peers)
    return max(distances(edges, run.measured[0].author.index).values())


def one_sender(size: int, seed: int, progress: Progress) -> Outcome:
    """A stable swarm, one sender: the tree is near perfect."""
    outcome = Outcome()
    run = perform(Parameters(peers=size, messages=100, latency=(1.0, 1.0), jitter=0.05, settle=40.0, seed=seed), progress)
    _common(outcome, run, 0.1)
    flood, ldh = _flood_hops(run), outcome.figures["ldh"]
    outcome.figures["flood_hops"] = flood
    ours = f"{ldh['mean']:.1f} / {ldh['p99']:.0f} / {ldh['max']:.0f}"
    outcome.must("LDH mean / p99 / max", f"at most {flood} + 3 (flood on the same graph: {flood})", ours, ldh["max"] <= flood + 3)
    outcome.note("RMR of Plumtree, 10,000 nodes", f"{outcome.figures['rmr']:.4f}", "near 0; flooding about 3")
    return outcome


def many_senders(size: int, seed: int, progress: Progress) -> Outcome:
    """A stable swarm, every message by another sender."""
    outcome = Outcome()
    timing = {"settle": 40.0, "latency": (1.0, 1.0), "jitter": 0.05}
    run = perform(Parameters(peers=size, messages=100, warmup=20, senders=min(100, size), seed=seed, **timing), progress)  # type: ignore[arg-type]
    _common(outcome, run, 0.5)
    ldh = outcome.figures["ldh"]
    theirs = "iroh-gossip asserts < 18 at 100 nodes"
    if size <= 100:
        outcome.must("LDH max", theirs, f"{ldh['max']:.0f}", ldh["max"] < 18)
    else:
        outcome.note("LDH max", f"{ldh['max']:.0f}", theirs)
    return outcome


def stability(size: int, seed: int, progress: Progress) -> Outcome:
    """Ten minutes of traffic from ten senders: how often the tree changes, and whether it comes to rest."""
    outcome = Outcome()
    run = prepare(Parameters(peers=size, interval=0.5, latency=(1.0, 20.0), jitter=2.0, directory=False, seed=seed))
    form(run, lambda share: progress(0.1 * share))
    net = run.net
    net.run(40.0)
    senders = Senders(net, 10)
    minutes: list[tuple[int, int, float, float]] = []
    for minute in range(10):
        before, swaps = run.recorder.traffic(), _swaps(run)
        messages = publish(run, senders, 120)
        traffic = run.recorder.traffic().since(before)
        receivers = sum(len(each.receivers) for each in messages)
        hops = sum(each.hops for each in messages) / len(messages)
        minutes.append((_swaps(run) - swaps, traffic.frames[wire.Prune.TYPE], traffic.payload_frames / receivers - 1, hops))
        run.measured += messages
        progress(0.1 + 0.09 * minute)
    net.run(5.0)
    missed = run.recorder.missing(run.measured)
    per_peer = minutes[-1][0] / size
    outcome.must("missed", "0", str(missed), missed == 0)
    outcome.must("swaps of a branch, a peer in the last minute", "<= 0.1", f"{per_peer:.3f}", per_peer <= 0.1)
    rmr = max(minute[2] for minute in minutes[1:])
    outcome.must("RMR of the worst minute but the first", "< 0.1", f"{rmr:.4f}", rmr < 0.1)
    for number, (swaps, prunes, redundancy, hops) in enumerate(minutes, 1):
        outcome.note(f"minute {number}: swaps, prunes, RMR, mean LDH", f"{swaps}, {prunes}, {redundancy:.4f}, {hops:.1f}")
    outcome.figures |= {"missed": missed, "minutes": minutes, "events": net.events}
    outcome.curves.append(("minute", "swaps of a branch", {f"{size} peers": [(float(n), float(m[0])) for n, m in enumerate(minutes, 1)]}))
    return outcome


def _swaps(run: Run) -> int:
    return sum(peer.overlay.broadcast.swaps for peer in run.net.peers)


SCENARIOS = (
    Scenario("plumtree-rmr", "A stable swarm, one sender: redundancy and hops of the tree.", one_sender, 100, 10_000),
    Scenario("many-senders", "A stable swarm, a hundred senders in turn.", many_senders, 100, 10_000),
    Scenario("tree-stability", "Ten minutes of traffic from ten senders: the tree comes to rest.", stability, 40, 1000),
)
