"""The network changes under a member, or the member stands still: it is connected and caught up soon after, without a restart.

``SOLYD_TEST_LONG=1`` makes outages a minute long. `bench/healing.py` repeats all this and tells the distribution.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import processes
import pytest
from endpoints import until
from hosts import Host, Lab, require
from test_driver import TOPIC, World

from solyd_swarm.core.events import Schedule, Tick
from solyd_swarm.discovery import changes
from solyd_swarm.discovery.changes import Changes
from solyd_swarm.net.driver import Driver

OUTAGE = 60.0 if os.environ.get("SOLYD_TEST_LONG") else 12.0
"""Seconds; more than a channel may be silent."""
PATIENCE = 10.0
LIMIT = 15.0
"""Seconds from the end of an outage to being caught up."""

MEMBER = r"""
import json, logging, os, sys, time
from solyd_swarm import pubsub
logging.basicConfig(level=os.environ.get("LEVEL", "ERROR"), format="%(created).3f %(name)s %(message)s")
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())  # whole lines, whichever thread writes
swarm = pubsub(**{"topic": "room", **json.loads(os.environ["OPTIONS"])})
swarm.on("neighbor_up", lambda peer: say("up", time.monotonic(), peer.address))
swarm.on("neighbor_down", lambda peer, reason: say("down", time.monotonic(), peer.address, reason))
swarm.on("message", lambda text: say("got", time.monotonic(), text))
say("ready", swarm.ticket)
for line in sys.stdin:
    swarm.publish(line.strip())
    say("published", line.strip())
swarm.leave()
"""


class Member:
    """A member in a process of its own, on a host of its own."""

    def __init__(self, host: Host, process: processes.Process) -> None:
        self.host = host
        self.process = process
        self.ticket = process.expect(r"ready (\S+)")[1]
        self.got: dict[str, float] = {}

    def publish(self, *texts: str) -> None:
        for text in texts:
            self.process.say(text)

    def wait_for(self, *texts: str) -> float:
        """Waits for messages; the moment at which the last of them had come."""
        while missing := set(texts) - self.got.keys():
            match = self.process.expect(rf"got (\S+) ({'|'.join(map(re.escape, missing))})")
            self.got[match[2]] = float(match[1])
        return max(self.got[text] for text in texts)

    def end(self) -> None:
        """Leaves; nothing may have come twice."""
        assert self.process.process.stdin is not None
        self.process.process.stdin.close()
        self.process.end()
        counts = Counter(line.split(None, 2)[2] for line in self.process.lines if line.startswith("got "))
        assert not [text for text, count in counts.items() if count > 1]

    def send_signal(self, number: int) -> None:
        self.process.process.send_signal(number)


def start(stack: contextlib.ExitStack, host: Host, **options: object) -> Member:
    """A member, which `stack` ends at last."""
    return Member(host, stack.enter_context(host.script(MEMBER, OPTIONS=json.dumps(options), LEVEL=os.environ.get("LEVEL", "ERROR"))))


def meet(*members: Member, word: str = "hello") -> float:
    """Everyone hears everyone; the moment at which that was so."""
    texts = [f"{word} {number}" for number in range(len(members))]
    for member, text in zip(members, texts, strict=True):
        member.publish(text)
    return max(member.wait_for(*(text for text in texts if text != own)) for member, own in zip(members, texts, strict=True))


@dataclass(frozen=True)
class Outcome:
    """Seconds from when the network was back."""

    caught_up: float
    heard: float


def outage(victim: Member, others: list[Member], begin: Callable[[], object], end: Callable[[], object], seconds: float) -> Outcome:
    """Something is wrong with one member for a while, in which the others talk."""
    begin()
    until = time.monotonic() + seconds
    spoken = []
    while (left := until - time.monotonic()) > 0:
        spoken.append(f"meanwhile {len(spoken)}")
        others[len(spoken) % len(others)].publish(spoken[-1])
        threading.Event().wait(min(left, max(0.5, seconds / 20)))
    end()
    back = time.monotonic()
    others[0].publish("after")
    victim.publish("back")
    caught_up = victim.wait_for(*spoken, "after") - back
    return Outcome(caught_up, max(other.wait_for("back") for other in others) - back)


DISCOVERY = {
    "mdns": lambda first: {"dht": False},
    "bootstrap": lambda first: {"dht": False, "mdns": False, "bootstrap": first},
    "both": lambda first: {"bootstrap": first},
}


@contextlib.contextmanager
def lan_of_three(discovery: str) -> Iterator[list[Member]]:
    """Three members on a LAN; the last one is the victim."""
    with Lab() as lab, contextlib.ExitStack() as stack:
        hosts = lab.lan(3)
        quiet: dict[str, object] = {} if discovery != "bootstrap" else {"mdns": False, "dht": False}
        members = [start(stack, hosts[0], **quiet)]
        for host in hosts[1:]:
            members.append(start(stack, host, **DISCOVERY[discovery](members[0].ticket)))
        meet(*members)
        yield members
        for member in members:
            member.end()


def pull_cable(discovery: str, seconds: float) -> Outcome:
    with lan_of_three(discovery) as (*others, victim):
        cable = victim.host.interfaces[0]
        return outage(victim, others, cable.pull, cable.put_back, seconds)


def drop_upstream(discovery: str, seconds: float) -> Outcome:
    """As if the cable were pulled further away: nobody's interface tells."""
    with lan_of_three(discovery) as (*others, victim):

        def begin() -> None:
            victim.host.drop('iifname "eth0"')
            victim.host.drop('oifname "eth0"', hook="output")

        def end() -> None:
            victim.host.forget_drops()
            victim.host.forget_drops(hook="output")

        return outage(victim, others, begin, end, seconds)


