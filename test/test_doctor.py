"""``solyd-swarm doctor``, on healthy hosts and on broken ones."""

import asyncio
import contextlib
import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hosts import Host, Lab, require
from processes import Process

from solyd_swarm.discovery.interfaces import LocalAddress, usable_interfaces
from solyd_swarm.discovery.source import Address, Candidate
from solyd_swarm.doctor import sources
from solyd_swarm.doctor.examine import at_work
from solyd_swarm.doctor.findings import Check, Checkup, Finding, counted, listed
from solyd_swarm.doctor.firewall import check_firewall, dropping_chains
from solyd_swarm.doctor.machine import check_clock, confinement
from solyd_swarm.doctor.multicast import Probe, question
from solyd_swarm.doctor.patient import reason_of
from solyd_swarm.doctor.report import Report
from solyd_swarm.node import NodeOptions

DOCTOR = [sys.executable, "-m", "solyd_swarm", "doctor"]
PATIENCE = 20.0
SECRET = "open sesame"

PEER = f"""
    from solyd_swarm import pubsub
    swarm = pubsub("room", secret="{SECRET}", dht=False)
    print(swarm.id, swarm.ticket, flush=True)
    swarm.wait()
    """


@pytest.fixture
def lab() -> Iterator[Lab]:
    require("nft")
    with Lab() as lab:
        yield lab


def doctor(host: Host, *arguments: str, **environment: str) -> Process:
    return host.process([*DOCTOR, *arguments], SOLYD_SWARM_SECRET=SECRET, **environment)


def report_of(process: Process) -> tuple[int, dict[str, Any]]:
    """Exit status and the JSON object, which must be all that was printed."""
    status, errors = process.end()
    assert errors == ""
    (line,) = process.lines
    report = json.loads(line)
    assert report["ok"] is (status == 0)
    return status, report


