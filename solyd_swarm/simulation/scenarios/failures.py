"""Peers that die, networks that lose, split and churn: HyParView's figures (DSN 2007, section 5.2), and beyond."""

from dataclasses import replace
from functools import partial

from solyd_swarm.core.membership import MembershipConfig
from solyd_swarm.simulation.branches import futures
from solyd_swarm.simulation.directory import Directory
from solyd_swarm.simulation.experiment import Progress, Run, Senders, drain, form, perform, prepare, publish, report
from solyd_swarm.simulation.graph import measure
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

CYCLE = MembershipConfig().shuffle_interval
"""Seconds of one membership cycle: the mean time between two shuffles of a peer."""
CYCLES = 50
"""Cycles before anybody dies, in which the views become what they will be, as in the paper."""
PUBLISHED = {0.1: 0.99, 0.2: 0.99, 0.3: 0.99, 0.4: 0.99, 0.5: 0.99, 0.6: 0.99, 0.7: 0.99, 0.8: 0.99, 0.9: 0.99, 0.95: 0.9}
"""Share of dead peers -> HyParView's reliability: near 100 % up to 90 %, above 90 % at 95 %."""


WAIT = 2
"""Cycles between the deaths and the first message."""
FEW = 2000
"""Peers, from which on 5 % of them are enough to go by."""
WHOLE = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares for which the time to completeness, with all parts on, is measured."""
DRAWS = {0.9: 4, 0.95: 8}
"""Of those who die, as few are left: how they hang together is much by chance. Else one."""


def _die(run: Run, share: float, draw: int = 0) -> None:
    net = run.net
    for _ in range(draw):
        net.rng.random()  # another future of the same swarm
    for peer in net.rng.sample(net.living, round(share * len(net.living))):
        net.crash(peer)


def _paper(run: Run, share: float, draw: int) -> dict[str, float | None]:
    """As in the paper: nothing but membership and the tree."""
    net = run.net
    if run.directory is not None:
        run.directory.closed = True
    for peer in net.peers:
        antientropy = peer.overlay.antientropy
        antientropy.config = replace(antientropy.config, rounds=False)
    before = net.events
    _die(run, share, draw)
    net.run(WAIT * CYCLE)
    run.measured = publish(run, Senders(net, len(net.living)), run.parameters.messages)
    net.run(5.0)
    run.recorder.missing(run.measured)
    graph = measure(net.peers, run.parameters.seed)
    figures = report(run)
    return {
        "reliability": figures["reliability"],
        "worst": figures["reliability_worst"],
        "isolated": graph.isolated,
        "largest": graph.components[0] / len(net.living),
        "events": net.events - before,
    }


def _whole(run: Run, share: float) -> dict[str, float | None]:
    """With all that there is: 20 messages by as many peers at the very moment, before anybody has taken the place of the dead."""
    net, before = run.net, run.net.events
    _die(run, share)
    senders = net.rng.sample(net.living, min(20, len(net.living)))
    run.measured = [run.recorder.publish(peer, net.rng.randbytes(run.parameters.size)) for peer in senders]
    seconds = drain(run, 300.0)
    run.recorder.missing(run.measured)
    return {"missed": sum(each.missed for each in run.measured), "seconds": seconds, "events": net.events - before}


def _mean(results: list[dict[str, float | None]], name: str) -> float:
    return sum(each[name] or 0.0 for each in results) / len(results)


def deaths(size: int, seed: int, progress: Progress) -> Outcome:
    """10 to 95 % of the peers die at once."""
    outcome = Outcome()
    run = prepare(Parameters(peers=size, messages=50, interval=0.1, latency=(1.0, 10.0), jitter=1.0, seed=seed))
    form(run, lambda share: progress(0.2 * share))
    for cycle in range(CYCLES):
        run.net.run(CYCLE)
        progress(0.2 + 0.2 * cycle / CYCLES)
    publish(run, Senders(run.net, 1), 5)
    progress(0.4)
    draws = [(share, draw) for share in PUBLISHED for draw in range(DRAWS.get(share, 1))]
    jobs = [partial(_paper, run, share, draw) for share, draw in draws] + [partial(_whole, run, share) for share in WHOLE]
    results: list[dict[str, float | None]] = []
    for number, job in enumerate(jobs):
        results += futures([job])
        progress(0.4 + 0.6 * number / len(jobs))
    whole = results[len(draws) :]
    paper = {share: [each for (of, _), each in zip(draws, results[: len(draws)], strict=True) if of == share] for share in PUBLISHED}
    reliability = {share: _mean(each, "reliability") for share, each in paper.items()}
    for share, published in PUBLISHED.items():
        drawn = sorted(each["reliability"] or 0.0 for each in paper[share])
        spread = f", {len(drawn)} draws: {drawn[0]:.3f} to {drawn[-1]:.3f}" if len(drawn) > 1 else ""
        text = f"{reliability[share]:.4f}{spread} (isolated {_mean(paper[share], 'isolated'):.0f})"
        what = f"{share:.0%} die; no anti-entropy: reliability"
        if size >= FEW or share < 0.9:
            outcome.must(what, f">= {published} (HyParView)", text, reliability[share] >= published)
        else:  # a handful of survivors says nothing
            outcome.note(what, text, f">= {published} (HyParView)")
    for share, figures in zip(WHOLE, whole, strict=True):
        seconds = figures["seconds"]
        text = "never complete" if seconds is None else f"complete after {seconds:.1f} s = {seconds / CYCLE:.2f} cycles"
        outcome.must(f"{share:.0%} die; all parts", "100 %", text, figures["missed"] == 0)
    outcome.curves.append(("share of dead peers", "reliability", {
        "HyParView (published)": list(PUBLISHED.items()),
        "solyd_swarm without anti-entropy": list(reliability.items()),
    }))  # fmt: skip
    outcome.figures["without_antientropy"] = {str(share): each for share, each in paper.items()}
    outcome.figures["whole"] = {str(share): ours for share, ours in zip(WHOLE, whole, strict=True)}
    outcome.figures["events"] = run.net.events + sum(int(each["events"] or 0) for each in results)
    return outcome


def lossy(size: int, seed: int, progress: Progress) -> Outcome:
    """30 % of all frames are lost, 200 ms of jitter."""
    outcome = Outcome()
    run = perform(
        Parameters(
            peers=size,
            messages=200,
            warmup=30,
            interval=0.25,
            loss=0.3,
            latency=(1.0, 20.0),
            jitter=200.0,
            settle=40.0,
            drain=120.0,
            seed=seed,
        ),
        progress,
    )
    figures = report(run)
    outcome.figures |= figures
    latencies = [latency for each in run.measured for latency in each.latencies]
    wanted = sum(len(run.recorder.obliged(each)) for each in run.measured)
    within = sum(1 for latency in latencies if latency <= 5.0) / wanted
    outcome.figures["within_5_s"] = within
    outcome.must("delivered within 5 s", ">= 99 %", f"{within:.2%}", within >= 0.99)
    outcome.must("missed in the end", "0", str(figures["missed"]), figures["missed"] == 0)
    outcome.must("duplicates delivered", "0", str(figures["duplicates"]), figures["duplicates"] == 0)
    seconds = figures["seconds_to_complete"]
    outcome.note("complete after the last message", "never" if seconds is None else f"{seconds:.1f} s")
    outcome.note("RMR", f"{figures['rmr']:.2f}", "flooding about 3, and it would miss some")
    latency = figures["latency_ms"]
    outcome.note("latency p50 / p99 / max, ms", " / ".join(f"{latency[key]:.0f}" for key in ("p50", "p99", "max")))
    return outcome


def churn(size: int, seed: int, progress: Progress) -> Outcome:
    """20 % of the peers are replaced per minute, for ten minutes."""
    outcome = Outcome()
    run = perform(
        Parameters(peers=size, messages=600, interval=1.0, senders=10, churn=0.2, latency=(1.0, 50.0), jitter=5.0, seed=seed), progress
    )
    figures = report(run)
    outcome.figures |= figures
    outcome.must(
        "delivered, of those alive from publication to the end",
        ">= 99.9 %",
        f"{figures['reliability']:.4%}",
        figures["reliability"] >= 0.999,
    )
    outcome.must("duplicates delivered", "0", str(figures["duplicates"]), figures["duplicates"] == 0)
    outcome.must("isolated at the end", "0", str(figures["isolated"]), figures["isolated"] == 0)
    latency = figures["latency_ms"]
    outcome.note("latency p50 / p99 / max, ms", " / ".join(f"{latency[key]:.0f}" for key in ("p50", "p99", "max")))
    outcome.note("RMR", f"{figures['rmr']:.3f}")
    return outcome


def partition(size: int, seed: int, progress: Progress) -> Outcome:
    """Cut in two halves for 60 s, with and without the peers that all joined by."""
    outcome = Outcome()
    events = 0
    for number, bootstraps_die in enumerate((False, True)):
        seconds, missed, components, simulated = _split(size, seed, bootstraps_die)
        events += simulated
        progress((number + 1) / 2)
        name = "all bootstrap peers dead" if bootstraps_die else "healed"
        text = "never" if seconds is None else f"{seconds:.1f} s"
        outcome.must(f"{name}: all messages of both halves everywhere after", "<= 45 s", text, seconds is not None and seconds <= 45.0)
        outcome.must(f"{name}: missed", "0", str(missed), missed == 0)
        outcome.must(f"{name}: components in the end", "1 (iroh-gossip never merges them)", str(components), components == 1)
        outcome.figures["dead_seconds" if bootstraps_die else "seconds"] = seconds
    outcome.figures["events"] = events
    return outcome


def _split(size: int, seed: int, bootstraps_die: bool) -> tuple[float | None, int, int, int]:
    run = prepare(Parameters(peers=size, latency=(1.0, 50.0), jitter=5.0, seed=seed, directory=False))
    net = run.net
    run.directory = Directory(net, delay=(1.0, 5.0), sample=2, share=0.5)
    first = [net.add_peer() for _ in range(3)]
    for index in range(3, size):
        net.discover(net.add_peer(), first[index % 3])
        net.run(0.01)
    for one, other in ((0, 1), (1, 2)):
        net.discover(first[one], first[other])
    for peer in net.peers:
        run.directory.enlist(peer)
    net.run(30.0)
    peers = net.rng.sample(net.peers, size)
    net.partition((peers[: size // 2], peers[size // 2 :]))
    if bootstraps_die:
        for peer in first:
            net.crash(peer)
    halves = [[peer for peer in net.living if peer.zone == zone] for zone in (0, 1)]
    for _ in range(30):
        run.measured += [run.recorder.publish(net.rng.choice(half), net.rng.randbytes(100)) for half in halves]
        net.run(2.0)
    net.heal()
    seconds = drain(run, 300.0)
    net.run(5.0)
    missed = run.recorder.missing(run.measured)
    return seconds, missed, len(measure(net.peers, seed).components), net.events


SCENARIOS = (
    Scenario("hyparview-fig2", "10 to 95 % of the peers die at once.", deaths, 200, 10_000, least=60),
    Scenario("lossy", "30 % of all frames are lost, 200 ms of jitter.", lossy, 60, 1000),
    Scenario("churn", "20 % of the peers are replaced per minute, for ten minutes.", churn, 50, 1000, least=10),
    Scenario("partition-heal", "Cut in two halves for 60 s; once also without the peers that all joined by.", partition, 40, 1000, least=8),
)
