"""The command ``python -m solyd_swarm.simulation``.

Exit status: 0; 1: something that must hold does not, told as a sentence; 2: bad usage, told in one line; 130: left after Ctrl-C.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from typing import Any, NoReturn

from solyd_swarm.simulation import plot, tables
from solyd_swarm.simulation.bar import Bar
from solyd_swarm.simulation.figures import as_json
from solyd_swarm.simulation.parameters import JOINS, LATENCIES, Parameters, parse_latency
from solyd_swarm.simulation.scenarios import SCENARIOS
from solyd_swarm.simulation.seeds import Result, Task, available, perform_all

LIST = "list"
"""Stands for the list in the place of a scenario's name."""
STDOUT = "-"
MOST_RUNS = 100_000
FREE_WITH_SCENARIO = {"peers", "seed"}
"""Of the parameters; a scenario fixes all others itself."""
DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Parameters)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; bad usage raises ``SystemExit``, as argparse does."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our output has seen enough
        _forget_output()
        return 128 + signal.SIGPIPE


def _forget_output() -> None:
    """What is still in the buffer of standard output must not raise again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if sys.stdout is None:
        parser.error("standard output is closed")
    if arguments.scenario == LIST:
        if arguments != parser.parse_args(["--scenario", LIST]):
            parser.error("--scenario list takes no other option")
        return _output(parser, lambda: _write(tables.scenario_list()))
    task, seed = _task(parser, arguments)
    try:
        if arguments.plot is not None:
            plot.check(arguments.plot)  # before a run, which may take long
        with Bar(None if arguments.quiet else sys.stderr) as bar:
            results = perform_all(task, range(seed, seed + arguments.repeat), arguments.jobs, bar.set)
    except plot.NotPlottableError as error:
        parser.error(str(error))
    except (BrokenProcessPool, MemoryError) as error:
        return _complain(parser, f"a run ended by itself, most likely for lack of memory ({error})", 1)
    return _output(parser, lambda: _tell(parser, arguments, task, results))


def _output(parser: argparse.ArgumentParser, write: Callable[[], int]) -> int:
    try:
        return write()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            _forget_output()
        return _complain(parser, f"{error.filename or 'the report'} cannot be written: {error.strerror}", 2)


def _complain(parser: argparse.ArgumentParser, sentence: str, status: int) -> int:
    sys.stderr.write(f"{parser.prog}: {sentence}\n")
    return status


def _write(text: str) -> int:
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


def _tell(parser: argparse.ArgumentParser, arguments: argparse.Namespace, task: Task, results: Sequence[Result]) -> int:
    failures = [failure for each in results for failure in each.outcome.failures]
    if arguments.json is not None:
        found = as_json(task, results, clock=arguments.clock)
        if arguments.json == STDOUT:
            _write(found)
            for failure in failures:
                _complain(parser, failure, 1)
        else:
            with open(arguments.json, "w", encoding="utf-8", newline="\n") as file:
                file.write(found)
    if arguments.json != STDOUT:
        _write(tables.text(task, results))
    if arguments.plot is not None and not plot.draw(task, results, arguments.plot):
        _complain(parser, f"{task.scenario} leaves nothing to plot", 0)
    return 1 if failures else 0


# -- arguments ----------------------------------------------------------------------------------------------------


def _task(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Task, int]:
    """(what to run, the first seed)."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if name in arguments}
    _check_places(parser, arguments)
    if arguments.scenario is None:
        if arguments.full:
            parser.error("--full goes with --scenario only")
        parameters = _parameters(parser, given)
        return Task(parameters), parameters.seed
    refused = sorted(_option(name) for name in given if name not in FREE_WITH_SCENARIO)
    if refused:
        parser.error(f"{', '.join(refused)} cannot be combined with --scenario, which fixes that itself")
    scenario = SCENARIOS[arguments.scenario]
    size = given.get("peers", scenario.full if arguments.full else scenario.small)
    if size < scenario.least:
        parser.error(f"--peers: {scenario.name} needs a size of at least {scenario.least}, not {size}")
    return Task(scenario=scenario.name, size=size), _parameters(parser, given).seed


def _parameters(parser: argparse.ArgumentParser, given: dict[str, Any]) -> Parameters:
    try:
        return Parameters(**given)
    except ValueError as error:
        parser.error(f"--{error}")  # it begins with the parameter's name


def _option(name: str) -> str:
    return f"--no-{name}" if DEFAULTS[name] is True else f"--{name}"


