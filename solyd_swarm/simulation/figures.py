"""The figures of one run or of many, as one object for machines."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from solyd_swarm.simulation.seeds import Result, Task


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def worst(values: Sequence[float | None]) -> float | None:
    """The largest; None, which stands for never, is worse than any."""
    return None if None in values else max(value for value in values if value is not None)


def histogram(values: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums by number, in the order of the numbers."""
    total: dict[str, int] = {}
    for each in values:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return {name: total[name] for name in sorted(total, key=int)}


SPREAD: dict[str, Callable[..., Any]] = {"mean": mean, "p50": mean, "p99": worst, "max": worst}
AGGREGATES: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "reliability": mean,
    "reliability_worst": min,
    "missed": sum,
    "duplicates": sum,
    "late": sum,
    "isolated": sum,
    "components": worst,
    "rmr": mean,
    "ldh": SPREAD,
    "ldh_distribution": histogram,
    "latency_ms": SPREAD,
    "seconds_to_complete": worst,
    "in_degree": histogram,
    "clustering": mean,
    "path": mean,
    "diameter": worst,
    "control_bytes_per_peer": mean,
    "payload_bytes_per_peer": mean,
    "digest_bytes_per_round": mean,
    "frames": sum,
    "simulated_seconds": sum,
    "events": sum,
}
"""How the figures of several seeds make one. Those of scenarios that are not named here are given for each seed only."""

ALWAYS = ("reliability", "missed", "duplicates", "isolated", "rmr", "ldh", "latency_ms", "seconds_to_complete", "events")
"""Of one run or of many; None where a scenario does not measure it."""


def aggregate(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One figure for each of `AGGREGATES` that all runs have."""
    total: dict[str, Any] = {}
    for name, how in AGGREGATES.items():
        values = [each[name] for each in figures if name in each]
        if len(values) < len(figures):
            continue
        if not isinstance(how, dict):
            total[name] = how(values)
        elif all(isinstance(value, dict) for value in values):
            total[name] = {key: how[key]([value[key] for value in values]) for key in values[0] if key in how}
    return total


def events_per_second(results: Sequence[Result]) -> float | None:
    """Events by the seconds that the runs took, each by itself; None where a scenario does not count its events."""
    if not all("events" in each.figures for each in results):
        return None
    return float(sum(each.figures["events"] for each in results) / sum(each.seconds for each in results))


def as_object(task: Task, results: Sequence[Result], *, clock: bool = True) -> dict[str, Any]:
    """All figures. Without `clock` nothing in it depends on the machine: the same seeds give the same object."""
    first = results[0].seed
    described: dict[str, Any] = {"seed": first}
    if task.scenario:
        described |= {"scenario": task.scenario, "size": task.size}
        # Of one that is a run as any other, what it fixed.
        described["parameters"] = results[0].figures.get("parameters", {}) | described
    else:
        described["parameters"] = asdict(replace(task.parameters, seed=first))
    if len(results) == 1:
        return _single(task, results[0], clock=clock) | described
    total: dict[str, Any] = dict.fromkeys(ALWAYS)
    total |= aggregate([each.figures for each in results]) | described
    total["repeat"] = len(results)
    total["failures"] = [f"seed {each.seed}: {failure}" for each in results for failure in each.outcome.failures]
    total["runs"] = [_single(task, each, clock=clock) for each in results]
    if clock:
        total["events_per_second"] = events_per_second(results)
    return total


def _single(task: Task, result: Result, *, clock: bool) -> dict[str, Any]:
    single = {name: value for name, value in result.figures.items() if name != "parameters"}
    single |= {"seed": result.seed, "failures": result.outcome.failures}
    if task.scenario:
        single["rows"] = result.outcome.rows
        single |= {name: None for name in ALWAYS if name not in single}
    if clock:
        single["events_per_second"] = events_per_second([result])
    return single


def as_json(task: Task, results: Sequence[Result], *, clock: bool = True) -> str:
    """The object as text: keys sorted, floats as Python prints them and always finite, a newline at the end."""
    return json.dumps(as_object(task, results, clock=clock), sort_keys=True, indent=1, allow_nan=False) + "\n"
