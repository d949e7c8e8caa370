"""How long a swarm takes to heal: after an outage of one member, and when two halves that formed apart can reach each other.

Run it as root as ``python bench/healing.py``: hosts are network namespaces, each member is a process of its own, and no packet leaves the
machine. The scenarios are those of `test/test_change.py` and `test/test_lans.py`, which hold them to 15 and 45 s; here each is
repeated and the distribution is told. All times count from when the network is back, or there is a way.

- outages: a cable is out, packets are lost further away, an address changes, a process is stopped, the bootstraps die and strangers
  get their addresses. ``caught_up``: the member has all that the others published meanwhile; ``heard``: they have what it published.
- halves: of six members, joined by a router (each half has the address of one member of the other, which led nowhere before) or by a
  cable between their switches (mDNS). ``everything``: all that either half published before is everywhere; ``talk``: so is one
  message of each member published after that.

Several run at a time (``--parallel``); with more than the machine has cores, they measure one another.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import hosts
import processes
import test_change
import test_lans

PATIENCE = 120.0
"""Seconds after which a run counts as failed."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank) and maximum, in seconds."""
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[max(0, -(-99 * len(ordered) // 100) - 1)], 3),
        "max": round(ordered[-1], 3),
    }


def repeat(run: Callable[[], Any], runs: int, parallel: int) -> dict[str, Any]:
    """The distribution of what ``run`` measures, and how many runs failed."""

    def once(_: int) -> dict[str, float] | str:
        try:
            return asdict(run())
        except (AssertionError, RuntimeError) as error:
            return str(error)[:500]

    with ThreadPoolExecutor(parallel) as pool:
        outcomes = list(pool.map(once, range(runs)))
    good = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    figures: dict[str, Any] = {"runs": runs, "failed": [outcome for outcome in outcomes if isinstance(outcome, str)]}
    return figures | {name: spread([outcome[name] for outcome in good]) for name in (good[0] if good else ())}


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of healing on hosts of their own.")
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join([*test_change.SCENARIOS, *test_lans.WAYS])} (all)")
    parser.add_argument("--runs", type=int, default=20, help="how often each is run (20)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of an outage (60)")
    parser.add_argument("--apart", type=float, default=60.0, help="longest time that halves are apart; half of it is the shortest (60)")
    parser.add_argument("--members", type=int, default=3, help="members of a half (3)")
    parser.add_argument("--discovery", default="mdns,bootstrap", help=f"of {', '.join(test_change.DISCOVERY)} (mdns,bootstrap)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args()
    if reason := hosts.missing():
        parser.error(reason)
    if unknown := set(options.discovery.split(",")) - test_change.DISCOVERY.keys():
        parser.error(f"there is no discovery {', '.join(sorted(unknown))}")
    processes.PATIENCE = PATIENCE
    ways: dict[str, Callable[[], Any]] = {}
    for name, outage in test_change.SCENARIOS.items():
        for discovery in options.discovery.split(","):
            ways[f"{name}/{discovery}"] = lambda outage=outage, discovery=discovery: outage(discovery, options.seconds)
    for name, heal in test_lans.WAYS.items():
        ways[name] = lambda heal=heal: heal(options.members, random.uniform(options.apart / 2, options.apart))
    found = {}
    for name, run in ways.items():
        if not options.scenarios or name.partition("/")[0] in options.scenarios:
            found[name] = repeat(run, options.runs, options.parallel)
            if not options.json:
                sys.stdout.write(f"{name}: {json.dumps(found[name])}\n")
                sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return 1 if any(figures["failed"] for figures in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
