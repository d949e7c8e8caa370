"""``solyd-swarm bootstrap``, as a process that two others meet through; and that nobody can fill it."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from endpoints import Host, hosts, until
from processes import ROOT, Process

from solyd_swarm import Node, pubsub
from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.ticket import parse_contact

COMMAND = [sys.executable, "-m", "solyd_swarm"]
PATIENCE = 30.0
UNIT = ROOT / "docs" / "solyd-swarm-bootstrap.service"
LISTENING = r"listening on (127\.0\.0\.1:\d+), ticket (solyd1\S+)"


def bootstrap(*options: str) -> Process:
    return Process([*COMMAND, "bootstrap", "--listen", "127.0.0.1:0", *options])


def pipe(topic: str, place: str) -> Process:
    return Process([*COMMAND, "pipe", topic, "--no-mdns", "--stay", "--bootstrap", place])


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, "bootstrap", *options], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("by", ["host and port", "ticket"])
def test_two_meet_through_it(by: str) -> None:
    topic = f"test-{uuid.uuid4()}"
    with bootstrap() as node:
        place, ticket = node.expect(LISTENING).groups()
        begin = place if by == "host and port" else ticket
        with pipe(topic, begin) as one, pipe(topic, begin) as other:
            one.say("hello")
            other.expect('"hello"')
            other.say("and back")
            one.expect('"and back"')
            for each in (one, other):
                each.process.send_signal(signal.SIGTERM)
                assert each.end()[0] == 0
        node.process.send_signal(signal.SIGTERM)
        assert node.end() == (0, "")
        assert len(node.lines) == 1


def test_they_stay_together_without_it() -> None:
    """It is a place to begin at: who has met through it needs it no more, and others come in through those."""
    topic = f"test-{uuid.uuid4()}"
    with bootstrap() as node:
        place = node.expect(LISTENING)[1]
        with pipe(topic, place) as one, pipe(topic, place) as other:
            one.say("hello")
            other.expect('"hello"')
            node.interrupt()
            assert node.end() == (130, "")
            other.say("still here")
            one.expect('"still here"')


def test_two_of_them_are_one_dht() -> None:
    """Whoever begins at one meets whoever began at the other; also if that one was not there yet when the first was told of it."""
    topic = f"test-{uuid.uuid4()}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        later = free.getsockname()[1]
    with bootstrap("--bootstrap", f"127.0.0.1:{later}") as first:
        place = first.expect(LISTENING)[1]
        with Process([*COMMAND, "bootstrap", "--listen", f"127.0.0.1:{later}", "--bootstrap", f"localhost:{later}"]) as second:
            second.expect(LISTENING)
            with pipe(topic, place) as one, pipe(topic, f"127.0.0.1:{later}") as other:
                one.say("hello")
                other.expect('"hello"')
            for node in (first, second):
                node.interrupt()
                assert node.end() == (130, "")


def test_status_after_sigint_and_what_is_told() -> None:
    with bootstrap() as node:
        place, ticket = node.expect(LISTENING).groups()
        assert parse_contact(ticket).addresses == (("127.0.0.1", int(place.rpartition(":")[2])),)
        node.interrupt()
        assert node.end() == (130, "")
        assert len(node.lines) == 1


def test_it_listens_by_tcp_and_udp_at_one_port() -> None:
    with bootstrap() as node:
        port = int(node.expect(LISTENING)[1].rpartition(":")[2])
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as probe, pytest.raises(OSError, match="in use"):
                probe.bind(("127.0.0.1", port))


def test_the_identity_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        with bootstrap("--identity", str(tmp_path / "identity")) as node:
            node.expect(LISTENING)
            node.process.send_signal(signal.SIGTERM)
            assert node.end() == (0, "")
    assert (tmp_path / "identity").exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_an_address_in_use(kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        done = run("--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("solyd-swarm: ")
    assert done.stderr.count("\n") == 1
    assert "in use by another program" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--listen"),
        (("--listen", "7000"), "HOST:PORT"),
        (("--listen", "127.0.0.1:70000"), "out of range"),
        (("--listen", "192.0.2.1:0"), "192.0.2.1"),
        (("--listen", "127.0.0.1:0", "--identity", "/nonsense/identity"), "/nonsense"),
        (("--listen", "127.0.0.1:0", "--interfaces", "nonsense0"), "nonsense0"),
        (("--listen", "127.0.0.1:0", "--bootstrap", "no port"), "no port"),
    ],
)
def test_errors_are_one_sentence(options: tuple[str, ...], says: str) -> None:
    done = run(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("solyd-swarm")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_reader_that_has_gone() -> None:
    """Nobody has to read the line."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([*COMMAND, "bootstrap", "--listen", "127.0.0.1:0", "-v"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.stderr is not None
    with contextlib.closing(process.stderr):
        while b"listening on port" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(PATIENCE) == 0


