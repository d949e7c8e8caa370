"""Hosts on a LAN find each other by mDNS: fast, over either IP version, on interfaces that come and go; and what they refuse."""

import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hosts import Bridge, Host, Lab, require
from processes import Process

from solyd_swarm.core.keys import derive, derive_topic_key

QUICK = 2.0
"""Seconds, far below any timeout of a connection, and above what a busy machine needs."""

MEMBER = """
import json, logging, os, sys, time
from solyd_swarm import pubsub
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
options = {"dht": False} | json.loads(os.environ.get("OPTIONS", "{}"))
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, whatever other threads say
begun = time.monotonic()
swarm = pubsub("lan", **options)
swarm.on("connected", lambda: say("connected", time.monotonic() - begun))
swarm.on("disconnected", lambda: say("disconnected"))
swarm.on("neighbor_up", lambda peer: say("up", peer.address, time.time()))
swarm.on("message", lambda message: say("got", message))
say("ready", swarm.ticket)
for line in sys.stdin:
    if line == "mdns\\n":
        mdns = swarm._node.sources.get("mdns")
        say("mdns", json.dumps([mdns.describe(), mdns.refused] if mdns else ["starts", {}]))
    else:
        swarm.publish(line.strip())
swarm.leave()
"""

Join = Callable[..., Process]


@pytest.fixture
def lab() -> Iterator[Lab]:
    require()
    with Lab() as lab:
        yield lab


@pytest.fixture
def join(lab: Lab) -> Iterator[Join]:
    """Starts a member on a host; all end with the test."""
    with ExitStack() as members:

        def start(host: Host, **options: Any) -> Process:
            return members.enter_context(host.script(MEMBER, OPTIONS=json.dumps(options)))

        yield start


def meet(*members: Process) -> list[float]:
    """Seconds that each took from `pubsub` to ``connected``."""
    return [float(member.expect(r"connected ([0-9.]+)")[1]) for member in members]


def mdns(member: Process) -> tuple[str, dict[str, int]]:
    """What its mDNS says of itself, and has refused."""
    member.say("mdns")
    state, refused = json.loads(member.expect("mdns (.*)")[1])
    return state, refused


def two(lab: Lab) -> tuple[Bridge, Host, Host]:
    return lab.bridge(), lab.host(), lab.host()


# -- meeting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one_has", "other_has"),
    [
        (["10.0.0.1/24"], ["10.0.0.2/24"]),
        (["fe80::1/64"], ["fe80::2/64"]),
        (["10.0.0.1/24", "fd00::1/64"], ["10.0.0.2/24", "fd00::2/64"]),
        (["10.0.0.1/24", "fe80::1/64"], ["fe80::2/64"]),
        (["10.0.0.1/24", "fe80::1/64"], ["192.168.7.2/24", "fe80::2/64"]),
    ],
    ids=["IPv4", "link-local IPv6 only", "both", "both with IPv6 only", "IPv4 of different networks"],
)
def test_two_meet_quickly(lab: Lab, join: Join, one_has: list[str], other_has: list[str]) -> None:
    bridge, one, other = two(lab)
    one.plug(bridge, *one_has)
    other.plug(bridge, *other_has)
    first = join(one)
    first.expect("ready .*")
    second = join(other)
    assert meet(first, second)[1] < QUICK
    assert mdns(second)[0] == "on"


@pytest.mark.parametrize(
    ("hub_has", "one_has", "other_has"),
    [
        (["fd00::9/64"], ["fd00::1/64"], ["fd00::2/64"]),
        (["10.0.0.9/24"], ["10.0.0.1/24", "fd00::1/64"], ["10.0.0.2/24"]),
        (["10.0.0.9/24", "fd00::9/64"], ["10.0.0.1/24", "fd00::1/64"], ["fd00::2/64"]),
    ],
    ids=["IPv6 only", "IPv4, one has both", "both, one has IPv6 only"],
)
def test_two_meet_by_the_dht_alone(lab: Lab, join: Join, hub_has: list[str], one_has: list[str], other_has: list[str]) -> None:
    """Through a node that is in no topic of theirs: nothing but the DHT can tell them of one another."""
    bridge = lab.bridge()
    hub, one, other = lab.host(), lab.host(), lab.host()
    for host, addresses in ((hub, hub_has), (one, one_has), (other, other_has)):
        host.plug(bridge, *addresses)
    by_dht = {"mdns": False, "dht": True, "mainline": False, "portmap": False}
    listen = "[::]:7000" if any(":" in address for address in hub_has) else "0.0.0.0:7000"
    with hub.process([sys.executable, "-m", "solyd_swarm", "bootstrap", "--listen", listen]) as node:
        ticket = node.expect(r"listening on .*, ticket (solyd1\S+)")[1]
        first, second = (join(host, bootstrap=ticket, **by_dht) for host in (one, other))
        meet(first, second)
        first.say("hello")
        second.expect("got hello")


