"""What a run found, as text for people: columns that line up, and a unit beside every figure."""

from collections.abc import Callable, Sequence
from typing import Any

from solyd_swarm.simulation.figures import aggregate, events_per_second
from solyd_swarm.simulation.scenarios import SCENARIOS
from solyd_swarm.simulation.seeds import Result, Task


def percent(value: float) -> str:
    """Only a perfect share is 100."""
    text = f"{100 * value:.3f}"
    return text if value == 1 or text != "100.000" else "99.999"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def decimals(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{count}f}"


NEVER = "never"

LINES: tuple[tuple[str, str, Callable[[Any], str], str, str], ...] = (
    ("reliability", "reliability", percent, "% of the deliveries due", "mean"),
    ("reliability, worst message", "reliability_worst", percent, "%", "worst"),
    ("missed", "missed", whole, "deliveries", "sum"),
    ("duplicates", "duplicates", whole, "deliveries", "sum"),
    ("late, out of order", "late", whole, "deliveries", "sum"),
    ("time to complete", "seconds_to_complete", decimals(2), "s after the last message", "worst"),
    ("RMR", "rmr", decimals(4), "surplus frames with a body, per receiver", "mean"),
    ("LDH mean", "ldh.mean", decimals(2), "hops", "mean"),
    ("LDH p99", "ldh.p99", whole, "hops", "worst"),
    ("LDH max", "ldh.max", whole, "hops", "worst"),
    ("latency p50", "latency_ms.p50", decimals(2), "ms", "mean"),
    ("latency p99", "latency_ms.p99", decimals(2), "ms", "worst"),
    ("latency max", "latency_ms.max", decimals(2), "ms", "worst"),
    ("isolated", "isolated", whole, "peers", "sum"),
    ("components", "components", whole, "parts of the overlay", "worst"),
    ("clustering", "clustering", decimals(4), "share of pairs of neighbours", "mean"),
    ("shortest path, mean", "path", decimals(2), "hops", "mean"),
    ("diameter", "diameter", whole, "hops", "worst"),
    ("payload sent per peer", "payload_bytes_per_peer", whole, "bytes", "mean"),
    ("all else sent per peer", "control_bytes_per_peer", whole, "bytes", "mean"),
    ("digests per round", "digest_bytes_per_round", whole, "bytes", "mean"),
    ("frames sent", "frames", whole, "frames", "sum"),
    ("simulated time", "simulated_seconds", decimals(1), "s", "sum"),
)
"""(what, key in the figures, format, unit, how `figures.AGGREGATES` makes one of several)."""
DISTRIBUTIONS = (("in-degree", "in_degree", "neighbours: peers"), ("LDH", "ldh_distribution", "hops: messages"))
"""(what, key in the figures, unit); several make sums."""


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> str:
    """Rows with columns as wide as they need be; those numbered in `right` are aligned to the right. Two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip() + "\n")
    return "".join(lines)


def scenario_list() -> str:
    """All scenarios: names, sizes, sentences."""
    rows = [("scenario", "size", "full", "about")]
    rows += [(each.name, f"{each.small:,}", f"{each.full:,}", each.about) for each in SCENARIOS.values()]
    return table(rows, (1, 2), "")


def text(task: Task, results: Sequence[Result]) -> str:
    """The whole report."""
    parts = [_title(task, results), "\n"]
    if task.scenario:
        for result in results:
            if len(results) > 1:
                parts.append(f"Seed {result.seed}\n")
            header = ("what", "wanted or published", "ours")
            parts += [table([header, ("-" * 4, "-" * 19, "-" * 4), *result.outcome.rows]), "\n"]
    else:
        parts += [_single(results[0]) if len(results) == 1 else _several(results), "\n"]
    failures = [(result.seed, failure) for result in results for failure in result.outcome.failures]
    for seed, failure in failures:
        parts.append(f"Does not hold{f' with seed {seed}' if len(results) > 1 else ''}: {failure}\n")
    if failures:
        parts.append("\n")
    return "".join([*parts, effort(results)])


def _title(task: Task, results: Sequence[Result]) -> str:
    seeds = f"seed {results[0].seed}" if len(results) == 1 else f"seeds {results[0].seed} to {results[-1].seed}"
    if task.scenario:
        return f"{task.scenario}, size {task.size:,}, {seeds}: {SCENARIOS[task.scenario].about}\n"
    what = task.parameters
    senders = "one sender" if what.senders == 1 else f"{what.senders:,} senders"
    messages = "one message" if what.messages == 1 else f"{what.messages:,} messages"
    return f"{what.peers:,} peers, {messages} of {what.size:,} bytes by {senders}, {seeds}\n"


def _value(figures: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    name, _, part = key.partition(".")
    value = figures[name][part] if part else figures[name]
    return NEVER if value is None else form(value)


def _single(result: Result) -> str:
    lines = table([(what, _value(result.figures, key, form), unit) for what, key, form, unit, _ in LINES], (1,))
    return lines + _distributions(result.figures)


def _several(results: Sequence[Result]) -> str:
    total = aggregate([each.figures for each in results])
    rows = [("", "all seeds", "", "least", "most", "unit")]
    for what, key, form, unit, how in LINES:
        name, _, part = key.partition(".")
        values = [each.figures[name][part] if part else each.figures[name] for each in results]
        known = [value for value in values if value is not None]
        least = form(min(known)) if known else NEVER
        most = form(max(known)) if len(known) == len(values) else NEVER
        rows.append((what, _value(total, key, form), how, least, most, unit))
    return table(rows, (1, 3, 4)) + _distributions(total)


def _distributions(figures: dict[str, Any]) -> str:
    rows = [
        (what, ", ".join(f"{number}: {whole(count)}" for number, count in figures[key].items()), unit) for what, key, unit in DISTRIBUTIONS
    ]
    return "\n" + table(rows)


def effort(results: Sequence[Result]) -> str:
    """What it took: events, their pace, memory."""
    seconds, memory = sum(each.seconds for each in results), max(each.memory for each in results)
    rows = []
    pace = events_per_second(results)
    if pace is not None:
        rows = [
            ("events simulated", whole(sum(each.figures["events"] for each in results)), "events"),
            ("pace", whole(pace), "events per second"),
            ("cost", decimals(1)(1_000_000 / pace if pace else 0.0), "microseconds per event"),
        ]
    rows = [("time taken", decimals(1)(seconds), "s, one run after the other" if len(results) > 1 else "s"), *rows]
    return table([*rows, ("peak memory", whole(memory / 2**20), "MiB, of the largest process" if len(results) > 1 else "MiB")], (1,))
