"""Charts of a run, with matplotlib, which only this needs (``solyd-swarm[plot]``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from solyd_swarm.simulation.figures import histogram
from solyd_swarm.simulation.seeds import Result, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 4.5
"""Inches of one chart."""


class NotPlottableError(Exception):
    """Says in one sentence why there will be no charts."""


def check(path: str) -> None:
    """Raises `NotPlottableError` if matplotlib is missing or does not know such files. For before a run."""
    try:
        backend = importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        raise NotPlottableError("--plot needs matplotlib: pip install 'solyd-swarm[plot]'") from None
    known = backend.FigureCanvasAgg.get_supported_filetypes()
    ending = path.rpartition(".")[2].lower() if "." in path else ""
    if ending not in known:
        raise NotPlottableError(f"--plot FILE must end in one of {', '.join(sorted(known))}, not {path!r}")


def draw(task: Task, results: Sequence[Result], path: str) -> bool:
    """Writes the charts to a file. False, and no file, where the runs left nothing to draw. Raises `OSError`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    charts = _charts(results)
    if not charts:
        return False
    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    # Never pyplot: it would look for a display.
    figure = Figure(figsize=(SIDE * 1.3 * columns, SIDE * rows), layout="constrained")
    seeds = f"seed {results[0].seed}" if len(results) == 1 else f"seeds {results[0].seed} to {results[-1].seed}"
    what = f"{task.scenario}, size {task.size:,}" if task.scenario else f"{task.parameters.peers:,} peers"
    figure.suptitle(f"{what}, {seeds}")
    for place, (kind, x_label, y_label, data) in enumerate(charts, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if kind == "bars":
            axes.bar(list(data), list(data.values()), width=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            _lines(axes, data)
    figure.savefig(path)
    return True


def _lines(axes: Axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.2)
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= 12:
        axes.legend(fontsize="small")


def _charts(results: Sequence[Result]) -> list[tuple[str, str, str, Any]]:
    """(kind, x label, y label, bars or lines)."""
    charts: list[tuple[str, str, str, Any]] = []
    cdfs = {f"seed {each.seed}": each.latency_cdf for each in results if each.latency_cdf}
    if cdfs:
        charts.append(("lines", "latency, ms", "share of deliveries", cdfs))
    for name, x_label, y_label in (("ldh_distribution", "last delivery hop", "messages"), ("in_degree", "in-degree", "peers")):
        bars = histogram([each.figures[name] for each in results if name in each.figures])
        if bars:
            charts.append(("bars", x_label, y_label, {int(key): count for key, count in bars.items()}))
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for each in results:
        for number, (x_label, y_label, lines) in enumerate(each.outcome.curves):
            chart = curves.setdefault((f"{number}{x_label}", y_label), {})
            for name, points in lines.items():
                chart[name if len(results) == 1 else f"{name}, seed {each.seed}"] = points
    charts += [("lines", x_label.lstrip("0123456789"), y_label, lines) for (x_label, y_label), lines in curves.items()]
    return charts
