"""Notices that the network changed, that the machine slept, or that the process stood still.

The kernel tells of addresses, carriers and routes (Linux: rtnetlink(7)); elsewhere the list of addresses is compared every few
seconds. Sleep shows as two clocks drifting apart: one counts it, the other does not. A process that was stopped finds itself late.
"""

import asyncio
import errno
import logging
import socket
import struct
import sys
import time
from collections.abc import Callable
from math import inf

from solyd_swarm.discovery.interfaces import local_addresses
from solyd_swarm.errors import InterfaceError

LOOK_INTERVAL = 2.0
"""Seconds between looks at the clocks, and at the addresses where the kernel does not tell."""

SLEPT = 1.0
"""Seconds of sleep that count."""

STOOD_STILL = 5.0
"""Seconds of standing still that count: half of what makes a channel silent."""

SETTLE = 0.2
"""Seconds after the first of several events: a cable that is plugged in brings a carrier, an address and a route."""

SHORTEST_GAP, LONGEST_GAP, FREE = 1.0, 10.0, 8
"""Seconds between two reports. After so many in a row they double: a flapping line, or a router that floods us with routes, costs
little."""

_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE = 16, 17, 20, 21, 24, 25
_RUNNING = 0x1 | 0x10000  # IFF_UP, IFF_LOWER_UP
_NOT_USABLE = 0x08 | 0x40  # IFA_F_DADFAILED, IFA_F_TENTATIVE
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_MAIN_TABLE, _UNICAST, _CLONED = 254, 1, 0x200
_HEADER, _LINK, _ADDRESS, _ROUTE, _ATTRIBUTE = (struct.Struct(form) for form in ("=IHHII", "=BxHiII", "=BBBBI", "=BBBBBBBBI", "=HH"))
_MAX_STATES = 8192  # interfaces and addresses remembered; a machine that has more is taken to have changed

_CLOCK_WITH_SLEEP: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))

log = logging.getLogger("solyd_swarm.discovery.changes")


def slept() -> float:
    """Seconds, from some beginning on, that the machine has slept and that ``time.monotonic`` does not count.

    Linux: CLOCK_BOOTTIME counts them (clock_gettime(2)); macOS: CLOCK_MONOTONIC does, while Python's clock is mach_absolute_time.
    """
    return 0.0 if _CLOCK_WITH_SLEEP is None else time.clock_gettime(_CLOCK_WITH_SLEEP) - time.monotonic()


def present_hosts() -> frozenset[str]:
    """All unicast addresses configured here, as IP literals without zones; empty if the system cannot be asked."""
    try:
        return frozenset(str(address.ip) for address in local_addresses())
    except InterfaceError:
        return frozenset()


class Changes:
    """Calls ``changed`` with a few words of what happened, on the loop, a moment after it did. Runs from `start` to `close`.

    Args:
        changed: told of it; must be cheap to call now and then.
        slept: counts the seconds that the machine slept.
        addresses: what is compared where the kernel does not tell.
        kernel: whether to ask the kernel to tell.
    """

    def __init__(
        self,
        changed: Callable[[str], None],
        *,
        slept: Callable[[], float] = slept,
        addresses: Callable[[], object] = present_hosts,
        kernel: bool = True,
    ) -> None:
        self._changed = changed
        self._slept = slept
        self._addresses = addresses
        self._kernel = kernel
        self._asleep = slept()
        self._seen_asleep = self._asleep
        self._seen: object = None
        self._socket: socket.socket | None = None
        self._states = States()
        self._timer: asyncio.TimerHandle | None = None
        self._report: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._reported_at = -inf
        self._streak = 0
        self._what: dict[str, None] = {}

    def asleep(self) -> float:
        """Seconds of sleep so far, which the loop's clock has not counted. It only changes by sleep, not by how exactly clocks are read."""
        now = self._slept()
        if abs(now - self._asleep) > SLEPT / 2:
            self._asleep = now
        return self._asleep

    @property
    def kernel_tells(self) -> bool:
        """Whether the kernel tells of changes, so that nothing is compared."""
        return self._socket is not None

    def start(self) -> None:
        """Begins to watch; on the loop. Cannot fail: where the kernel refuses to tell, addresses are compared."""
        loop = asyncio.get_running_loop()
        if self._kernel:
            self._socket = _subscribe()
        if self._socket is not None:
            loop.add_reader(self._socket.fileno(), self._read)
        else:
            self._seen = self._addresses()
        self._due = loop.time() + LOOK_INTERVAL
        self._timer = loop.call_at(self._due, self._look)

    def close(self) -> None:
        """Nothing is told any more. Idempotent."""
        for timer in (self._timer, self._report):
            if timer is not None:
                timer.cancel()
        self._timer = self._report = None
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        late = now - self._due
        self._due = now + LOOK_INTERVAL
        self._timer = loop.call_at(self._due, self._look)
        asleep = self.asleep()
        if asleep - self._seen_asleep > SLEPT:
            self._note(f"the machine slept for {asleep - self._seen_asleep:.0f} s")
        self._seen_asleep = asleep
        if late > STOOD_STILL:
            self._note(f"the process stood still for {late:.0f} s")
        if self._socket is None:
            addresses = self._addresses()
            if addresses != self._seen:
                self._seen = addresses
                self._note("addresses have changed")

    def _read(self) -> None:
        assert self._socket is not None
        try:
            while True:
                data, sender = self._socket.recvfrom(65_536)
                for what in self._states.read(data) if sender[0] == 0 else ():  # from others than the kernel: any program may write to us
                    self._note(what)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ENOBUFS:  # so much has happened that some of it was lost
                self._note("much has changed")
                return
            log.debug("the kernel tells of no more changes, addresses are compared instead: %s", error)
            self._stop_reading()
            self._seen = self._addresses()

    def _note(self, what: str) -> None:
        self._what[what] = None
        if self._report is not None:
            return
        loop = asyncio.get_running_loop()
        since = loop.time() - self._reported_at
        self._streak = 0 if since >= 2 * LONGEST_GAP else self._streak + 1
        gap = min(SHORTEST_GAP * 2 ** min(max(0, self._streak - FREE), 10), LONGEST_GAP)
        self._report = loop.call_later(max(SETTLE, gap - since), self._tell)

    def _tell(self) -> None:
        self._report = None
        self._reported_at = asyncio.get_running_loop().time()
        what, self._what = ", ".join(self._what), {}
        log.debug("changed: %s", what)
        self._changed(what)