def change_address(discovery: str, seconds: float) -> Outcome:
    with lan_of_three(discovery) as (*others, victim):
        cable = victim.host.interfaces[0]
        return outage(victim, others, lambda: cable.remove("10.0.0.3/24"), lambda: cable.add("10.0.0.33/24"), seconds)


def stop(discovery: str, seconds: float) -> Outcome:
    with lan_of_three(discovery) as (*others, victim):
        return outage(victim, others, lambda: victim.send_signal(signal.SIGSTOP), lambda: victim.send_signal(signal.SIGCONT), seconds)


STRANGER = """
import os, socket, sys
server = socket.create_server(("", 7000))
print("ready", flush=True)
held = []
while True:
    held.append(server.accept()[0])
    if sys.argv[1:] == ["loud"]:
        held[-1].sendall(os.urandom(100_000))
"""


def lose_bootstraps(discovery: str, seconds: float) -> Outcome:
    """Three bootstraps die, and at the address of each is a stranger then: of another topic, one that talks nonsense, a silent one."""
    quiet: dict[str, object] = {"mdns": False, "dht": discovery == "both"}
    with Lab() as lab, contextlib.ExitStack() as stack:
        *places, second, last = lab.lan(5)
        known = [f"10.0.0.{number}:7000" for number in (1, 2, 3)]
        # In a stack of its own: ended without a goodbye.
        with contextlib.ExitStack() as doomed:
            first = [start(doomed, place, bootstrap=known, listen=["0.0.0.0", 7000], **quiet) for place in places]
            other, victim = (start(stack, host, bootstrap=known, **quiet) for host in (second, last))
            meet(*first, other, victim)
        start(stack, places[0], listen=["0.0.0.0", 7000], topic="another", **quiet)
        for place, manner in zip(places[1:], ("loud", "silent"), strict=True):
            stack.enter_context(place.process([sys.executable, "-c", STRANGER, manner])).expect("ready")
        cable = victim.host.interfaces[0]
        outcome = outage(victim, [other], cable.pull, cable.put_back, seconds)
        for member in (other, victim):
            member.end()
        return outcome


SCENARIOS: dict[str, Callable[[str, float], Outcome]] = {
    "cable": pull_cable,
    "upstream": drop_upstream,
    "address": change_address,
    "stopped": stop,
    "bootstraps": lose_bootstraps,
}


IN_THE_SUITE = [
    ("cable", "both", OUTAGE),
    ("upstream", "mdns", OUTAGE),
    ("address", "both", 1.0),  # a moment, as when a network is changed: the old channels are not known to be dead by then
    ("stopped", "both", OUTAGE),
    ("bootstraps", "bootstrap", OUTAGE),
]


def test_a_member_is_back_soon_after_the_network_is() -> None:
    require("nft")
    with ThreadPoolExecutor(len(IN_THE_SUITE)) as pool:  # most of it is waiting
        running = {(name, how): pool.submit(SCENARIOS[name], how, seconds) for name, how, seconds in IN_THE_SUITE}
    outcomes = {which: run.result() for which, run in running.items()}
    assert all(max(outcome.caught_up, outcome.heard) <= LIMIT for outcome in outcomes.values()), outcomes


# ---- what notices