# Nobody can fill it.


async def test_a_flood_of_channels_does_not_keep_clients_out() -> None:
    """300 instances of one host take a channel each and keep it: there is room for those who come after."""
    async with Node(listen=("127.0.0.1", 0), mdns=False) as node, hosts(*(Host() for _ in range(300))) as flood:
        at = (("127.0.0.1", node.port),)
        # All at once they take longer than a stranger may stay, on a slow machine.
        limits = node._base.endpoint._limits = replace(node._base.endpoint._limits, stranger=60.0)
        topic_key = derive_topic_key("no such topic")
        for host in flood:
            host.join(topic_key)
            host.dial(at, topic_key=topic_key)
        endpoint = node._base.endpoint
        await until(lambda: len(endpoint._connections) == limits.channels, PATIENCE)
        topic, place = f"test-{uuid.uuid4()}", f"127.0.0.1:{node.port}"
        async with (
            pubsub(topic, bootstrap=place, mdns=False, listen=("127.0.0.1", 0)) as one,
            pubsub(topic, bootstrap=place, mdns=False, listen=("127.0.0.1", 0)) as other,
        ):
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(one.joined(), other.joined())
            assert [peer.id for peer in one.peers] == [other.id]
        assert len(endpoint._connections) <= limits.channels
        assert len(endpoint._strangers) <= limits.strangers


async def test_it_holds_a_channel_for_seconds_only() -> None:
    async with Node(listen=("127.0.0.1", 0), mdns=False) as node, hosts(Host()) as (client,):
        endpoint = node._base.endpoint
        limits = endpoint._limits
        await until(lambda: endpoint.dht_port, PATIENCE)  # told in the handshake
        client.join(derive_topic_key("no such topic"))
        client.dial((("127.0.0.1", node.port),), topic_key=derive_topic_key("no such topic"))
        await until(lambda: endpoint._connections and client.met, PATIENCE)
        assert client.met == [("127.0.0.1", endpoint.dht_port)]
        assert limits.stranger <= 10
        # Not waited for: the next look after ten seconds.
        [connection] = endpoint._connections.values()
        connection.since -= limits.stranger
        await until(lambda: not endpoint._connections, PATIENCE)


# The service.


def unit_lines() -> Iterator[tuple[str, str, str]]:
    section = ""
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield section, name, value


def test_the_unit_runs_the_command() -> None:
    lines = list(unit_lines())
    assert {section for section, _, _ in lines} == {"Unit", "Service", "Install"}
    service = {name: value for section, name, value in lines if section == "Service"}
    assert service["DynamicUser"] == "yes"
    assert service["Restart"] == "on-failure"
    executable, *arguments = service["ExecStart"].replace("${STATE_DIRECTORY}", f"/var/lib/{service['StateDirectory']}").split()
    assert executable.endswith("/solyd-swarm")
    from solyd_swarm.cli import _parser

    parsed = _parser().parse_args(arguments)
    assert parsed.listen == ("", 7000)
    assert parsed.identity == "/var/lib/solyd-swarm-bootstrap/identity"
    assert service["ExecStart"] in (ROOT / "docs" / "bootstrap.rst").read_text().replace(":7070", ":7000")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_verified(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text()))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=PATIENCE)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip("systemd-analyze needs what is not here")
    about_ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert about_ours == []
