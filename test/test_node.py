"""A node inside a loop: where it says it is, what works when a part does not, and its end at any moment."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

import pytest
from endpoints import proxy, until
from processes import Process

from solyd_swarm import InterfaceError, ListenError, Node, SwarmError, finding, pubsub
from solyd_swarm import node as node_module
from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.discovery import bootstrap, dht, mdns, reach
from solyd_swarm.discovery.bootstrap import BootstrapSource
from solyd_swarm.discovery.given_hosts import GivenHosts
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address, Endpoint
from solyd_swarm.errors import DiscoveryError
from solyd_swarm.net.goals import Goal
from solyd_swarm.node import BaseNode, NodeOptions
from solyd_swarm.ticket import parse_contact

ALONE = {"mdns": False, "dht": False}
LOOPBACK = {"listen": ("127.0.0.1", 0), **ALONE}
ROOM = derive_topic_key("room")


@contextlib.asynccontextmanager
async def base(**options):
    node = BaseNode(NodeOptions(**LOOPBACK | options))
    try:
        yield node
    finally:
        await node.close()


# Where it is.


async def test_the_ticket_of_a_node_that_listens_on_all_addresses(monkeypatch):
    monkeypatch.delenv("SOLYD_SWARM_INTERFACES")
    async with base(listen=("", 0)) as node:
        contact = parse_contact(node.ticket)
        assert contact.instance == node.endpoint.instance
        assert ("127.0.0.1", node.port) in contact.addresses
        assert set(node.addresses()) <= set(contact.addresses)
        assert not any("%" in host for host, _ in contact.addresses)


async def test_interfaces_from_the_environment_and_by_name(monkeypatch):
    assert os.environ["SOLYD_SWARM_INTERFACES"] == "127.0.0.1"
    async with base(listen=None) as node:
        assert node.addresses() == (("127.0.0.1", node.port),)
        assert [each.getsockname()[0] for each in node._sockets] == ["127.0.0.1"]
    async with base(listen=None, interfaces=["127.0.0.1"]) as node:
        assert parse_contact(node.ticket).addresses == (("127.0.0.1", node.port),)
    monkeypatch.setenv("SOLYD_SWARM_INTERFACES", "no-such-interface")
    with pytest.raises(InterfaceError, match="no-such-interface"):
        BaseNode(NodeOptions())


async def test_when_all_interfaces_vanish_there_is_no_address_and_still_a_ticket(monkeypatch):
    def gone(wanted):
        raise InterfaceError("gone")

    async with pubsub("room", **LOOPBACK | {"listen": ("", 0)}) as swarm:
        node = swarm._node
        membership = (await until(lambda: swarm._driver)).overlay.membership
        assert membership.views.me.addresses == (("127.0.0.1", node.port),)
        monkeypatch.setattr(reach, "usable_interfaces", gone)
        assert node.addresses() == ()
        assert parse_contact(swarm.ticket).addresses == (("127.0.0.1", node.port),)
        node._address_timer.cancel()
        node._renew_addresses()
        assert membership.views.me.addresses == ()
        assert not node._reach.may_go_to("127.0.0.1")


def test_who_listens_where():
    everywhere = reach.Reach((), ("::",), 7)
    assert all(":" not in host for host, _ in reach.Reach((), ("0.0.0.0",), 7).addresses())
    inside = [host for host, _ in everywhere.addresses() if scope_of(host) == "loopback"]
    assert len(inside) in (0, len(everywhere.addresses()))
    assert reach.Reach(("127.0.0.1",), ("127.0.0.1", "192.0.2.1", "fe80::1"), 7).addresses() == (("127.0.0.1", 7),)  # the others have gone
    assert reach.Reach((), ("192.0.2.1",), 7).ticket_addresses(16) == (("192.0.2.1", 7),)
    assert len(reach.Reach((), ("::",), 7).ticket_addresses(1)) == 1


def test_where_packets_would_leave():
    assert reach.source_address("127.0.0.1") == "127.0.0.1"
    assert reach.source_address("127.0.0.9") == "127.0.0.1"
    for nonsense in ("", "localhost", "fe80::1%99999999999999999999", "fe80::1%none", "1.2.3.4%x"):
        assert not reach.Reach(("lo",), ("127.0.0.1",), 7).may_go_to(nonsense)
    only = reach.Reach(("127.0.0.1",), ("127.0.0.1",), 7)
    assert only.may_go_to("127.0.0.1")
    assert reach.Reach((), ("::",), 7).may_go_to("192.0.2.1")


async def test_dials_stay_on_the_interfaces_allowed_and_within_what_the_teller_may_say(monkeypatch):
    goals: list[Goal] = []
    async with base() as node:
        monkeypatch.setattr(node.endpoint, "dial", goals.append)
        teller = b"t" * 32
        told = (("127.0.0.1", 1), ("10.0.0.1", 2), ("198.18.0.1", 3), ("8.8.8.8", 4))
        node.dial(ROOM, b"", told, b"")
        node.dial(ROOM, b"", told, teller)  # of whom nothing is known
        node._reach = reach.Reach((), ("::",), 1)
        for host in ("127.0.0.1", "10.9.9.9", "8.8.4.4"):
            node.endpoint._places.met(teller, host)
            node.dial(ROOM, b"", told, teller)
    assert [[port for _, port in goal.addresses] for goal in goals] == [[1], [], [1, 2, 3, 4], [2, 3, 4], [4]]


# What does not work.


async def test_errors_of_listening_come_where_the_user_called_and_leave_nothing(tmp_path):
    identity = tmp_path / "identity"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="in use"):
        pubsub("room", listen=taken.getsockname(), identity=identity, **ALONE)
    for listen in (("192.0.2.1", 0), ("no such host", 0)):
        with pytest.raises(ListenError, match="listen on"):
            Node(listen=listen, identity=identity, **ALONE)
    async with Node(identity=identity, **LOOPBACK) as node:
        assert node.id


async def test_a_home_that_cannot_be_found_leaves_nothing(monkeypatch):
    def fail(node):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(node_module, "find_home", fail)
    with pytest.raises(RuntimeError, match="thread"):
        Node(**LOOPBACK)


async def fail_to_start(self, endpoint, found):
    raise DiscoveryError("no multicast here: name another interface")


async def break_at_start(self, endpoint, found):
    raise RuntimeError("a bug")


@pytest.mark.parametrize("failing", [fail_to_start, break_at_start])
async def test_a_source_that_fails_is_one_warning_and_the_rest_goes_on(monkeypatch, caplog, failing):
    monkeypatch.setattr(mdns.MdnsSource, "start", failing)
    async with Node(**LOOPBACK) as other, pubsub("room", listen=("127.0.0.1", 0), bootstrap=other.ticket) as swarm:
        room = other.pubsub("room")
        async with asyncio.timeout(10):
            await swarm.joined()
        await until(lambda: swarm.stats.discovery["dht"].startswith("on"))
        assert swarm.stats.discovery["mdns"].startswith("failed: ")
        assert swarm.stats.discovery["bootstrap"] == "on"
        assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
        assert "mdns does not work here" in caplog.text
        assert room.peers


async def test_a_dht_that_cannot_bind_is_one_warning(monkeypatch, caplog):
    async def refuse(self, port, host):
        raise OSError("no UDP here")

    monkeypatch.setattr(dht.DhtServer, "listen", refuse)
    async with pubsub("room", listen=("127.0.0.1", 0), mdns=False) as swarm:
        await until(lambda: "failed" in swarm.stats.discovery["dht"])
        assert "no UDP here" in swarm.stats.discovery["dht"]
        assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]


async def test_a_bootstrap_name_that_is_unknown_is_one_warning_and_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(bootstrap, "FIRST_PAUSE", 0.02)
    asked: list[str] = []

    async def resolve(host, port):
        asked.append(host)
        if len(asked) < 4:
            raise OSError("no such name")
        return [("127.0.0.1", port), ("127.0.0.1", port)]

    found = []
    hosts = GivenHosts(resolve)
    source = BootstrapSource([((("nowhere.example", 7),), b"")], hosts)
    await source.start(Endpoint(1, bytes(32)), lambda key, candidate: found.append((key, candidate)))
    source.join(ROOM)
    await until(lambda: hosts.problems == {"nowhere.example": "no such name"})
    await until(lambda: found)
    assert hosts.problems == {}
    assert found[0][0] == ROOM
    assert found[0][1].addresses == (Address("127.0.0.1", 7),)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
    await source.close()


async def test_a_bootstrap_source_asks_nothing_without_a_topic_and_survives_a_failure(monkeypatch, caplog):
    monkeypatch.setattr(bootstrap, "FIRST_PAUSE", 0.02)
    calls: list[bytes] = []

    async def resolve(host, port):
        return [(host, port)]

    def found(key, candidate):
        calls.append(key)
        if len(calls) == 1:
            raise ZeroDivisionError

    source = BootstrapSource([((("127.0.0.1", 7),), b"")], GivenHosts(resolve))
    await source.start(Endpoint(1, bytes(32)), found)
    source.refresh(ROOM)
    await asyncio.sleep(0.05)
    assert not calls
    source.join(ROOM)
    await until(lambda: len(calls) == 3)
    assert "could not be reported" in caplog.text
    await source.close()


# Together.


async def test_a_contact_reported_again_and_again_costs_nothing(monkeypatch):
    monkeypatch.setattr(bootstrap, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(bootstrap, "LONGEST_PAUSE", 0.02)
    async with Node(**LOOPBACK) as one, proxy(one.port) as between:
        room = one.pubsub("room")
        async with pubsub("room", bootstrap=[f"127.0.0.1:{between.port}", one.ticket], **LOOPBACK) as swarm:
            await swarm.joined()
            reports: list[object] = []
            real = swarm._node._found
            source = swarm._node.sources["bootstrap"]
            source._found = lambda key, candidate: (reports.append(candidate), real(key, candidate))
            await until(lambda: len(reports) >= 5)
            before, connections = room.stats.neighbors, between.connections
            endpoint = swarm._node.endpoint
            await until(lambda: len(reports) >= 25)
            assert between.connections == connections <= 2
            assert [len(each) for each in (endpoint._strangers, endpoint._others, endpoint._dialler._tasks)] == [0, 0, 0]
            assert (before, len(swarm.peers), len(room.peers)) == (1, 1, 1)


async def test_two_nodes_with_one_identity_file(tmp_path):
    """Two programs of one user: one author, two epochs; a third hears both."""
    identity = tmp_path / "identity"
    async with Node(**LOOPBACK) as hub:
        contact = {"identity": identity, "bootstrap": hub.ticket, **LOOPBACK}
        async with Node(**contact) as one, Node(**contact) as two:
            assert one.id == two.id
            heard: list[object] = []
            proofs: list[object] = []
            room = hub.pubsub("room")
            room.on("message", heard.append)
            room.on("equivocation", lambda *what: proofs.append(what))
            for number, node in enumerate((one, two)):
                node.pubsub("room").publish(number)
            await until(lambda: sorted(heard) == [0, 1])
            assert not proofs


async def test_dht_nodes_heard_of_early_are_greeted_when_ours_is_up():
    async with base(dht=True) as node:
        for number in range(100):
            node.finder.met("127.0.0.1", 40_000 + number)
        assert len(node.finder._met_early) == finding.MAX_EARLY
        await until(lambda: node.endpoint.dht_port)
        assert node.endpoint.dht_port == node.finder.dht.port
        await until(lambda: not node.finder._met_early)
        assert len(node.finder.dht._contacts) == finding.MAX_EARLY


# Its end.


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 40])
async def test_closing_while_starting(turns):
    for options in (LOOPBACK, {"listen": ("127.0.0.1", 0)}):
        node = BaseNode(NodeOptions(bootstrap="127.0.0.1:9", **options))
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.gather(node.close(), node.close())
        await node.close()


async def test_a_closing_that_is_cancelled_is_finished_by_the_next():
    async with Node(**LOOPBACK) as other:
        node = BaseNode(NodeOptions(bootstrap=other.ticket, **LOOPBACK))
        await until(lambda: "bootstrap" in node.sources)
        closing = asyncio.ensure_future(node.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await node.close()


async def test_a_source_that_fails_to_close_is_reported_and_the_rest_closes(monkeypatch, caplog):
    async def fail(self):
        await close(self)
        raise RuntimeError("a bug")

    close = BootstrapSource.close
    monkeypatch.setattr(BootstrapSource, "close", fail)
    node = BaseNode(NodeOptions(bootstrap="127.0.0.1:9", **LOOPBACK))
    await until(lambda: "bootstrap" in node.sources)
    await node.close()
    assert "did not close as it should" in caplog.text
    with pytest.raises(SwarmError):
        node.identity.next_epoch()


COMES_BACK = """
import os, sys
from solyd_swarm import pubsub
swarm = pubsub("room", identity=os.environ["IDENTITY"], bootstrap=os.environ["CONTACT"], listen=("127.0.0.1", 0), mdns=False, dht=False)
swarm.publish(os.getpid())
swarm.on("connected", lambda: print(swarm.id, flush=True))
"""


async def test_a_peer_back_from_sigkill_is_accepted_while_its_old_socket_lingers(tmp_path):
    async with Node(**LOOPBACK) as node, proxy(node.port) as between:
        room, heard, downs = node.pubsub("room"), [], []
        room.on("message", heard.append)
        room.on("neighbor_down", lambda peer, reason: downs.append(reason))
        identity, program = str(tmp_path / "identity"), [sys.executable, "-c", COMES_BACK]
        with Process(program, IDENTITY=identity, CONTACT=f"127.0.0.1:{between.port}") as first:
            await until(lambda: len(heard) == 1)
            between.frozen = True  # nobody hears of its end
            os.kill(first.process.pid, signal.SIGKILL)
            with Process(program, IDENTITY=identity, CONTACT=f"127.0.0.1:{node.port}") as second:
                await until(lambda: len(heard) == 2)
                assert heard == [first.process.pid, second.process.pid]
                assert len(room.peers) == 2
                assert len({peer.id for peer in room.peers}) == 1
                assert not downs
                second.process.kill()