def test_addresses_that_lead_nowhere_cost_nothing(lab: Lab, join: Join) -> None:
    bridge, one, other = two(lab)
    nowhere = lab.bridge()
    one.plug(nowhere, *[f"172.16.{net}.1/24" for net in range(8)], "fd77::1/64")
    one.plug(bridge, "10.0.0.1/24", "fd00::1/64")
    interface = other.plug(bridge, "10.0.0.2/24", "fd00::2/64")
    for net in range(4):
        other.ip(f"route add 172.16.{net}.0/24 via 10.0.0.99")  # nobody is there to answer
        other.ip(f"route add blackhole 172.16.{net + 4}.0/24")
    other.ip(f"route add fd77::/64 dev {interface.name}")
    first = join(one)
    first.expect("ready .*")
    second = join(other)
    assert meet(second)[0] < QUICK


def test_twenty_hosts_become_one_swarm(lab: Lab, join: Join) -> None:
    members = [join(host) for host in lab.lan(20)]
    meet(*members)
    members[0].say("hello")
    for member in members[1:]:
        member.expect("got hello")


# -- networks that come and go ------------------------------------------------------------------------------------


def test_an_interface_that_appears_later_is_used(lab: Lab, join: Join) -> None:
    bridge, one, other = two(lab)
    one.plug(bridge, "10.0.0.1/24")
    first, second = join(one), join(other)
    first.expect("ready .*")
    second.expect("ready .*")
    began = time.monotonic()
    other.plug(bridge, "10.0.0.2/24")
    meet(first, second)
    assert time.monotonic() - began < 5


def test_link_local_addresses_are_used_as_soon_as_they_may_be(lab: Lab, join: Join) -> None:
    """The system looks for others with the same address for a second or two, before ours can be bound."""
    bridge, one, other = two(lab)
    one.plug(bridge, "fe80::1/64")
    first, second = join(one), join(other)
    first.expect("ready .*")
    second.expect("ready .*")
    other.plug(bridge)
    other.sysctl("net.ipv6.conf.eth0.disable_ipv6", 0)
    began = time.monotonic()
    meet(first, second)
    assert time.monotonic() - began < 8


def test_back_with_another_address(lab: Lab, join: Join) -> None:
    bridge, one, other = two(lab)
    one.plug(bridge, "10.0.0.1/24")
    interface = other.plug(bridge, "10.0.0.2/24")
    first, second = join(one), join(other)
    meet(first, second)
    interface.unplug()
    other.interfaces.clear()
    began = time.monotonic()
    other.plug(bridge, "10.0.0.77/24")
    first.expect(r"up 10\.0\.0\.77:.*")
    assert time.monotonic() - began < 14  # the other one has noticed that the old channel is dead
    second.say("again")
    first.expect("got again")


def test_a_cable_is_put_in_later(lab: Lab, join: Join) -> None:
    bridge, one, other = two(lab)
    one.plug(bridge, "10.0.0.1/24")
    interface = other.plug(bridge, "10.0.0.2/24").pull()
    first, second = join(one), join(other)
    for _ in range(2):
        second.expect("ready .*|WARNING .*nobody found.*")
    began = time.monotonic()
    interface.put_back()
    meet(first, second)
    assert time.monotonic() - began < 5


# -- multicast is blocked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["input", "output"])
def test_blocked_multicast_is_told_and_the_rest_goes_on(lab: Lab, join: Join, hook: str) -> None:
    require("nft")
    one, other, third = lab.lan(3)
    other.drop("udp dport 5353", hook=hook)
    first, second = join(one), join(other)
    ticket = first.expect("ready (.*)")[1]
    told = {"input": "mDNS: not even our own packets come back on eth0.*", "output": "mDNS cannot reach the network now: .*"}
    second.expect(f"WARNING {told[hook]}")
    state, _ = mdns(second)
    assert re.match({"input": "on, but not even our own", "output": "on, but cannot send: "}[hook], state), state
    third.drop("udp dport 5353", hook=hook)
    meet(first, join(third, bootstrap=ticket))


# -- what is refused -----------------------------------------------------------------------------------------------

SENDER = """
import socket, sys, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sender.bind(("", 5353))
sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.0.0.9"))
print("ready", flush=True)
for line in sys.stdin:
    sender.sendto(bytes.fromhex(line), ("224.0.0.251", 5353))
    time.sleep(0.002)  # more than the receiver's buffer holds would come to nothing
"""

TYPE = "_solyd-swarm._tcp.local"


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def record(owner: str, kind: int, data: bytes, ttl: int = 4500) -> bytes:
    return name(owner) + kind.to_bytes(2, "big") + b"\0\1" + ttl.to_bytes(4, "big") + len(data).to_bytes(2, "big") + data


def packet(*records: bytes) -> bytes:
    return b"\0\0\x84\0\0\0" + len(records).to_bytes(2, "big") + b"\0\0\0\0" + b"".join(records)


