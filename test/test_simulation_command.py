"""The simulator's command as a user runs it, what it makes of many seeds, and what is written of it."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import docutils.core
import psutil
import pytest

from solyd_swarm.simulation import commands, experiment, figures, seeds, tables
from solyd_swarm.simulation.bar import FIRST, WIDTH, Bar, line
from solyd_swarm.simulation.parameters import Parameters
from solyd_swarm.simulation.scenarios import SCENARIOS, Outcome

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
"""Seconds that a command may take on a busy machine."""
SMALL = ("--peers", "20", "--messages", "5", "--warmup", "2", "--settle", "5")


# -- many seeds ---------------------------------------------------------------------------------------------------


def result(seed: int, **found: Any) -> seeds.Result:
    return seeds.Result(seed, found, Outcome(), [], 2.0, 2**20)


def test_figures_of_many_seeds_make_one() -> None:
    several = [
        {"reliability": 1.0, "missed": 0, "ldh": {"mean": 4.0, "p99": 5.0, "max": 6.0}, "seconds_to_complete": 1.0, "in_degree": {"4": 1}},
        {"reliability": 0.5, "missed": 3, "ldh": {"mean": 5.0, "p99": 9.0, "max": 9.0}, "seconds_to_complete": 3.0, "in_degree": {"5": 2}},
    ]
    assert figures.aggregate(several) == {
        "reliability": 0.75,
        "missed": 3,
        "ldh": {"mean": 4.5, "p99": 9.0, "max": 9.0},
        "seconds_to_complete": 3.0,
        "in_degree": {"4": 1, "5": 2},
    }
    several[0]["seconds_to_complete"] = None
    assert figures.aggregate(several)["seconds_to_complete"] is None
    del several[0]["missed"]
    assert "missed" not in figures.aggregate(several)


def test_every_figure_of_a_run_has_its_place() -> None:
    """In the table, and in what several seeds make."""
    found = seeds.perform_one(seeds.Task(Parameters(peers=5, messages=2)), 1).figures
    shown = {key.partition(".")[0] for _, key, *_ in tables.LINES} | {key for _, key, _ in tables.DISTRIBUTIONS}
    assert set(found) - {"parameters"} == set(figures.AGGREGATES)
    assert set(found) - {"parameters", "events"} == shown
    assert sum(found["ldh_distribution"].values()) == 2
    assert max(map(int, found["ldh_distribution"])) == found["ldh"]["max"]


def test_distributions_are_summed_in_the_order_of_their_numbers() -> None:
    assert list(figures.histogram([{"9": 1, "11": 2}, {"2": 3, "11": 4}]).items()) == [("2", 3), ("9", 1), ("11", 6)]


def test_many_seeds_of_a_scenario_have_all_names() -> None:
    task = seeds.Task(scenario="star-join", size=8)
    single = figures.as_object(task, [result(1, events=100)])
    several = figures.as_object(task, [result(1, events=100, rmr=1.0), result(2, events=300)])
    for found in (single, several):
        assert {"parameters", "events_per_second", *figures.ALWAYS} <= set(found)
        assert found["parameters"] == {"scenario": "star-join", "size": 8, "seed": 1}
        assert (found["scenario"], found["size"], found["rmr"]) == ("star-join", 8, None)
    assert several["events"] == 400


def test_no_json_is_made_of_what_json_has_no_number_for() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        figures.as_json(seeds.Task(), [result(1, events=1, rmr=float("inf"))])


def test_events_per_second_leave_waiting_out() -> None:
    assert figures.events_per_second([result(1, events=100), result(2, events=300)]) == 100.0
    assert figures.events_per_second([result(1, events=100), result(2)]) is None


def test_what_must_hold_is_told() -> None:
    run = experiment.perform(Parameters(peers=5, messages=2))
    assert seeds.broken_promises(run) == []
    run.measured[0].missed = 2
    run.measured[0].duplicates = 1
    duplicates, missed = seeds.broken_promises(run)
    assert "1 messages were delivered again" in duplicates
    assert "2 deliveries are still due" in missed
    without = experiment.perform(Parameters(peers=5, messages=2, antientropy=False))
    without.measured[0].missed = 2
    assert seeds.broken_promises(without) == []


def test_an_imperfect_share_is_never_shown_as_perfect() -> None:
    assert [tables.percent(share) for share in (1.0, 1 - 1e-9, 0.5)] == ["100.000", "99.999", "50.000"]


def test_the_bar() -> None:
    assert line(0.0, 0.0) == f"[{'.' * WIDTH}]   0 %  0:00"
    assert line(1.0, 125.0) == f"[{'#' * WIDTH}] 100 %  2:05"
    with Bar(None) as bar:
        bar.set(0.5)


# -- the command --------------------------------------------------------------------------------------------------


def start(*arguments: str, errors: int = subprocess.PIPE, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "solyd_swarm.simulation", *arguments],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "error"} | environment,
        start_new_session=True,
        # Whatever runs the tests in its background may have SIGINT ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: str, status: int = 0, **environment: str) -> tuple[str, str]:
    with start(*arguments, **environment) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, output + errors
    assert "Traceback" not in errors
    return output, errors


def test_the_text() -> None:
    output, errors = run(*SMALL)
    assert errors == ""
    lines = output.splitlines()
    assert lines[0] == "20 peers, 5 messages of 100 bytes by one sender, seed 1"
    for what, key, *_ in (*tables.LINES, *tables.DISTRIBUTIONS):
        assert any(each.startswith(f"  {what}  ") for each in lines), key
    assert re.search(r"\n  in-degree +\d+: \d+.* neighbours: peers\n  LDH +\d+: \d.* hops: messages\n", output)
    values = [re.split(" {2,}", each.strip()) for each in lines[2:] if each]
    assert {len(row) for row in values} == {3}  # every figure has a unit
    assert [row[0] for row in values[-5:]] == ["time taken", "events simulated", "pace", "cost", "peak memory"]
    assert values[-1][2] == "MiB"
    ends = {each.index(row[1], len(row[0]) + 2) + len(row[1]) for each, row in zip([e for e in lines[2:25] if e], values, strict=False)}
    assert len(ends) == 1  # aligned


def test_the_object(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    output, _ = run(*SMALL, "--json", str(path), "--latency", "5-20", "--seed", "7")
    assert output.startswith("20 peers")
    text = path.read_text("utf-8")
    found = json.loads(text)
    assert text == json.dumps(found, sort_keys=True, indent=1) + "\n"
    wanted = "reliability missed duplicates isolated rmr ldh latency_ms seconds_to_complete events events_per_second parameters seed"
    assert set(wanted.split()) <= set(found)
    assert set(found["ldh"]) == {"mean", "p99", "max"}
    assert set(found["latency_ms"]) == {"p50", "p99", "max"}
    assert found["seed"] == found["parameters"]["seed"] == 7
    assert found["parameters"]["latency"] == [5.0, 20.0]
    assert (found["reliability"], found["missed"], found["duplicates"]) == (1.0, 0, 0)
    assert found["events_per_second"] > 0
    assert found["seconds_to_complete"] is not None


def test_the_same_seed_gives_the_same_bytes() -> None:
    options = (*SMALL, "--fail", "0.2", "--churn", "5", "--loss", "0.05", "--senders", "3", "--json", "-", "--no-clock")
    outputs = {run(*options, PYTHONHASHSEED=hash_seed)[0] for hash_seed in ("0", "4242")}
    assert len(outputs) == 1
    assert "events_per_second" not in json.loads(outputs.pop())


def test_the_number_of_jobs_makes_no_difference() -> None:
    options = (*SMALL, "--repeat", "3", "--seed", "5", "--json", "-", "--no-clock")
    output, _ = run(*options, "--jobs", "1")
    assert run(*options, "--jobs", "2")[0] == output
    found = json.loads(output)
    assert [each["seed"] for each in found["runs"]] == [5, 6, 7]
    assert (found["seed"], found["repeat"]) == (5, 3)
    assert found["events"] == sum(each["events"] for each in found["runs"])
    assert found["latency_ms"]["max"] == max(each["latency_ms"]["max"] for each in found["runs"])
    alone = json.loads(run(*SMALL, "--seed", "6", "--json", "-", "--no-clock")[0])
    assert found["runs"][1].items() <= alone.items()


def test_the_text_of_many_seeds() -> None:
    output, _ = run(*SMALL, "--repeat", "2", "--jobs", "2")
    assert "seeds 1 to 2" in output
    assert re.search(r"\n  RMR +[\d.]+  mean +[\d.]+ +[\d.]+  surplus", output)
    (in_degree,) = re.findall(r"\n  in-degree +(.*)  neighbours: peers\n", output)
    assert sum(int(each.partition(": ")[2]) for each in in_degree.split(", ")) == 2 * 20


def test_a_promise_that_is_not_kept_is_told() -> None:
    output, errors = run(*SMALL, "--loss", "0.9", "--drain", "0", status=1)
    assert errors == ""
    assert "\nDoes not hold: missed: " in output
    assert re.search(r"time to complete +never ", output)
    output, errors = run(*SMALL, "--loss", "0.9", "--drain", "0", "--json", "-", status=1)
    assert json.loads(output)["seconds_to_complete"] is None
    assert "missed: " in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--loss", "1"), "--loss must be from 0 to 0.9, not 1.0"),
        (("--loss", "nan"), "--loss: must be a finite number"),
        (("--fail", "0.96"), "--fail must be from 0 to 0.95, not 0.96"),
        (("--peers", "ten"), "--peers: must be a whole number"),
        (("--peers", "1"), "--peers must be from 2 to 1,000,000, not 1;"),
        (("--peers", "2000000"), "--peers must be from 2 to 1,000,000, not 2000000"),
        (("--senders", "101"), "--senders must be from 1 to the number of peers, 100, not 101"),
        (("--latency", "moon"), "--latency: must be lan, wan or MIN-MAX"),
        (("--latency", "1-inf"), "--latency: must be lan, wan or MIN-MAX"),
        (("--latency", "5-1"), "--latency must be MIN-MAX milliseconds, 0 <= MIN <= MAX, not 5-1"),
        (("--jitter", "-1"), "--jitter must be at least 0, not -1"),
        (("--warmup", "-1"), "--warmup must be at least 0, not -1"),
        (("--messages", "0"), "--messages must be at least 1, not 0"),
        (("--interval", "inf"), "--interval: must be a finite number"),
        (("--join", "queue"), "--join must be one of star,"),
        (("--size", "17000000"), "--size must be from 1 to "),
        (("--repeat", "0"), "--repeat"),
        (("--repeat", "1" + 30 * "0"), "--repeat"),
        (("--jobs", "0"), "--jobs"),
        (("--seed", "-1"), "--seed"),
        (("--json", "/nowhere/at/all"), "--json"),
        (("--json", 300 * "n"), "--json"),
        (("--json", "/"), "--json"),
        (("--json", ""), "--json needs the name of a file"),
        (("--plot", ""), "--plot needs the name of a file"),
        (("--json", "chart.svg", "--plot", "./chart.svg"), "--json and --plot"),
        (("--plot", "chart.docx"), "--plot"),
        (("--full",), "--full"),
        (("--mess", "3"), "--mess"),
        (("--scenario", "nothing"), "nothing"),
        (("--scenario", "list", "--seed", "3"), "--scenario list"),
        (("--scenario", "plumtree-rmr", "--loss", "0.1", "--no-antientropy"), "--loss, --no-antientropy"),
        (("--scenario", "plumtree-rmr", "--peers", "1"), "--peers: plumtree-rmr needs a size of at least 2, not 1"),
        (("--scenario", "plumtree-rmr", "--peers", "2000000"), "--peers must be from 2 to 1,000,000"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        commands.main(arguments)
    assert caught.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("python -m solyd_swarm.simulation: ")
    assert errors.count("\n") == 1
    assert named in errors


def test_whether_a_file_can_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    new, old, link = tmp_path / "new", tmp_path / "old", tmp_path / "link"
    old.write_text("of an earlier run")
    link.symlink_to(tmp_path / "pointed at")
    for path in (new, old, link):
        commands._check_place(str(path))
    assert sorted(tmp_path.iterdir()) == [link, old]
    assert old.read_text() == "of an earlier run"
    with pytest.raises(IsADirectoryError):
        commands._check_place(f"{new}/")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("options", [SMALL, ("--scenario", "list")])
def test_a_full_disk_is_told(options: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "solyd_swarm.simulation", *options]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the report cannot be written: No space left" in done.stderr


def test_closed_output_is_told_before_a_run() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "solyd_swarm.simulation", "--peers", "100000"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output is closed" in done.stderr


def test_defaults_are_those_of_the_parameters() -> None:
    task, seed = commands._task(commands._parser(), commands._parser().parse_args([]))
    assert (task, seed) == (seeds.Task(Parameters()), Parameters().seed)
    options = {action.dest for action in commands._parser()._actions}
    assert set(commands.DEFAULTS) <= options


def test_a_list_of_the_scenarios() -> None:
    output, _ = run("--scenario", "list")
    for scenario in SCENARIOS.values():
        assert re.search(rf"^{scenario.name} +{scenario.small:,} +{scenario.full:,}  {re.escape(scenario.about)}$", output, re.MULTILINE)
    assert run("--scenario=list")[0] == output


def test_a_scenario(tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    path = tmp_path / "found.json"
    options = ("--scenario", "plumtree-rmr", "--peers", "30", "--seed", "3", "--repeat", "2")
    output, errors = run(*options, "--plot", str(chart), "--json", str(path), "--quiet")
    assert errors == ""
    assert output.startswith("plumtree-rmr, size 30, seeds 3 to 4: A stable swarm")
    assert output.count("wanted or published") == 2
    assert re.search(r"\n  missed  +0  +0\n", output)
    assert chart.read_bytes().startswith(b"\x89PNG")
    found = json.loads(path.read_text("utf-8"))
    assert (found["scenario"], found["size"], found["seed"], found["failures"]) == ("plumtree-rmr", 30, 3, [])
    assert found["runs"][0]["rows"][0] == ["missed", "0", "0"]
    fixed = found["parameters"]
    assert (fixed["scenario"], fixed["size"], fixed["seed"], fixed["peers"]) == ("plumtree-rmr", 30, 3, 30)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_charts(ending: str, tmp_path: Path) -> None:
    chart = tmp_path / f"chart.{ending}"
    run(*SMALL, "--plot", str(chart), MPLBACKEND="tkagg" if ending == "svg" else "agg")
    assert chart.read_bytes()[:5] == (b"\x89PNG\r" if ending == "png" else b"<?xml")


def test_charts_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as caught:
        commands.main(["--plot", str(tmp_path / "chart.png")])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "solyd-swarm[plot]" in errors
    assert errors.count("\n") == 1


def test_matplotlib_is_imported_for_charts_only() -> None:
    code = "import sys, solyd_swarm.simulation.commands; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_the_bar_on_a_terminal(options: tuple[str, ...]) -> None:
    master, slave = pty.openpty()
    try:
        with start("--peers", "100000", *options, errors=slave) as process:
            drawn = b""
            deadline = time.monotonic() + 3 * FIRST
            while (left := deadline - time.monotonic()) > 0 and b"%" not in drawn:
                if select.select([master], [], [], left)[0]:
                    drawn += os.read(master, 1000)
            process.kill()
        assert drawn.startswith(b"\r[") == (not options)
        assert (b" 0 %  0:0" in drawn) == (not options)
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_interrupted(jobs: str) -> None:
    """By a signal to us alone; and, with more than one process, to the whole group, as a terminal sends it."""
    with start("--peers", "300", "--messages", "100000", "--repeat", "4", "--jobs", jobs) as process:
        try:
            family = [psutil.Process(process.pid)]
            deadline = time.monotonic() + PATIENCE
            while not is_busy(family, int(jobs)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
                family = [family[0], *family[0].children(recursive=True)]
            if jobs == "1":
                process.send_signal(signal.SIGINT)
            else:
                os.killpg(process.pid, signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
            assert (process.returncode, output, errors) == (130, "", "")
            assert psutil.wait_procs(family[1:], timeout=PATIENCE)[1] == []
        finally:
            for each in family:
                if each.is_running():
                    each.kill()


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("to_all", [False, True])
def test_interrupted_in_a_fork(jobs: str, to_all: bool) -> None:
    with start("--scenario", "hyparview-fig2", "--peers", "200", "--repeat", jobs, "--jobs", jobs) as process:
        family = [psutil.Process(process.pid)]
        try:
            deadline = time.monotonic() + PATIENCE
            while not any(forked(each) for each in family[1:]):
                assert time.monotonic() < deadline
                time.sleep(0.05)
                family = [family[0], *family[0].children(recursive=True)]
            if to_all:
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
            assert (process.returncode, output, errors) == (130, "", "")
            assert psutil.wait_procs(family[1:], timeout=5.0)[1] == []
        finally:
            for each in family:
                if each.is_running():
                    each.kill()


def forked(process: psutil.Process) -> bool:
    """Whether it has its parent's command line and is at work: it was forked, and is not just about to start another program."""
    try:
        return bool(process.cmdline() == process.parent().cmdline() and process.cpu_times().user > 0.1)
    except (psutil.Error, AttributeError):
        return False