class States:
    """What the kernel has told of interfaces and addresses, so that what it only repeats is no change."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def read(self, data: bytes) -> list[str]:
        """The changes that a datagram of the rtnetlink socket tells of, in words."""
        found: dict[str, None] = {}
        at = 0
        while at + _HEADER.size <= len(data):
            size, kind, *_ = _HEADER.unpack_from(data, at)
            if size < _HEADER.size:
                break
            what = self._message(kind, data[at + _HEADER.size : at + size])
            if what:
                found[what] = None
            at += (size + 3) & ~3
        return list(found)

    def _message(self, kind: int, body: bytes) -> str:
        if kind in (_NEWLINK, _DELLINK) and len(body) >= _LINK.size:
            family, _, index, flags, _ = _LINK.unpack_from(body)
            # Other families tell the bridge's or the protocol's view of the same interface.
            if family == socket.AF_UNSPEC and self._differs(index, flags & _RUNNING if kind == _NEWLINK else -1):
                return "an interface has come or gone"
        elif kind in (_NEWADDR, _DELADDR) and len(body) >= _ADDRESS.size:
            family, _, flags, _, index = _ADDRESS.unpack_from(body)
            key = (index, family, *_attributes(body[_ADDRESS.size :], (_IFA_ADDRESS, _IFA_LOCAL)))
            if self._differs(key, flags & _NOT_USABLE if kind == _NEWADDR else -1):
                return "addresses have changed"
        elif kind in (_NEWROUTE, _DELROUTE) and len(body) >= _ROUTE.size:
            _, _, _, _, table, _, _, type_, flags = _ROUTE.unpack_from(body)
            if table == _MAIN_TABLE and type_ == _UNICAST and not flags & _CLONED:
                return "routes have changed"
        return ""

    def _differs(self, key: object, state: int) -> bool:
        if state == -1:
            self._known.pop(key, None)
            return True
        if len(self._known) > _MAX_STATES:
            self._known.clear()
        was = self._known.get(key)
        self._known[key] = state
        return was != state


def _attributes(data: bytes, wanted: tuple[int, ...]) -> list[bytes]:
    found = []
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size:
            break
        if kind in wanted:
            found.append(data[at + _ATTRIBUTE.size : at + size])
        at += (size + 3) & ~3
    return found


def _subscribe() -> socket.socket | None:
    """A socket on which the kernel tells of changes; None where it does not."""
    if sys.platform != "linux":
        return None
    subscription = None
    try:
        subscription = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        subscription.bind((0, _GROUPS))
    except (OSError, AttributeError) as error:  # in a sandbox, perhaps
        log.debug("the kernel does not tell of changes, addresses are compared instead: %s", error)
        if subscription is not None:
            subscription.close()
        return None
    return subscription
