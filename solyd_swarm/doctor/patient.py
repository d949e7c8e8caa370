"""The node that the doctor watches at work, and what it is examined with."""

import asyncio
import errno
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from solyd_swarm.discovery.interfaces import LocalAddress, usable_interfaces
from solyd_swarm.discovery.source import Address, Candidate
from solyd_swarm.errors import InterfaceError
from solyd_swarm.node import BaseNode, NodeOptions
from solyd_swarm.swarm import Swarm
from solyd_swarm.ticket import Contact, parse_bootstrap

MAX_CANDIDATES = 256
"""Candidates remembered of a source: bounds one that floods us. The oldest goes; how many there were is counted all the same."""

MAX_FAILED = 256
"""Addresses remembered whose dials failed; the oldest goes."""


class Seen(Protocol):
    """What neighbours say of our address: `solyd_swarm.net.observed.Observed`."""

    def public_host(self, version: int) -> str: ...


class Mapper(Protocol):
    """Keeps a port of the router open for us: `solyd_swarm.discovery.portmap.PortMapper`."""

    @property
    def state(self) -> str: ...

    @property
    def external(self) -> Address | None: ...


class Patient(BaseNode):
    """A node that notes which source has found whom."""

    def __init__(self, options: NodeOptions) -> None:
        self.options = options
        self.candidates: dict[str, OrderedDict[tuple[str, ...], Candidate]] = {}
        super().__init__(options)

    def finders(self, address: str) -> tuple[str, ...]:
        """The sources that have found somebody at an address; or, as whoever dials us comes from another port, at its host."""
        places = {source: [place for each in found.values() for place in each.addresses] for source, found in self.candidates.items()}
        host = address.rpartition(":")[0].strip("[]")
        at = [source for source, found in places.items() if address in map(str, found)]
        return tuple(sorted(at or [source for source, found in places.items() if host in {place.host for place in found}]))

    def own_addresses(self) -> list[str]:
        """The IP literals of this machine that are listened at, whether or not others hear of them."""
        return [host for host, _ in self._reach.addresses()]

    def may_go_to(self, host: str) -> bool:
        """Whether packets for an IP literal leave by an interface that is allowed."""
        return self._reach.may_go_to(host)

    def _found(self, topic_key: bytes, candidate: Candidate) -> None:
        if candidate.instance != self.endpoint.instance:
            known = self.candidates.setdefault(candidate.source, OrderedDict())
            known[tuple(map(str, candidate.addresses))] = candidate
            while len(known) > MAX_CANDIDATES:
                known.popitem(last=False)
        super()._found(topic_key, candidate)


def parts_of(node: BaseNode) -> tuple[Mapper | None, Seen | None]:
    """The port mapper and the observed addresses; None for what this node does not have."""
    return node.finder.mapper, node.endpoint.outside.observed


@dataclass
class Examination:
    """What the checks look at.

    Attributes:
        node: at work, until the end.
        seconds: how long is listened.
        contacts: the bootstrap addresses given.
        swarm: of the topic, if one was given.
        met: the addresses of the neighbours met, by their ids; the latter are told to nobody.
        dials: why dials failed, by address.
        over: set when the time is up: what took its time can be read then.
    """

    node: Patient
    seconds: float
    contacts: tuple[Contact, ...]
    swarm: Swarm | None = None
    met: dict[str, str] = field(default_factory=dict)
    dials: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, node: Patient, seconds: float) -> "Examination":
        return cls(node, seconds, parse_bootstrap(node.options.bootstrap))

    @property
    def limited(self) -> bool:
        """Whether the user named the interfaces that may be used."""
        return bool(self.node.options.allowed_interfaces())

    def local(self) -> list[LocalAddress]:
        """The addresses that may be used; none where there are none."""
        try:
            return usable_interfaces(self.node.options.allowed_interfaces())
        except InterfaceError:
            return []

    def outward(self) -> list[LocalAddress]:
        """Those that are not loopback."""
        return [address for address in self.local() if not address.ip.is_loopback]


class _Listener(logging.Filter):
    """Reads what the dialler logs, and lets pass what would have been logged without us."""

    def __init__(self, dials: OrderedDict[tuple[str, int], str], level: int) -> None:
        super().__init__()
        self._dials = dials
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        match record.args:
            case (str(host), int(port), error) if record.msg.startswith("dialling "):
                self._dials[host, port] = reason_of(error)
                self._dials.move_to_end((host, port))
                while len(self._dials) > MAX_FAILED:
                    self._dials.popitem(last=False)
        return record.levelno >= self._level


@contextmanager
def noting_dials(dials: OrderedDict[tuple[str, int], str]) -> Iterator[None]:
    """Notes the dials that fail, with the reasons; the dialler tells them to its log alone."""
    logger = logging.getLogger("solyd_swarm.net.dialler")
    own_level, listener = logger.level, _Listener(dials, logger.getEffectiveLevel())
    logger.addFilter(listener)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(own_level)
        logger.removeFilter(listener)


_REASONS = {
    errno.ECONNREFUSED: "refused: no program listens there now, or a firewall rejects",
    errno.EHOSTUNREACH: "that host does not answer",
    errno.ENETUNREACH: "no route leads there",
    errno.ECONNRESET: "the connection was cut",
    errno.EPERM: "this machine's firewall does not let it out",
    errno.EACCES: "this machine's firewall does not let it out",
}
NO_ANSWER = "no answer: a firewall drops it, or nobody is there"


def reason_of(error: Any) -> str:
    """Why a connection did not come about, in words."""
    if isinstance(error, TimeoutError):
        return NO_ANSWER
    if isinstance(error, OSError) and error.errno is not None:
        return _REASONS.get(error.errno, error.strerror or "it failed")
    return str(error) or type(error).__name__


def families(addresses: Sequence[LocalAddress]) -> list[int]:
    """4 and 6, as far as they are there."""
    return sorted({address.ip.version for address in addresses})
