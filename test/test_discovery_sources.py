"""Each way of finding others by itself, with real processes on a network of their own that nothing leaves."""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from processes import Process

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))), reason="a network of its own takes root, util-linux, ip"
)

MEMBER = """
import os, sys, threading, logging, json
from solyd_swarm import pubsub
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
swarm = pubsub(os.environ.get("TOPIC", "room"), **json.loads(os.environ.get("OPTIONS", "{}")))
swarm.on("neighbor_up", lambda peer: print("up", peer.id, flush=True))
swarm.on("message", lambda message: print("got", message, flush=True))
print("ready", swarm.id, swarm.ticket, swarm._node.port, flush=True)
for line in sys.stdin:
    if line == "stats\\n":
        print("stats", json.dumps(swarm.stats.discovery), len(swarm.peers), flush=True)
    else:
        swarm.publish(line.strip())
swarm.leave()
"""

Start = Callable[..., Process]


class Network:
    """A network namespace that lives as long as the process that holds it."""

    def __init__(self, set_up: str) -> None:
        self.holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-ec", f"{set_up}\necho up; exec sleep 600"], stdout=subprocess.PIPE, text=True
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "up\n":
            self.close()
            pytest.skip("this kernel has no such network")

    def run(self, *command: str) -> str:
        return subprocess.run(self.enter(*command), capture_output=True, text=True, check=True).stdout

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-n", *command]

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()


@contextlib.contextmanager
def network(set_up: str, interfaces: str) -> Iterator[tuple[Network, Start]]:
    made = Network(set_up)
    with contextlib.ExitStack() as stack:
        stack.callback(made.close)

        def start(topic: str = "room", **environment: str) -> Process:
            command = made.enter(sys.executable, "-c", MEMBER)
            process = stack.enter_context(Process(command, TOPIC=topic, SOLYD_SWARM_INTERFACES=interfaces, **environment))
            _, process.id, process.ticket, process.port = process.expect(r"ready \S+ \S+ \d+").group().split()  # type: ignore[attr-defined]
            return process

        yield made, start


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts members on a machine that has loopback and nothing else."""
    with network("ip link set lo up", "127.0.0.1") as (_, begin):
        yield begin


def options(**given: object) -> str:
    return json.dumps({"mdns": False, "dht": False} | given)


def talk(one: Process, other: Process) -> None:
    for process, peer in ((one, other), (other, one)):
        process.expect(f"up {peer.id.replace('+', '.')}")
    one.say("hello")
    other.expect("got hello")
    other.say("hello yourself")
    one.expect("got hello yourself")


def test_mdns_alone(start):
    one, other = (start(OPTIONS=options(mdns=True)) for _ in range(2))
    talk(one, other)


@pytest.mark.parametrize("contact", ["ticket", "127.0.0.1", "localhost"])
def test_bootstrap_alone(start, contact):
    one = start(OPTIONS=options())
    where = one.ticket if contact == "ticket" else f"{contact}:{one.port}"
    other = start(OPTIONS=options(bootstrap=where))
    talk(one, other)


def test_bootstrap_of_one_who_starts_later(start):
    """Programs that are started together: whoever comes first tries again soon."""
    first = start(OPTIONS=options())
    port = first.port
    first.process.kill()
    first.process.wait()
    one = start(OPTIONS=options(bootstrap=f"127.0.0.1:{port}"))
    other = start(OPTIONS=options(listen=["127.0.0.1", int(port)]))
    talk(one, other)


def test_dht_alone_through_a_node_of_another_topic_and_after_the_first_announcer_died(start):
    hub = start("something else", OPTIONS=options(dht=True))
    one = start(OPTIONS=options(dht=True, bootstrap=hub.ticket))
    other = start(OPTIONS=options(dht=True, bootstrap=f"127.0.0.1:{hub.port}"))
    talk(one, other)
    one.process.send_signal(signal.SIGKILL)
    one.process.wait()
    late = start(OPTIONS=options(dht=True, bootstrap=hub.ticket))
    talk(other, late)
    late.say("stats")
    assert "nodes known" in late.expect("stats .*").group()
    hub.say("stats")
    assert hub.expect("stats .*").group().endswith(" 0")  # it was nobody's neighbour


def test_with_everything_off_they_never_meet(start):
    pair = [start(OPTIONS=options()) for _ in range(2)]
    time.sleep(2)  # that nothing happens can only be waited for
    for process in pair:
        process.say("stats")
        states, neighbours = process.expect(r"stats (\{.*\}) (\d+)").groups()
        assert neighbours == "0"
        assert {name: state.partition(":")[0] for name, state in json.loads(states).items()} == dict.fromkeys(
            ("mdns", "dht", "mainline", "portmap", "bootstrap"), "off"
        )


def test_without_any_interface_mdns_is_one_warning_and_the_program_goes_on():
    with network("true", "") as (_, start):
        one = start(OPTIONS=options(mdns=True, dht=True))
        warning = one.expect("WARNING .*").group()
        assert "mdns does not work here" in warning
        assert "interface up" in warning
        one.say("stats")
        said = one.expect("WARNING .*|stats .*").group()
        assert said.startswith("stats")
        assert '"mdns": "failed: ' in said


OTHER_NETWORK = """
ip link set lo up
ip link add wire type veth peer name far
for each in wire far; do echo 1 > /proc/sys/net/ipv6/conf/$each/disable_ipv6; ip link set $each up; done
ip addr add 10.77.0.1/24 dev wire
ip route add default via 10.77.0.254 dev wire
"""


def sent(net: Network) -> int:
    """Packets that left by the interface that is not loopback."""
    # /sys belongs to the network of whoever mounted it; /proc/net does not.
    (line,) = [line for line in net.run("cat", "/proc/self/net/dev").splitlines() if line.strip().startswith("wire:")]
    return int(line.split(":")[1].split()[9])


def test_nothing_is_sent_outside_the_interfaces_allowed():
    elsewhere = ["10.77.0.9:7000", "198.18.0.1:7000"]
    with network(OTHER_NETWORK, "127.0.0.1") as (net, start):
        before = sent(net)
        one = start(OPTIONS=options(mdns=True, dht=True, bootstrap=elsewhere))
        other = start(OPTIONS=options(mdns=True, dht=True, bootstrap=[one.ticket, *elsewhere]))
        talk(one, other)
        with pytest.raises((AssertionError, queue.Empty)):
            one._queue.get(timeout=1.5)  # time for more tries
        assert sent(net) == before
    with network(OTHER_NETWORK, "10.77.0.1") as (net, start):  # the wire is one, though
        before = sent(net)
        start(OPTIONS=options(mdns=True, dht=True))
        deadline = time.monotonic() + 10
        while sent(net) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_two_on_one_machine_meet_by_mdns_over_its_network_address():
    with network(OTHER_NETWORK, "wire") as (_, start):
        one, other = (start(OPTIONS=options(mdns=True)) for _ in range(2))
        talk(one, other)
