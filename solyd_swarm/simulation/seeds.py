"""Runs a simulation under one seed or many, in this process or spread over several."""

import gc
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from solyd_swarm.simulation.children import end_with_parent, shielded
from solyd_swarm.simulation.experiment import Progress, Run, perform, report
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.scenarios import SCENARIOS, Outcome

POLL = 0.2
"""Seconds between two looks at how far the other processes are."""
CDF_POINTS = 100


@dataclass(frozen=True)
class Task:
    """What to run: a scenario by name at a size (as `Scenario` counts it), or else parameters."""

    parameters: Parameters = field(default_factory=Parameters)
    scenario: str = ""
    size: int = 0


@dataclass
class Result:
    """What came of one run. It can be pickled.

    Attributes:
        figures: of `report`, or those that the scenario gives.
        outcome: rows, failures and curves; empty for a run that is no scenario, but for failures.
        latency_cdf: (milliseconds, share of deliveries that took no longer), rising.
        seconds: by the wall clock.
        memory: the most bytes that the process ever held, of whatever it ran so far.
    """

    seed: int
    figures: dict[str, Any]
    outcome: Outcome
    latency_cdf: list[tuple[float, float]]
    seconds: float
    memory: int


def available() -> int:
    """Processes that this machine can run at a time, of those we may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def perform_one(task: Task, seed: int, progress: Progress = lambda share: None) -> Result:
    """One run, in this process."""
    start = time.perf_counter()
    cdf: list[tuple[float, float]] = []
    with _no_collector():
        if task.scenario:
            outcome = SCENARIOS[task.scenario].perform(task.size, seed, progress)
            figures = outcome.figures
        else:
            run = perform(replace(task.parameters, seed=seed), progress)
            figures, outcome = report(run), Outcome(failures=broken_promises(run))
            cdf = latency_cdf(run)
    return Result(seed, figures, outcome, cdf, time.perf_counter() - start, peak_memory())


def broken_promises(run: Run) -> list[str]:
    """What must hold in every run and does not, as sentences.

    Nothing is delivered twice. With anti-entropy and a directory nobody misses anything in the end.
    """
    wrong = []
    duplicates = sum(each.duplicates for each in run.recorder.broadcasts)
    if duplicates:
        wrong.append(f"duplicates: {duplicates} messages were delivered again, but 0 is wanted")
    missed = sum(each.missed for each in run.measured)
    if missed and run.parameters.antientropy and run.parameters.directory:
        wrong.append(f"missed: {missed} deliveries are still due {run.parameters.drain:g} s after the last message, but 0 is wanted")
    return wrong


def latency_cdf(run: Run) -> list[tuple[float, float]]:
    """(milliseconds, share of deliveries that took no longer), at most `CDF_POINTS` of them."""
    latencies = sorted(1000 * latency for each in run.measured for latency in each.latencies)
    ranks = sorted({max(1, len(latencies) * point // CDF_POINTS) for point in range(CDF_POINTS + 1)}) if latencies else []
    return [(latencies[rank - 1], rank / len(latencies)) for rank in ranks]


@contextmanager
def _no_collector() -> Iterator[None]:
    # Nearly all that a run makes lives to its end, and the collector would walk over it again and again for nothing: that takes a
    # good part of the time of a large run. An earlier run of this process goes first; what else is there (modules) is frozen, so
    # that a scenario which collects what is left of one of its networks walks over that alone.
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def peak_memory() -> int:
    """The most bytes of memory that this process ever held (resident)."""
    try:
        # Of this program alone: Linux counts what the parent held before exec() in ru_maxrss.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


# -- many seeds ---------------------------------------------------------------------------------------------------


def perform_all(task: Task, seeds: Sequence[int], jobs: int, progress: Progress = lambda share: None) -> list[Result]:
    """A run for each seed, up to `jobs` at a time, each in a process of its own; the results come in the order of the seeds."""
    jobs = min(jobs, len(seeds))
    if jobs > 1:
        return _spread(task, seeds, jobs, progress)
    return [perform_one(task, seed, _part(progress, number, len(seeds))) for number, seed in enumerate(seeds)]


def _part(progress: Progress, number: int, count: int) -> Progress:
    return lambda share: progress((number + share) / count)


def _spread(task: Task, seeds: Sequence[int], jobs: int, progress: Progress) -> list[Result]:
    # New interpreters, not forks: the same on every system, and safe beside the threads of this process.
    context = multiprocessing.get_context("spawn")
    shares = context.RawArray("d", len(seeds))
    with ProcessPoolExecutor(jobs, context, _start_worker, (shares,)) as pool:
        try:
            with shielded():
                futures = [pool.submit(_work, task, seed, number) for number, seed in enumerate(seeds)]
            left: set[Future[Result]] = set(futures)
            while left:
                done, left = wait(left, POLL, FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what went wrong at once, not after all the others
                progress(sum(shares) / len(seeds))
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_shares: Any = None
"""In a worker: the share of each run that is done (0 to 1), in memory that all processes see."""


def _start_worker(shares: Any) -> None:
    global _shares
    _shares = shares
    end_with_parent()


def _work(task: Task, seed: int, number: int) -> Result:
    def progress(share: float) -> None:
        _shares[number] = share

    result = perform_one(task, seed, progress)
    _shares[number] = 1.0
    return result
