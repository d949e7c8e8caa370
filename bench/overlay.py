"""What the overlay does at full size: runs the simulator's scenarios and writes ``docs/simulation-results.rst``.

``python bench/overlay.py`` runs all of them, ``python bench/overlay.py NAME...`` those, many at a time (``--jobs``); the sections of
the others stay as they are. Every run is the very command that is printed with its table, in a process of its own, of which the time
and the memory are measured. The raw results are kept in ``simulation-results.json`` beside the document, which is made of them;
``--no-run`` only makes it anew. What is there is replaced as soon as a scenario is through.

Exit status: 0; 1 if in some run something did not hold; 2 bad usage, or a run that gave no results; 130 Ctrl-C.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from solyd_swarm.simulation.scenarios import SCENARIOS
from solyd_swarm.simulation.seeds import available

ROOT = Path(__file__).resolve().parent.parent
NAME = "simulation-results"
RAN = (0, 1)
"""Exit statuses of a run that has results."""

INTRODUCTION = """\
Results of the simulator
========================

What ``python bench/overlay.py`` measured, one table per scenario. The figures, the network and its limits are
described in `simulation.rst <simulation.rst>`_. Each table can be had again with the command above it: figures
depend on the seed alone, but for the time a run takes and the memory it needs.
"""


# -- runs ---------------------------------------------------------------------------------------------------------


class Runs:
    """Runs of scenarios, each in a process, which `end` ends."""

    def __init__(self, seed: int, size: str) -> None:
        self._seed = seed
        self._size = size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_over = False

    def run(self, name: str) -> dict[str, Any]:
        """One scenario. Raises `RuntimeError` with what it said if it gave no results."""
        options = ["--scenario", name, *(["--full"] if self._size == "full" else []), "--seed", str(self._seed)]
        command = [sys.executable, "-m", "solyd_swarm.simulation", *options, "--json", "-", "--quiet"]
        start = time.monotonic()
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, start_new_session=True) as process,
        ):
            self._processes.append(process)
            if self._is_over:
                process.kill()
            assert process.stdout is not None
            output = process.stdout.read()
            # Unlike Popen.wait this tells what the process needed.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode not in RAN or not output:
                errors.seek(0)
                raise RuntimeError(f"{name}: exit status {process.returncode}\n{errors.read().decode(errors='replace')}")
        found = json.loads(output)
        return {
            "about": SCENARIOS[name].about,
            "command": f"python -m solyd_swarm.simulation {' '.join(options)}",
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "size": found.pop("size"),
            "rows": found.pop("rows"),
            "failures": found.pop("failures"),
            "seconds": time.monotonic() - start,
            "processor_seconds": usage.ru_utime + usage.ru_stime,
            "peak_memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "figures": found,
        }

    def end(self) -> None:
        """Ends all that are under way, and whatever would come after."""
        self._is_over = True
        for process in self._processes:
            process.kill()


def run_all(names: Sequence[str], runs: Runs, jobs: int, directory: Path) -> int:
    """Runs the scenarios and writes each down as soon as it is through; returns the exit status."""
    worst = 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(runs.run, name): name for name in names}
        try:
            for future in as_completed(futures):
                name = futures[future]
                try:
                    found = future.result()
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    worst = 2
                    continue
                write(directory, load(directory) | {name: found})
                print(f"{name}: {found['seconds']:.1f} s, {found['peak_memory'] / 2**20:.0f} MiB", flush=True)
                for failure in found["failures"]:
                    print(f"  does not hold: {failure}", flush=True)
                worst = max(worst, bool(found["failures"]))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            runs.end()
            return 130
    return worst


# -- the document -------------------------------------------------------------------------------------------------


def load(directory: Path) -> dict[str, Any]:
    path = directory / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def write(directory: Path, results: dict[str, Any]) -> None:
    """Both files; of scenarios that there are no more, nothing."""
    results = {name: results[name] for name in SCENARIOS if name in results}
    put(directory / f"{NAME}.json", json.dumps(results, indent=1, sort_keys=True) + "\n")
    put(directory / f"{NAME}.rst", "\n\n".join([INTRODUCTION, *(section(name, found) for name, found in results.items())]))


def put(path: Path, text: str) -> None:
    """At once: whoever interrupts us finds the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, "utf-8")
    new.replace(path)


def section(name: str, found: dict[str, Any]) -> str:
    lines = [name, "-" * len(name), "", escaped(found["about"]), "", "::", "", f"    {found['command']}", ""]
    lines += [".. list-table::", "   :header-rows: 1", "   :widths: 36 36 28", ""]
    for row in [("what", "wanted or published", "measured"), *found["rows"]]:
        lines += [f"   {mark} {escaped(cell)}".rstrip() for mark, cell in zip(("* -", "  -", "  -"), row, strict=True)]
    lines.append("")
    for failure in found["failures"]:
        lines += [f"**Does not hold**: {escaped(failure)}.", ""]
    events = found["figures"].get("events")
    counted = "" if events is None else f"{events:,} events, "
    lines.append(
        f"Size {found['size']:,}; {counted}{duration(found['seconds'])} ({duration(found['processor_seconds'])} of processor time),"
        f" at most {found['peak_memory'] / 2**20:,.0f} MiB; {found['python']}."
    )
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def escaped(text: str) -> str:
    """Text that reStructuredText takes for nothing but text."""
    text = re.sub(r"([\\*`|_])", r"\\\1", text)
    is_markup = re.match(r"[-+:>.=~#\"'&(]|\w+[.)]( |$)", text)  # would begin a list, a quotation or a directive
    return f"\\ {text}" if is_markup else text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs scenarios of the simulator and writes down what came of them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios (all)")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="the published size, or the tests' (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=available(), metavar="N", help="scenarios at a time (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs", metavar="DIR", help="where the document is (docs)")
    parser.add_argument("--no-run", action="store_true", help="make the document anew from what was measured before")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in SCENARIOS]:
        parser.error(f"there is no scenario {unknown[0]!r}: there are {', '.join(SCENARIOS)}")
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    if not arguments.output_dir.is_dir():
        parser.error(f"{str(arguments.output_dir)!r} is no directory")
    if arguments.no_run:
        write(arguments.output_dir, load(arguments.output_dir))
        return 0
    names = list(dict.fromkeys(arguments.names)) or list(SCENARIOS)
    return run_all(names, Runs(arguments.seed, arguments.size), arguments.jobs, arguments.output_dir)


if __name__ == "__main__":
    sys.exit(main())
