"""The benchmarks run, end by themselves, and count truly. What they measure is not asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hosts import require

BENCH = Path(__file__).resolve().parent.parent / "bench"
PAIR = BENCH / "pair.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, PAIR, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def check_spread(figures: dict[str, float]) -> None:
    assert set(figures) == {"p50", "p99", "max"}
    assert 0 < figures["p50"] <= figures["p99"] <= figures["max"]


def check_throughput(figures: dict[str, Any], size: int, count: int) -> None:
    assert figures["size"] == size
    assert figures["published"] == figures["delivered"] == count
    assert figures["in_order"] is True
    assert figures["lagged"] == 0
    assert figures["delivered_per_s"] > 0


@pytest.mark.parametrize("mode", ["script", "asyncio"])
def test_pair_as_json(mode: str) -> None:
    found = json.loads(run("--json", "--mode", mode, "--messages", "3000", "--large", "30", "--pings", "5", "--runs", "2"))
    assert found["cores"] >= 1
    (measured,) = found["modes"].values()
    assert list(found["modes"]) == [mode]
    assert measured["runs"] == 2
    for name in ("start_mdns_ms", "start_ticket_ms", "one_way_ms", "round_trip_ms"):
        check_spread(measured[name])
    assert measured["one_way_ms"]["p50"] < measured["round_trip_ms"]["p50"]
    check_throughput(measured["small"], 200, 3000)
    check_throughput(measured["large"], 16 * 1024, 30)
    assert measured["publisher_peak_mib"] > 1
    assert measured["subscriber_peak_mib"] > 1


def test_pair_as_a_table() -> None:
    table = run("--mode", "asyncio", "--messages", "500", "--large", "5", "--pings", "2", "--runs", "1")
    assert "500 of 500" in table
    assert "round trip" in table


def test_wrong_sizes_are_refused() -> None:
    done = subprocess.run([sys.executable, PAIR, "--messages", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "give 1 or more" in done.stderr


def test_digest_as_a_table() -> None:
    done = subprocess.run([sys.executable, BENCH / "digest.py", "--items", "200", "2000"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["items", "200", "2,000"]
    assert len(rows) == 4
    assert all(float(cell) > 0 for row in rows for cell in row.rsplit(maxsplit=2)[1:])


def on_hosts(bench: str, *arguments: str) -> str:
    require()
    done = subprocess.run([sys.executable, BENCH / bench, *arguments], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_hosts_on_a_lan() -> None:
    found = json.loads(on_hosts("lan.py", "--hosts", "2", "4", "--runs", "1", "--idle", "2", "--idle-hosts", "2", "--json"))
    measured = [(row["hosts"], row["what"]) for row in found["rows"] if "p50" in row]
    assert measured == [(2, "newcomer"), (2, "at once"), (4, "newcomer"), (4, "pairs"), (4, "at once")]
    assert all(0 < row["p50"] <= row["max"] for row in found["rows"] if "p50" in row)
    idle = [row for row in found["rows"] if "p50" not in row]
    assert len(idle) == 2
    assert all(row[f"{way}_{what}"] >= 0 for row in idle for way in ("sent", "heard") for what in ("packets", "bytes"))


def test_ways_of_finding_peers() -> None:
    pytest.importorskip("libtorrent")
    table = on_hosts("paths.py", "--runs", "1", "--settle", "1", "--seconds", "5")
    rows = {line[:32].strip(): line[32:].split() for line in table.splitlines() if line[:1].strip()}
    for way in ("mDNS", "ticket", "peers' DHT", "mainline DHT", "address book"):
        assert way in rows, table
    assert int(rows["ticket"][0]) > 0
    assert rows["ticket"][2] == "1"
    assert float(rows["channels (TCP)"][0]) > 0


def test_healing() -> None:
    found = json.loads(on_hosts("healing.py", "router", "--runs", "1", "--apart", "4", "--members", "2", "--json"))
    assert found["router"]["runs"] == 1
    assert found["router"]["failed"] == []
    assert 0 < found["router"]["first"]["p50"] <= found["router"]["everything"]["p50"]