def part(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [finding for finding in report["findings"] if finding["part"] == name]
    return found


def text_of(process: Process) -> tuple[int, str]:
    status, errors = process.end()
    assert errors == ""
    return status, " ".join("\n".join(process.lines).split())


# -- on hosts of their own


def test_a_healthy_lan(lab: Lab) -> None:
    one, other = lab.lan(2)
    with other.script(PEER) as peer:
        id = peer.expect(r"(\S+) \S+")[1]
        begun = time.monotonic()
        with (
            doctor(one, "room", "--json", "--seconds", "3") as with_json,
            doctor(one, "room", "--seconds", "3") as with_text,
            doctor(one, "--json", "--seconds", "3", "--no-dht") as without_topic,
        ):
            status, report = report_of(with_json)
            text_status, text = text_of(with_text)
            bare_status, bare = report_of(without_topic)
        assert time.monotonic() - begun < PATIENCE / 2
    assert (status, text_status, bare_status) == (0, 0, 0)

    assert {name: report[name] for name in ("version", "ok", "seconds", "with_topic")} == {
        "version": 1,
        "ok": True,
        "seconds": 3.0,
        "with_topic": True,
    }
    for finding in report["findings"]:
        assert sorted(finding) == ["advice", "figures", "part", "says", "works"]
        assert finding["works"] in (True, False, None)
        assert finding["says"].endswith(".")
    assert report["ways"]["mdns"] == "works"
    assert part(report, "interfaces")["figures"]["interfaces"]["eth0"] == ["10.0.0.1/24"]
    assert part(report, "routes")["works"] is None
    assert part(report, "listener")["figures"]["answers"] == ["10.0.0.1"]
    assert part(report, "firewall")["figures"]["found"] == []
    assert part(report, "versions")["figures"]["python"] == platform.python_version()
    multicast = part(report, "multicast")
    assert multicast["works"] is True
    assert {name: multicast["figures"][name] for name in ("interface", "family", "looped", "answered", "swarms")} == {
        "interface": "eth0",
        "family": 4,
        "looped": True,
        "answered": 1,
        "swarms": 1,
    }
    peers = part(report, "peers")["figures"]
    assert report["neighbors"] == peers["neighbors"] >= 1
    assert peers["neighbors_by_source"]["mdns"] >= 1
    assert part(report, "dht")["figures"]["port"]

    assert "ok Multicast on eth0 (IPv4) works both ways" in text
    assert re.search("met under this topic: . found by [a-z, ]*mdns", text)
    for printed in (text, json.dumps(report), json.dumps(bare)):
        assert id not in printed
        assert SECRET not in printed
    assert (bare["with_topic"], bare["neighbors"], bare["ways"]) == (False, 0, {"mdns": "works"})
    assert part(bare, "dht")["says"] == "The peers' DHT is switched off."


def test_multicast_that_does_not_come_in(lab: Lab) -> None:
    one, other = lab.lan(2)
    for host in (one, other):
        host.drop("udp dport 5353")
    with other.script(PEER) as peer, doctor(one, "room", "--json", "--no-dht", "--seconds", "2") as process:
        peer.expect(".*")
        status, report = report_of(process)
    assert status == 1
    assert report["ways"] == {}
    multicast = part(report, "multicast")
    assert multicast["works"] is False
    assert (multicast["figures"]["looped"], multicast["figures"]["heard"]) == (False, 0)
    assert "ufw allow 5353/udp" in multicast["advice"]
    assert "inet lab_input drops" in part(report, "firewall")["says"]
    assert part(report, "peers")["says"] == "Nobody was found under this topic within 2 s."


def test_multicast_that_does_not_get_out(lab: Lab) -> None:
    (host,) = lab.lan(1)
    host.drop("udp dport 5353", hook="output")
    with doctor(host, "--no-dht", "--seconds", "1") as process:
        status, text = text_of(process)
    assert status == 1
    assert "no Multicast on eth0 (IPv4) does not leave this machine" in text
    assert "No way of finding peers works from here. What to do: 1. Let this machine's firewall pass UDP port 5353" in text


def test_clients_kept_apart(lab: Lab) -> None:
    """As by a wireless access point: each hears itself, and nobody else. That cannot be told from being alone."""
    one, other = lab.host(), lab.host()
    one.plug(lab.bridge(), "10.0.0.1/24", "fd00::1/64", gateway="10.0.0.254")
    other.plug(lab.bridge(), "10.0.0.2/24")
    with other.script(PEER) as peer, doctor(one, "--json", "--seconds", "1") as process, doctor(one, "--seconds", "1") as with_text:
        peer.expect(".*")
        status, report = report_of(process)
        _, text = text_of(with_text)
    assert status == 0
    assert report["ways"] == {"mdns": "possible"}
    both = [finding for finding in report["findings"] if finding["part"] == "multicast"]
    assert [(finding["figures"]["family"], finding["works"], finding["figures"]["looped"]) for finding in both] == [
        (4, None, True),
        (6, None, True),
    ]
    assert both[0]["advice"]
    assert part(report, "routes")["figures"] == {"ipv4": "10.0.0.1", "ipv6": None}
    assert part(report, "outside")["figures"]["behind_nat"] is None
    assert "Nothing is seen to be wrong with mDNS, but nobody was there to prove it." in text
    assert text.count(both[0]["advice"]) == 1


def test_a_host_without_a_network(lab: Lab) -> None:
    host = lab.host()
    with doctor(host, "--seconds", "1", "--json") as process, doctor(host, "--seconds", "1") as with_text:
        status, report = report_of(process)
        text_status, text = text_of(with_text)
    assert (status, text_status, report["ways"]) == (1, 1, {})
    interfaces = part(report, "interfaces")
    assert (interfaces["works"], interfaces["figures"]["families"]) == (False, [])
    assert "What to do: 1. Connect it to a network" in text


def test_firewalls_that_let_nobody_in(lab: Lab) -> None:
    one, other = lab.lan(2)
    for host in (one, other):
        host.drop("iifname eth0 tcp flags syn / syn,ack")
    with other.script(PEER) as peer:
        ticket = peer.expect(r"\S+ (\S+)")[1]
        with doctor(one, "room", "--json", "--no-dht", "--seconds", "6", "--bootstrap", ticket) as process:
            status, report = report_of(process)
    assert status == 1
    assert report["ways"] == {"mdns": "works"}
    peers = part(report, "peers")
    assert peers["figures"]["candidates_by_source"]["mdns"] == 1
    assert any(address.startswith("10.0.0.2:") for address in peers["figures"]["failed"])
    assert "no answer" in peers["says"]
    assert "let the firewall pass TCP" in peers["advice"]
    assert part(report, "firewall")["figures"]["found"]
    bootstrap = part(report, "bootstrap")
    assert (bootstrap["works"], bootstrap["figures"]["answers"]) == (False, [])


def test_bootstrap_addresses_and_another_topic(lab: Lab) -> None:
    one, other = lab.lan(2)
    options = ("--no-dht", "--no-mdns", "--seconds", "2", "--json")
    with other.script(PEER) as peer:
        ticket = peer.expect(r"\S+ (\S+)")[1]
        with (
            doctor(one, "room", *options, "--bootstrap", ticket) as right,
            doctor(one, "hall", *options, "--bootstrap", ticket) as wrong,
            doctor(one, *options, "--bootstrap", "10.0.0.2:9") as closed,
        ):
            outcomes = [report_of(process) for process in (right, wrong, closed)]
    assert [status for status, _ in outcomes] == [0, 1, 1]
    (_, met), (_, strange), (_, refused) = outcomes
    assert met["ways"] == {"bootstrap": "works"}
    assert part(met, "peers")["figures"]["neighbors_by_source"] == {"bootstrap": 1}
    assert part(strange, "bootstrap")["works"] is True
    assert "the same topic and secret" in part(strange, "peers")["advice"]
    assert "10.0.0.2:9: refused" in part(refused, "bootstrap")["says"]
    assert not [finding for finding in met["findings"] if finding["part"] == "multicast"]


def test_kept_to_loopback_nothing_leaves(lab: Lab) -> None:
    (host,) = lab.lan(1)
    ours = bytes.fromhex(host.run("ip", "-o", "link", "show", "dev", "eth0").partition("link/ether ")[2][:17].replace(":", ""))
    with host.capture("eth0") as frames:
        options = ("room", "--seconds", "2", "--json", "--bootstrap", "10.0.0.2:9")
        with doctor(host, *options, SOLYD_SWARM_INTERFACES="127.0.0.1") as process:
            status, report = report_of(process)
    assert [frame for _, frame in frames if frame[6:12] == ours] == []
    with host.capture("eth0") as frames, doctor(host, "--seconds", "0", "--no-dht") as unlimited:
        unlimited.end()
    assert [frame for _, frame in frames if frame[6:12] == ours]  # it would have been seen
    assert status == 1
    assert part(report, "interfaces")["figures"]["limited"] is True
    assert part(report, "multicast")["figures"]["interface"] == "lo"
    assert part(report, "bootstrap")["figures"]["problems"] == ["no interface that may be used leads to 10.0.0.2"]
    assert report["ways"] == {"mdns": "works"}


# -- as a command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a", "b"), "b"),
        (("--seconds", "soon"), "soon"),
        (("--seconds", "-1"), "-1"),
        (("--seconds", "inf"), "inf"),
        (("",), "empty"),
        (("--secret", "s"), "TOPIC"),
        (("t", "--secret", ""), "secret is empty"),
        (("t", "--secret-file", "/nonsense/secret"), "/nonsense/secret"),
        (("--bootstrap", "nonsense"), "nonsense"),
        (("--interfaces", "nonsense0"), "nonsense0"),
        (("--listen", "7000"), "HOST:PORT"),
    ],
)
def test_bad_usage_is_one_sentence(arguments: tuple[str, ...], says: str) -> None:
    done = subprocess.run([*DOCTOR, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("solyd-swarm")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_at_once(number: int, status: int) -> None:
    with Process([*DOCTOR, "t", "-v", "--no-dht", "--json", "--seconds", "60"]) as process:
        wait_for_sockets(process.process.pid)
        process.process.send_signal(number)
        begun = time.monotonic()
        ended, errors = process.end()
    assert time.monotonic() - begun < 4.0
    assert (ended, process.lines) == (status, [])
    assert "Traceback" not in errors


def wait_for_sockets(pid: int) -> None:
    """Until it is at work: a loop has three of its own."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = 0
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since
                found += os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("socket:")
        if found >= 5:
            return
        time.sleep(0.02)
    raise AssertionError("it did not open its sockets")


def test_output_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*DOCTOR, "--no-dht", "--no-mdns", "--seconds", "0"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


# -- piece by piece


async def test_a_check_that_fails_or_hangs_takes_nothing_from_others(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> list[Finding]:
        raise ValueError("no such thing")

    async def hangs() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    async def works() -> list[Finding]:
        return [Finding("c", True, "Fine.")]

    findings = await Checkup([Check("a", fails), Check("b", hangs), Check("c", works)], 0.05).run()
    assert [(finding.part, finding.works) for finding in findings] == [("a", None), ("b", None), ("c", True)]
    assert "no such thing" in findings[0].says
    assert "no such thing" in caplog.text


@pytest.mark.parametrize(
    ("findings", "neighbors", "ways", "status"),
    [
        ([], None, {}, 1),
        ([Finding("multicast", True, "", way="mdns")], None, {"mdns": "works"}, 0),
        ([Finding("multicast", None, "", way="mdns"), Finding("multicast", False, "", way="mdns")], None, {"mdns": "possible"}, 0),
        ([Finding("multicast", True, "", way="mdns"), Finding("mdns", False, "")], None, {}, 1),
        ([Finding("multicast", True, "", way="mdns")], 0, {"mdns": "works"}, 1),
        ([], 1, {}, 0),
    ],
)
def test_status(findings: list[Finding], neighbors: int | None, ways: dict[str, str], status: int) -> None:
    report = Report(findings, 1.0, neighbors)
    assert (report.ways, report.status) == (ways, status)
    assert json.loads(report.to_json())["ok"] is (status == 0)


def test_text_is_marked_and_advice_comes_once_the_urgent_first() -> None:
    findings = [Finding("a", None, "Who knows.", "Try."), Finding("b", True, "Fine \x1b[31m."), Finding("c", False, "Broken.", "Repair.")]
    text = Report([*findings, Finding("d", None, "Nor here.", "Try.")], 1.0, None).to_text()
    assert text.splitlines() == [
        *("?   Who knows.", "ok  Fine ?[31m.", "no  Broken.", "?   Nor here.", "", "No way of finding peers works from here.", ""),
        *("What to do:", " 1. Repair.", " 2. Try."),
    ]


def test_words() -> None:
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [counted(number, "host") for number in (0, 1, 2)] == ["no host", "1 host", "2 hosts"]
    assert reason_of(ConnectionRefusedError(errno.ECONNREFUSED, "x")).startswith("refused")
    assert reason_of(TimeoutError()).startswith("no answer")
    assert reason_of(ValueError("odd")) == "odd"


async def test_clock() -> None:
    assert [(await check_clock(now))[0].works for now in (0.0, 1.8e9, 5e9)] == [False, True, False]


def rules(*items: dict[str, Any]) -> str:
    return json.dumps({"nftables": [{"metainfo": {}}, *items]})


def chain(name: str, **more: Any) -> dict[str, Any]:
    return {"chain": {"family": "inet", "table": "t", "name": name, **more}}


def rule(name: str, *expr: Any) -> dict[str, Any]:
    return {"rule": {"family": "inet", "table": "t", "chain": name, "expr": list(expr)}}


@pytest.mark.parametrize(
    ("listing", "found"),
    [
        ("", []),
        ("[]", []),
        (rules(chain("in", hook="input", policy="accept")), []),
        (rules(chain("in", hook="input", policy="drop")), ["inet t in"]),
        (rules(chain("in", hook="input", policy="accept"), rule("in", {"match": {}}, {"reject": None})), ["inet t in"]),
        (rules(chain("through", hook="forward", policy="drop")), []),
        (
            rules(chain("in", hook="input"), rule("in", {"jump": {"target": "a"}}), rule("a", {"goto": {"target": "in"}}, {"drop": None})),
            ["inet t in"],
        ),
        (rules(chain("in", hook="input"), rule("a", {"drop": None})), []),
        (rules({"chain": 7}, {"rule": {}}), []),
    ],
)
def test_chains_that_drop(listing: str, found: list[str]) -> None:
    assert dropping_chains(listing) == found


async def test_firewalls_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "etc/ufw").mkdir(parents=True)
    (tmp_path / "etc/ufw/ufw.conf").write_text("# comment\nENABLED=yes\nLOGLEVEL=low\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/firewalld.pid").write_text("1\n")
    (finding,) = await check_firewall(7000, root=tmp_path, system="linux")
    assert finding.figures["found"][:2] == ["ufw", "firewalld"]
    assert "ufw allow 7000/tcp" in finding.advice
    (windows,) = await check_firewall(7000, system="win32")
    assert "python.exe" in windows.advice


def test_confinement(tmp_path: Path) -> None:
    assert confinement(tmp_path) == ""
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/osrelease").write_text("5.15.90.1-microsoft-standard-WSL2\n")
    assert confinement(tmp_path) == "wsl"
    (tmp_path / ".dockerenv").touch()
    assert confinement(tmp_path) == "container"


def test_a_probe_hears_anything() -> None:
    """Attack: what comes in is anybody's, malformed, of other networks, or from more hosts than there are."""
    loopback = usable_interfaces(["127.0.0.1"])[0]
    probe = Probe(loopback, frozenset({"127.0.0.1"}))
    probe.hear(question(), ("127.0.0.1", 5353))
    assert not probe.looped
    probe.hear(question(), ("192.0.2.1", 5353))
    assert not probe.heard
    for data in (b"", b"\0", b"\xff" * 100, question()):
        probe.hear(data, ("127.0.0.2", 5353))
    assert (probe.heard, probe.answered) == ({"127.0.0.2"}, set())
    for number in range(3000):
        probe.hear(b"", (f"127.1.{number >> 8}.{number & 255}", 5353))
    assert len(probe.heard) == 1024
    assert len({question() for _ in range(50)}) == 50


LOOPBACK = NodeOptions(listen=("127.0.0.1", 0), mdns=False, dht=False)


@pytest.mark.parametrize(
    ("state", "external", "works"), [("mapped by PCP", Address("198.51.100.1", 7), True), ("no router answers", None, None)]
)
async def test_port_mapping(state: str, external: Address | None, works: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "parts_of", lambda node: (SimpleNamespace(state=state, external=external), None))
    async with at_work(LOOPBACK, 0.0, None, None) as examination:
        (finding,) = await sources.check_mapping(examination)
    assert (finding.works, finding.figures) == (works, {"state": state, "external": external and str(external)})


@pytest.mark.parametrize(
    ("own", "told", "figures", "works"),
    [
        ("192.168.1.2", [], {"behind_nat": True, "reached": False}, None),
        ("192.168.1.2", ["8.8.8.8"], {"behind_nat": True, "reached": True}, True),
        ("8.8.8.8", ["8.8.8.8"], {"behind_nat": False, "reached": None}, True),
        ("8.8.8.8", [], {"behind_nat": False, "reached": False}, False),
    ],
)
async def test_seen_from_outside(
    own: str, told: list[str], figures: dict[str, Any], works: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = SimpleNamespace(public_host=lambda version: "8.8.8.8" if version == 4 else "")
    monkeypatch.setattr(sources, "parts_of", lambda node: (None, observed))
    async with at_work(LOOPBACK, 0.0, None, None) as examination:
        monkeypatch.setattr(examination, "local", lambda: [LocalAddress("eth0", 2, ip_address(own), 24)])
        monkeypatch.setattr(examination.node, "addresses", lambda: tuple((host, 7) for host in told))
        (finding,) = await sources.check_outside(examination)
    assert (finding.works, finding.figures) == (works, {"public": ["8.8.8.8"], **figures})


@pytest.mark.parametrize(("nodes", "way"), [(40, "mainline"), (0, "")])
async def test_mainline(nodes: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def close() -> None:
        pass

    source: Any = SimpleNamespace(name="mainline", nodes=nodes, state="as it goes", refused={"a reason": 3}, close=close)
    async with at_work(LOOPBACK, 0.0, None, None) as examination:
        examination.node.sources["mainline"] = source
        (finding,) = await sources.check_mainline(examination)
        del examination.node.sources["mainline"]
        examination.node.problems["mainline"] = "libtorrent is not installed"
        (broken,) = await sources.check_mainline(examination)
    assert (finding.way, finding.figures) == (way, {"nodes": nodes, "state": "as it goes", "refused": 3})
    assert (broken.works, "libtorrent" in broken.says) == (False, True)


async def test_finders() -> None:
    async with at_work(LOOPBACK, 60.0, None, None) as examination:
        node = examination.node
        assert node.finders("10.0.0.2:7") == ()
        for number in range(300):
            node._found(b"", Candidate((Address("10.0.0.2", 1000 + number),), "mdns"))
        node._found(b"", Candidate((Address("fd00::2", 7),), "dht"))
        node._found(b"", Candidate((Address("10.0.0.3", 7),), "dht", node.endpoint.instance))
        assert len(node.candidates["mdns"]) == 256
        assert node.finders("10.0.0.2:1299") == node.finders("10.0.0.2:9") == ("mdns",)
        assert node.finders("[fd00::2]:7") == ("dht",)
        assert node.finders("10.0.0.3:7") == ()