class Reports:
    def __init__(self) -> None:
        self.all: list[str] = []
        self._news = asyncio.Event()

    def __call__(self, what: str) -> None:
        self.all.append(what)
        self._news.set()

    async def next(self) -> str:
        async with asyncio.timeout(PATIENCE):
            await self._news.wait()
        self._news.clear()
        return self.all[-1]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "LOOK_INTERVAL": 0.05,
        "STOOD_STILL": 0.3,
        "SETTLE": 0.02,
        "SHORTEST_GAP": 0.05,
        "LONGEST_GAP": 0.2,
        "FREE": 2,
    }.items():
        monkeypatch.setattr(changes, name, seconds)


@contextlib.contextmanager
def watching(reports: Reports, **options: Any) -> Iterator[Changes]:
    watch = Changes(reports, **options)
    watch.start()
    try:
        yield watch
    finally:
        watch.close()
        watch.close()


async def test_sleep_is_noticed_and_counted(hurry: None) -> None:
    reports, clock = Reports(), [5.0]
    with watching(reports, slept=lambda: clock[0], kernel=False) as watch:
        assert watch.asleep() == 5.0
        clock[0] = 5.2  # how exactly two clocks can be read: nothing
        assert watch.asleep() == 5.0
        clock[0] += 3600
        assert watch.asleep() == 3605.2
        assert await reports.next() == "the machine slept for 3600 s"


async def test_a_process_that_stood_still_notices(hurry: None) -> None:
    reports = Reports()
    with watching(reports):
        await asyncio.sleep(0.1)
        time.sleep(0.6)  # that is the point
        assert "stood still" in await reports.next()


async def test_addresses_are_compared_where_the_kernel_does_not_tell(hurry: None) -> None:
    reports, addresses = Reports(), [1]
    with watching(reports, addresses=lambda: tuple(addresses), kernel=False) as watch:
        assert not watch.kernel_tells
        addresses.append(2)
        assert await reports.next() == "addresses have changed"


async def test_a_flapping_line_is_told_of_ever_more_seldom(hurry: None) -> None:
    reports, number = Reports(), iter(range(10**6))
    with watching(reports, addresses=lambda: next(number), kernel=False):
        await asyncio.sleep(1.0)
    assert 3 <= len(reports.all) <= 8  # of some twenty


async def test_nothing_is_told_after_the_end(hurry: None) -> None:
    reports, addresses = Reports(), [1]
    with watching(reports, addresses=lambda: tuple(addresses), kernel=False) as watch:
        addresses.append(2)
        async with asyncio.timeout(PATIENCE):
            while watch._report is None:
                await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    assert not reports.all


def test_a_kernel_of_another_mind_breaks_nothing(seed: int) -> None:
    rng = random.Random(seed)
    states = changes.States()
    for _ in range(2000):
        body = rng.randbytes(rng.randrange(80))
        size, kind = rng.choice([16 + len(body), 0, 15, 2**32 - 1]), rng.choice([16, 17, 20, 21, 24, 25, 3])
        states.read(struct.pack("=IHHII", size, kind, 0, 0, 0) + body)


WATCH = """
import asyncio, sys
from solyd_swarm.discovery.changes import Changes
async def main():
    watch = Changes(lambda what: print("changed", what, flush=True))
    watch.start()
    print("ready", watch.kernel_tells, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_the_kernel_tells_of_addresses_cables_and_routes() -> None:
    require()
    with Lab() as lab:
        (host,) = lab.lan(1)
        cable = host.interfaces[0]
        with host.script(WATCH) as process:
            process.expect("ready True")
            for cause, word in [
                (cable.pull, "interface"),
                (cable.put_back, "interface"),
                (lambda: cable.add("10.0.0.9/24"), "addresses"),
                (lambda: cable.remove("10.0.0.9/24"), "addresses"),
                (lambda: host.route("default", "10.0.0.254"), "routes"),
                (cable.unplug, "interface"),
            ]:
                begun = time.monotonic()
                cause()
                process.expect(f"changed .*{word}.*")
                assert time.monotonic() - begun < 5


async def test_time_asleep_counts_as_age() -> None:
    """The loop's clock stands still while the machine sleeps; what is held grows old all the same."""
    world = World()
    asleep = [0.0]
    world.driver = Driver(world.core, TOPIC, world, world, asyncio.get_running_loop(), asleep=lambda: asleep[0])  # type: ignore[arg-type]
    world.driver.feed(Tick())
    asleep[0] = 3600.0
    world.core.answers[Tick] = lambda event: [Schedule(world.core.handled[-1][1] + 0.05)] if len(world.core.handled) < 4 else []
    world.driver.feed(Tick())
    (_, before), (_, after) = world.core.handled
    assert 3600 <= after - before < 3601
    await until(lambda: len(world.core.handled) == 4)  # and timers are due in the loop's time
    assert world.core.handled[-1][1] - after < PATIENCE
    world.driver.close()