def _check_places(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """That what is written after a run, which may take long, can be written."""
    paths = [getattr(arguments, name) for name in ("json", "plot")]
    for name, path in zip(("json", "plot"), paths, strict=True):
        if path == "":
            parser.error(f"--{name} needs the name of a file, not ''")
        if path is not None and (name, path) != ("json", STDOUT):
            try:
                _check_place(path)
            except OSError as error:
                parser.error(f"--{name}: {path!r} cannot be written: {error.strerror}")
    if None not in paths and os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
        parser.error("--json and --plot must be two files, not one")


def _check_place(path: str) -> None:
    """Leaves everything as it is. Raises `OSError`."""
    is_there = os.path.exists(path)
    if is_there and not os.path.isfile(path) and not os.path.isdir(path):
        return  # whoever reads a pipe would take the opening and closing for all there is
    # Nothing else can tell: permissions are not all that counts.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
    if not is_there:
        os.unlink(os.path.realpath(path))  # of a dangling link, what it points to


def _scenario(text: str) -> str:
    if text != LIST and text not in SCENARIOS:
        raise argparse.ArgumentTypeError(f"there is no {text!r}; --scenario list names all")
    return text


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _natural(least: int, most: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = _whole(text)
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"from {least} to {most:,}"
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {value}")
        return value

    return convert


def _latency(text: str) -> tuple[float, float]:
    try:
        return parse_latency(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m solyd_swarm.simulation",
        description="Simulates a swarm: the very protocol core of production, over a network that exists in memory only, with its own"
        " clock. The same seed gives the same run. The network and all figures are described in docs/simulation.rst.",
        epilog="Exit status: 0; 1 something that must hold does not: a message was delivered twice, is missed by somebody in the end"
        " although there are anti-entropy and a directory, or a scenario says so; 2 bad usage; 130 Ctrl-C.",
        allow_abbrev=False,
    )
    _add_parameters(parser)
    scenarios = parser.add_argument_group("scenarios")
    scenarios.add_argument(
        "--scenario",
        type=_scenario,
        metavar="NAME",
        help="run this, which fixes all parameters but --peers and --seed; 'list' names them all",
    )
    scenarios.add_argument("--full", action="store_true", help="at the size that its published figures are for (--peers N: at that size)")
    runs = parser.add_argument_group("runs and output")
    runs.add_argument("--repeat", type=_natural(1, MOST_RUNS), default=1, metavar="K", help="runs, with the seeds SEED to SEED + K - 1 (1)")
    runs.add_argument(
        "--jobs", type=_natural(1), default=available(), metavar="N", help="processes at a time (as many as the machine runs: %(default)s)"
    )
    runs.add_argument("--json", metavar="FILE", help="write all figures there as one object; - is standard output, without the text")
    runs.add_argument(
        "--no-clock", dest="clock", action="store_false", help="leave events_per_second out of it, the one figure that the machine decides"
    )
    runs.add_argument("--plot", metavar="FILE", help="write charts there, of the format that its name ends in (needs solyd-swarm[plot])")
    runs.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    """An option for each parameter. Without it there is nothing in the namespace: what was given can be told from the default."""
    group = parser.add_argument_group("parameters", "Times in seconds unless said otherwise, shares from 0 to 1; in brackets the default.")

    def add(name: str, kind: Callable[[str], Any], metavar: str, about: str, shown: str = "") -> None:
        default = shown or f"{DEFAULTS[name]:g}"
        group.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=f"{about} ({default})".replace("%", "%%")
        )

    latency = next((name for name, value in LATENCIES.items() if value == DEFAULTS["latency"]), "{:g}-{:g}".format(*DEFAULTS["latency"]))
    add("peers", _whole, "N", "peers there are from the start; with --scenario its size, which is what --scenario list says")
    add("messages", _whole, "N", "messages that are measured")
    add("senders", _whole, "N", "peers that publish, in turn")
    add("interval", _number, "S", "from one message to the next")
    add("size", _whole, "BYTES", "of a message")
    add("warmup", _whole, "N", "messages before those")
    add("fail", _number, "SHARE", "of the peers that die at once, after the warm-up (at most 0.95)")
    add("wait", _number, "S", "from that to the first measured message")
    add("loss", _number, "SHARE", "of all frames that are lost")
    add("latency", _latency, "lan|wan|MIN-MAX", "milliseconds one way between two peers", latency)
    add("jitter", _number, "MS", "milliseconds that a frame may take longer")
    add("partition", _number, "S", "how long the peers are cut in two halves, from the first measured message on")
    add("churn", _number, "SHARE", "of the peers that is replaced in a minute, while messages are measured")
    add("join", str, "|".join(JOINS), "how the peers come", DEFAULTS["join"])
    add("settle", _number, "S", "from the last join to the first message")
    add("drain", _number, "S", "how long it may take after the last message until nobody misses anything")
    add("hops", _natural(0), "N", "Plumtree's threshold for swapping links of the tree", "the library's")
    for name, about in (("antientropy", "never compare digests"), ("directory", "discover nobody after joining")):
        group.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=about)
    add("seed", _natural(0), "N", "decides everything; the first one with --repeat")
