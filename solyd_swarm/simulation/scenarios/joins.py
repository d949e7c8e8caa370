"""How a swarm begins: many that join through one, back to back, and a crowd that comes to a swarm with a history."""

import gc

from solyd_swarm.simulation.experiment import Progress, Run, Senders, drain, form, prepare, publish
from solyd_swarm.simulation.graph import measure
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

STARS = {8: 1000, 100: 100, 1000: 5}
"""Peers that join through one -> seeds tried, at full size."""


def star(size: int, seed: int, progress: Progress) -> Outcome:
    """`size` seeds with 8 peers, and fewer with 100 and 1,000, as in `STARS`."""
    outcome = Outcome()
    events = 0
    for peers, most in STARS.items():
        seeds = max(1, most * size // STARS[8])
        if peers == 1000 and size < STARS[8]:
            continue  # not for the test suite
        isolated = apart = degree = 0
        slowest: float | None = 0.0
        for number in range(seeds):
            run = prepare(Parameters(peers=peers, join="star", latency=(0.2, 20.0), jitter=1.0, directory=False, seed=seed + number))
            form(run)
            net = run.net
            together = net.run_until(net.graph_is_connected, 5.0)
            slowest = max(slowest, net.now) if together and slowest is not None else None
            net.run(max(0.0, 5.0 - net.now))
            graph = measure(net.peers, seed)
            isolated += graph.isolated
            apart += len(graph.components) - 1
            degree = max(degree, *graph.in_degree)
            events += net.events
            progress(number / seeds)
            if number % 20 == 0:
                gc.collect()
        name = f"{peers:,} peers, {seeds:,} seeds"
        outcome.must(f"{name}: isolated after 5 s", "0 (iroh-gossip, 8 peers: 1-2 in 8 of 30 runs)", str(isolated), isolated == 0)
        outcome.must(f"{name}: parts cut off after 5 s", "0", str(apart), apart == 0)
        outcome.note(f"{name}: connected at the latest after", "never" if slowest is None else f"{slowest:.2f} s")
        outcome.figures[str(peers)] = {"isolated": isolated, "apart": apart, "slowest": slowest, "largest_in_degree": degree}
    outcome.figures["events"] = events
    outcome.figures["isolated"] = sum(outcome.figures[key]["isolated"] for key in outcome.figures if key != "events")
    return outcome


def flash_crowd(size: int, seed: int, progress: Progress) -> Outcome:
    """Ten peers with 1,000 messages in their window; then all the others come at the same moment, by one and the same."""
    outcome = Outcome()
    run: Run = prepare(Parameters(peers=10, interval=0.02, latency=(1.0, 50.0), jitter=5.0, seed=seed, directory=False))
    form(run)
    net = run.net
    net.run(20.0)
    run.measured = publish(run, Senders(net, 5), 1000)
    progress(0.2)
    start = net.now
    for _ in range(size - 10):
        net.discover(net.add_peer(), net.peers[0])
    before = run.recorder.traffic()
    connected = net.run_until(net.graph_is_connected, 30.0)
    at = net.now - start
    progress(0.5)
    seconds = drain(run, 120.0, latecomers=True)
    missed = run.recorder.missing(run.measured, latecomers=True)
    duplicates = sum(each.duplicates for each in run.measured)
    traffic = run.recorder.traffic().since(before)
    ids = 1000 * (size - 10)
    outcome.must("connected after", "some seconds", f"{at:.2f} s" if connected else "never", connected)
    outcome.must("missed of the window, by anyone", "0", str(missed), missed == 0)
    outcome.must("duplicates delivered", "0", str(duplicates), duplicates == 0)
    outcome.note("everybody has all after", "never" if seconds is None else f"{seconds + at:.1f} s")
    outcome.note("bodies sent for each that was wanted", f"{traffic.payload_frames / ids:.2f}")
    outcome.note("digest bytes for each message caught up on", f"{traffic.digest_bytes / ids:.1f}")
    outcome.figures |= {"missed": missed, "duplicates": duplicates, "seconds_to_complete": seconds, "events": net.events}
    return outcome


SCENARIOS = (
    Scenario("star-join", "All join through one, back to back (the size is the number of seeds at 8 peers).", star, 40, STARS[8]),
    Scenario("flash-crowd", "A crowd comes at once to ten peers with 1,000 messages in their window.", flash_crowd, 40, 1000, least=11),
)