def text(*entries: bytes) -> bytes:
    return b"".join(bytes([len(entry)]) + entry for entry in entries)


def join_packets(packets: list[bytes]) -> bytes:
    """One packet with the records of all."""
    count = sum(int.from_bytes(each[6:8], "big") for each in packets)
    return packets[0][:6] + count.to_bytes(2, "big") + bytes(4) + b"".join(each[12:] for each in packets)


def service(
    *, instance: str = "", port: int = 9, txt: bytes | None = None, addresses: tuple[str, ...] = ("10.0.0.9",), ttl: int = 4500
) -> bytes:
    """A whole announcement, with a tag of the topic."""
    instance, host = f"{instance or secrets.token_hex(16)}.{TYPE}", f"{secrets.token_hex(16)}.local"
    nonce = secrets.token_bytes(16)
    tag = derive(derive_topic_key("lan"), b"mdns", nonce, size=16)
    return packet(
        record(TYPE, 12, name(instance), ttl),
        record(instance, 33, bytes(4) + port.to_bytes(2, "big") + name(host), ttl),
        record(instance, 16, text(b"n=" + nonce, b"t=" + tag) if txt is None else txt, ttl),
        *(record(host, 1, bytes(map(int, address.split("."))), ttl) for address in addresses),
    )


LOOP = packet(b"\xc0\x0e\xc0\x0c" + bytes(10))
MALFORMED = {
    "noise": ("packet", secrets.token_bytes(400)),
    "a header only": ("packet", packet(b"", b"")),
    "cut off in a record": ("packet", service()[:-2]),
    "cut off in a name": ("packet", service()[:20]),
    "a compression loop": ("packet", LOOP),
    "a compression pointer to nowhere": ("packet", packet(b"\xff\xff" + bytes(10))),
    "another name": ("name", service(instance="printer")),
    "port 0": ("port", service(port=0)),
    "a huge text": ("text", service(txt=text(*[bytes(250)] * 30))),
    "a text cut off": ("text", service(txt=b"\x12n=")),
    "no tag": ("text", service(txt=text(b"n=" + bytes(16)))),
    "multicast": ("address", service(addresses=("224.0.0.1",))),
    "zero": ("address", service(addresses=("0.0.0.0",))),
    "broadcast": ("address", service(addresses=("255.255.255.255",))),
    "zero among others": ("invalid", service(addresses=("10.0.0.9", "0.0.0.0"))),
    "hundreds of addresses": ("excess", service(addresses=tuple(f"10.0.1.{number}" for number in range(100)))),
}


@pytest.fixture
def attacked(lab: Lab, join: Join) -> Iterator[tuple[Process, Process, Host]]:
    """A member, a host that sends it packets, and one for an honest member."""
    bridge, host, honest, attacker = lab.bridge(), lab.host(), lab.host(), lab.host()
    for number, each in ((1, host), (2, honest), (9, attacker)):
        each.plug(bridge, f"10.0.0.{number}/16")
    member = join(host)
    member.expect("ready .*")
    while mdns(member)[0] == "starts":
        pass
    with attacker.script(SENDER) as sender:
        sender.expect("ready")
        yield member, sender, honest


def refused(member: Process, reason: str) -> int:
    """How often, once it has been."""
    deadline = time.monotonic() + 10
    while not (count := mdns(member)[1].get(reason, 0)):
        assert time.monotonic() < deadline, "nothing was refused"
    return count


def test_malformed_records_are_refused_and_counted(attacked: tuple[Process, Process, Host], join: Join) -> None:
    member, sender, honest = attacked
    before: dict[str, int] = {}
    for what, (reason, data) in MALFORMED.items():
        sender.say(data.hex())
        deadline = time.monotonic() + 10
        while (now := mdns(member)[1]).get(reason, 0) == before.get(reason, 0):
            assert time.monotonic() < deadline, f"{what} was not refused as {reason}: {now}"
        assert {key for key in now if now[key] != before.get(key, 0)} == {reason}, what
        before = now
    assert meet(join(honest))[0] < QUICK


def test_a_service_with_a_wrong_tag_is_nobodys(attacked: tuple[Process, Process, Host], join: Join) -> None:
    member, sender, honest = attacked
    sender.say(service(txt=text(b"n=" + bytes(16), b"t=" + bytes(16))).hex())
    assert meet(join(honest))[0] < QUICK
    assert mdns(member)[1] == {}


def test_ten_thousand_services_keep_nobody_out(attacked: tuple[Process, Process, Host], join: Join) -> None:
    """They live for ever, so that whoever comes later would be the first to be evicted."""
    member, sender, honest = attacked
    other = text(b"n=" + bytes(16), b"t=" + bytes(16))
    for _ in range(500):
        sender.say(join_packets([service(txt=other, ttl=2**31 - 1) for _ in range(20)]).hex())
    sender.say(service(port=0).hex())
    assert refused(member, "port")
    assert meet(join(honest))[0] < QUICK * 2
