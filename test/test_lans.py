"""Two halves that formed apart become one swarm: LANs whose members found each other there, and then a way from one to the other.

`bench/healing.py` repeats this and tells the distribution.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hosts import Host, Lab, require
from test_change import Member, meet, start

LIMIT = 45.0
"""Seconds from when there is a way to when every message of either half is everywhere."""


@dataclass(frozen=True)
class Healed:
    """Seconds from when there was a way."""

    first: float
    """One message crossed."""
    everything: float
    """All that was published before is everywhere."""
    talk: float
    """A message of each member, published then, is everywhere."""


def heal(halves: list[list[Member]], connect: Callable[[], object], apart: float) -> Healed:
    """Each half talks by itself for a while; then there is a way."""
    spoken: list[list[str]] = [[], []]
    until = time.monotonic() + apart
    while True:
        for half, own, name in zip(halves, spoken, "ab", strict=True):
            own.append(f"half {name} {len(own)}")
            half[len(own) % len(half)].publish(own[-1])
        if (left := until - time.monotonic()) <= 0:
            break
        threading.Event().wait(min(left, 1.0))
    connect()
    there = time.monotonic()
    crossed = [member.wait_for(*foreign) for half, foreign in zip(halves, reversed(spoken), strict=True) for member in half]
    talked = meet(*halves[0], *halves[1], word="after")
    first = min(member.got[text] for half, foreign in zip(halves, reversed(spoken), strict=True) for member in half for text in foreign)
    return Healed(first - there, max(crossed) - there, talked - there)


def two_lans(lab: Lab, count: int) -> tuple[list[list[Host]], Callable[[], object]]:
    """Two LANs whose hosts send all else to a router that is not there yet; and what puts it there."""
    lans = []
    router = lab.host()
    router.forward()
    cables = []
    for network in ("10.1.0", "10.2.0"):
        bridge = lab.bridge()
        hosts = [lab.host() for _ in range(count)]
        for number, host in enumerate(hosts, 1):
            host.plug(bridge, f"{network}.{number}/24", gateway=f"{network}.254")
        cables.append(router.plug(bridge, f"{network}.254/24").pull())
        lans.append(hosts)
    return lans, lambda: [cable.put_back() for cable in cables]


def two_switches(lab: Lab, count: int) -> tuple[list[list[Host]], Callable[[], object]]:
    """One network on two switches; and what joins them by a cable. No host's interface tells of that."""
    bridges = [lab.bridge(), lab.bridge()]
    lans = [[lab.host() for _ in range(count)] for _ in bridges]
    number = 0
    for bridge, hosts in zip(bridges, lans, strict=True):
        for host in hosts:
            number += 1
            host.plug(bridge, f"10.3.0.{number}/24")
    return lans, lambda: lab.join(*bridges)


def heal_lans(count: int, apart: float) -> Healed:
    """By an address of the other LAN, which one member on each side was given, and which leads nowhere at first."""
    with Lab() as lab, contextlib.ExitStack() as stack:
        lans, connect = two_lans(lab, count)
        halves = []
        for hosts, other in zip(lans, ("10.2.0.1:7000", "10.1.0.1:7000"), strict=True):
            first = start(stack, hosts[0], bootstrap=other, listen=["0.0.0.0", 7000])
            halves.append([first, *(start(stack, host) for host in hosts[1:])])
        return _heal(halves, connect, apart)


def heal_switches(count: int, apart: float) -> Healed:
    """By mDNS, whose questions reach both halves when they are on one network."""
    with Lab() as lab, contextlib.ExitStack() as stack:
        lans, connect = two_switches(lab, count)
        halves = [[start(stack, host) for host in hosts] for hosts in lans]
        return _heal(halves, connect, apart)


def _heal(halves: list[list[Member]], connect: Callable[[], object], apart: float) -> Healed:
    for name, half in zip("ab", halves, strict=True):
        meet(*half, word=f"hello {name}")
    healed = heal(halves, connect, apart)
    for member in (*halves[0], *halves[1]):
        member.end()
    return healed


WAYS: dict[str, Callable[[int, float], Healed]] = {"router": heal_lans, "switches": heal_switches}


@pytest.mark.parametrize("way", WAYS)
def test_two_halves_that_formed_apart_become_one(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require()
    monkeypatch.setattr("processes.PATIENCE", LIMIT)
    healed = WAYS[way](3, 3.0)
    assert healed.everything <= LIMIT, healed
    assert healed.talk <= LIMIT, healed