def is_busy(family: list[psutil.Process], jobs: int) -> bool:
    """Whether so many of these have been at work for longer than imports take."""
    times = [each.cpu_times().user for each in family]
    return sum(each > 1.5 for each in times) >= jobs


def test_workers_do_not_outlive_whoever_started_them() -> None:
    with start("--peers", "300", "--messages", "100000", "--repeat", "2", "--jobs", "2") as process:
        parent = psutil.Process(process.pid)
        family = [parent]
        deadline = time.monotonic() + PATIENCE
        while sum(each.cpu_times().user > 1.0 for each in family[1:]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            family = [parent, *parent.children(recursive=True)]
        process.kill()
        assert psutil.wait_procs(family[1:], timeout=PATIENCE)[1] == []


# -- the results, and what is written of the simulator ------------------------------------------------------------


def overlay(directory: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "overlay.py", "--size", "small", "--output-dir", directory, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr  # what holds is for test_scenarios.py


def test_results_are_written_down_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "simulation-results.json"
    overlay(tmp_path, "many-senders", "plumtree-rmr")
    first = json.loads(path.read_text("utf-8"))
    assert set(first) == {"many-senders", "plumtree-rmr"}
    overlay(tmp_path, "many-senders", "--seed", "2")
    second = json.loads(path.read_text("utf-8"))
    assert second["plumtree-rmr"] == first["plumtree-rmr"]
    assert second["many-senders"]["figures"]["seed"] == 2
    text = (tmp_path / "simulation-results.rst").read_text("utf-8")
    docutils.core.publish_string(text, writer="html5", settings_overrides={"report_level": 2, "halt_level": 2})
    for found in second.values():
        assert f"\n    {found['command']}\n" in text
        assert f"{found['figures']['events']:,} events" in text
    overlay(tmp_path, "--no-run")
    assert (tmp_path / "simulation-results.rst").read_text("utf-8") == text


def commands_of(document: str) -> list[str]:
    return re.findall(r"^    (?:python -m solyd_swarm\.simulation)(.*)$", (ROOT / document).read_text("utf-8"), re.MULTILINE)


def test_the_document_shows_commands_that_there_are() -> None:
    parser = commands._parser()
    found = [shlex.split(line, comments=True) for line in commands_of("docs/simulation.rst")]
    assert len(found) >= 5
    for words in found:
        arguments = parser.parse_args(words)
        if arguments.scenario != commands.LIST:
            commands._task(parser, arguments)


def test_the_readme_s_command_runs() -> None:
    (line,) = commands_of("README.rst")
    done = subprocess.run(
        [sys.executable, "-m", "solyd_swarm.simulation", *shlex.split(line), "--peers", "30", "--messages", "5", "--quiet"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "reliability" in done.stdout


def test_the_document_tells_of_all_figures_and_options() -> None:
    text = (ROOT / "docs" / "simulation.rst").read_text("utf-8")
    for name in figures.AGGREGATES:
        assert f"``{name}``" in text, name
    for action in commands._parser()._actions:
        assert any(f"``{option}" in text for option in action.option_strings), action.option_strings
