"""Where members of our topics were reached, kept beside the identity: a way back when every other one is gone.

A topic is named by a tag that only who knows the topic can make, so that the file says nothing of what its owner talks about. It does
hold addresses of others. Nothing here is ordered by a clock, since clocks are wrong at times: what worked later has a higher number.
"""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TypeVar

from solyd_swarm.core.keys import derive
from solyd_swarm.errors import IdentityError
from solyd_swarm.store.identity import Identity

MAX_ADDRESSES = 64
"""Addresses of one topic. The one worth least goes: one that never worked before any that did, so that whoever feeds us addresses
evicts nothing of use."""

MAX_PER_HOST = 8
"""Addresses of one topic with one host (global IPv6: one /64): a member that lets us reach it at one port after another evicts its own."""

MAX_TOPICS = 256
"""Topics with addresses; the one saved longest ago goes, lest a program that makes up topics fills the disk."""

MAX_NODES = 256
"""DHT nodes kept; the first ones of a list that is longer."""

MAX_STATE = 64 * 1024
"""Bytes of a state kept for others."""

_PROVEN = 3  # lives in which an address worked, from which on it counts as one that stays
_FAILED = 3  # failures in a row after which more make no difference: where our own network is gone everything fails

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS address (tag BLOB, host TEXT, port INTEGER, successes INTEGER NOT NULL, failures INTEGER NOT NULL,"
    " worked INTEGER NOT NULL, worked_at INTEGER NOT NULL, source TEXT NOT NULL, PRIMARY KEY (tag, host, port)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS address_topic (tag BLOB PRIMARY KEY, saved INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS node (position INTEGER PRIMARY KEY, host TEXT NOT NULL, port INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, data BLOB NOT NULL)",
)

log = logging.getLogger("solyd_swarm.store.addresses")

Address = tuple[str, int]
T = TypeVar("T")
_Row = tuple[str, int, int, int, int, int, str]


@dataclass(slots=True)
class _Entry:
    """One address.

    Attributes:
        successes: lives of ours in which a member of the topic was reached there.
        failures: vain tries since.
        worked: grows with every success of the topic; 0: it never did.
        worked_at: Unix time of the last one, for people to read.
        source: how we came to know it: ``"dialled"`` or ``"told"``.
    """

    successes: int = 0
    failures: int = 0
    worked: int = 0
    worked_at: int = 0
    source: str = "told"
    counted: bool = False  # the success of this life

    @property
    def score(self) -> tuple[bool, int, bool, int]:
        return (self.worked > 0, -min(self.failures, _FAILED), self.successes >= _PROVEN, self.worked)


@dataclass(slots=True)
class _Topic:
    tag: bytes
    entries: dict[Address, _Entry] = field(default_factory=dict)
    changed: set[Address] = field(default_factory=set)


class AddressBook:
    """The addresses of an identity's topics. `load`, `save` and the methods of nodes and states block while they use the disk and may be
    called from any thread; the others do not. Nothing here raises because of the disk: the first trouble is a WARNING.

    Args:
        identity: whose file is used; it is not closed here. None: nothing outlives the book.
        now: the wall clock, in seconds since 1970.
    """

    def __init__(self, identity: Identity | None, *, now: Callable[[], float] = time.time) -> None:
        self._identity = identity
        self._now = now
        self._lock = threading.Lock()
        self._topics: dict[bytes, _Topic] = {}
        self._is_made = False
        self._warned = False

    @property
    def outlives(self) -> bool:
        """Whether it outlives the process: whether there is a disk to use."""
        return self._identity is not None

    # -- what was learned -------------------------------------------------------------------------------------

    def succeeded(self, topic_key: bytes, host: str, port: int) -> None:
        """We dialled this address, and whoever answered is a member of the topic. Nothing else is a success."""
        with self._lock:
            topic = self._topic(topic_key)
            entry = topic.entries.setdefault((host, port), _Entry())
            entry.worked = 1 + max((other.worked for other in topic.entries.values()), default=0)
            entry.worked_at = int(min(max(self._now(), 0), 2**62))
            entry.failures = 0
            entry.source = "dialled"
            entry.successes += not entry.counted  # once in a life: a line that comes and goes proves nothing
            entry.counted = True
            self._mark(topic, (host, port))

    def heard(self, topic_key: bytes, host: str, port: int) -> None:
        """A member of the topic that dialled us from this host says that it listens at this port."""
        with self._lock:
            topic = self._topic(topic_key)
            if (host, port) not in topic.entries:
                topic.entries[host, port] = _Entry()
                self._mark(topic, (host, port))

    def failed(self, topic_key: bytes, host: str, port: int) -> None:
        """Nobody of the topic was reached there."""
        with self._lock:
            topic = self._topic(topic_key)
            entry = topic.entries.get((host, port))
            if entry is not None and entry.failures < 2 * _FAILED:
                entry.failures += 1
                topic.changed.add((host, port))

    def best(self, topic_key: bytes) -> list[Address]:
        """All addresses of a topic, the most promising first."""
        with self._lock:
            entries = self._topic(topic_key).entries
            return sorted(entries, key=lambda address: entries[address].score, reverse=True)

    def _topic(self, topic_key: bytes) -> _Topic:
        tag = address_tag(topic_key)
        topic = self._topics.get(tag)
        if topic is None:
            topic = self._topics[tag] = _Topic(tag)
        return topic

    def _mark(self, topic: _Topic, address: Address) -> None:
        topic.changed.add(address)
        _trim(topic)

    # -- the disk ---------------------------------------------------------------------------------------------

    def load(self, topic_key: bytes) -> None:
        """Reads what earlier lives learned of a topic. What this one has learned meanwhile stays."""
        tag = address_tag(topic_key)
        rows = self._try("read", lambda: self._select(tag), _NO_ROWS)
        with self._lock:
            topic = self._topic(topic_key)
            for host, port, successes, failures, worked, worked_at, source in rows:
                if not _is_address(host, port) or not all(isinstance(each, int) and each >= 0 for each in (successes, failures, worked)):
                    continue  # by a version of another mind, or a disk that lies
                old = topic.entries.get((host, port))
                if old is None:
                    topic.entries[host, port] = _Entry(successes, failures, worked, worked_at, source)
                elif not old.counted:
                    old.successes, old.worked = successes, worked
                else:
                    old.successes, old.worked = successes + 1, old.worked + worked
            _trim(topic)

    def forget(self, topic_key: bytes) -> None:
        """A topic is left, and saved: its addresses need no memory any more."""
        with self._lock:
            topic = self._topics.get(address_tag(topic_key))
            if topic is not None and not topic.changed:
                del self._topics[topic.tag]

    @property
    def is_changed(self) -> bool:
        """Whether there is something to save."""
        with self._lock:
            return self.outlives and any(topic.changed for topic in self._topics.values())

    def save(self) -> None:
        """Saves what has changed, in one transaction. What could not be saved is tried again the next time."""
        with self._lock:
            work = [
                (topic.tag, {address: _copy(topic.entries.get(address)) for address in topic.changed})
                for topic in self._topics.values()
                if topic.changed
            ]
            for topic in self._topics.values():
                topic.changed.clear()
        if work and not self._try("save", lambda: self._write(work), False):
            with self._lock:
                for tag, changes in work:
                    if tag in self._topics:
                        self._topics[tag].changed |= changes.keys()

    def _select(self, tag: bytes) -> list[_Row]:
        with self._disk() as connection:
            return connection.execute(
                "SELECT host, port, successes, failures, worked, worked_at, source FROM address WHERE tag = ? LIMIT ?",
                (tag, 4 * MAX_ADDRESSES),
            ).fetchall()

    def _write(self, work: list[tuple[bytes, dict[Address, _Entry | None]]]) -> bool:
        with self._disk() as connection:
            for tag, changes in work:
                for (host, port), entry in changes.items():
                    if entry is None:
                        connection.execute("DELETE FROM address WHERE tag = ? AND host = ? AND port = ?", (tag, host, port))
                    else:
                        row = (tag, host, port, entry.successes, entry.failures, entry.worked, entry.worked_at, entry.source)
                        connection.execute("INSERT OR REPLACE INTO address VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                connection.execute("INSERT OR REPLACE INTO address_topic SELECT ?, coalesce(max(saved), 0) + 1 FROM address_topic", (tag,))
                # Other processes may share the file, each with addresses of its own.
                connection.execute(
                    "DELETE FROM address WHERE tag = ?1 AND (host, port) NOT IN (SELECT host, port FROM address WHERE tag = ?1"
                    " ORDER BY worked > 0 DESC, min(failures, ?2) ASC, successes >= ?3 DESC, worked DESC LIMIT ?4)",
                    (tag, _FAILED, _PROVEN, MAX_ADDRESSES),
                )
            old = "SELECT tag FROM address_topic ORDER BY saved DESC LIMIT -1 OFFSET ?"
            connection.execute(f"DELETE FROM address WHERE tag IN ({old})", (MAX_TOPICS,))
            connection.execute(f"DELETE FROM address_topic WHERE tag IN ({old})", (MAX_TOPICS,))
        return True

    @contextmanager
    def _disk(self) -> Iterator[sqlite3.Connection]:
        """A transaction on a file that has our tables. Files of earlier versions lack them; those versions do not mind them."""
        assert self._identity is not None
        with self._identity.transaction() as connection:
            if not self._is_made:
                for statement in _SCHEMA:
                    connection.execute(statement)
            yield connection
        self._is_made = True

    def _try(self, what: str, work: Callable[[], T], otherwise: T) -> T:
        """Does it; where the disk refuses, or there is none to use, gives this instead."""
        if self._identity is None:
            return otherwise
        try:
            return work()
        except (IdentityError, sqlite3.Error) as error:
            log.log(logging.DEBUG if self._warned else logging.WARNING, "the address book cannot be %s: %s", _PARTICIPLE[what], error)
            self._warned = True
            return otherwise

    # -- DHT --------------------------------------------------------------------------------------------------

    def save_nodes(self, nodes: Iterable[Address]) -> None:
        """Keeps these DHT nodes, IP literal and UDP port each, instead of those kept before. The best come first."""
        wanted = [node for node in dict.fromkeys(nodes) if _is_address(*node)][:MAX_NODES]

        def write() -> None:
            with self._disk() as connection:
                connection.execute("DELETE FROM node")
                connection.executemany("INSERT INTO node VALUES (?, ?, ?)", [(place, *node) for place, node in enumerate(wanted)])

        self._try("save", write, None)

    def nodes(self) -> list[Address]:
        """The DHT nodes kept, in the order in which they were given."""

        def read() -> list[Address]:
            with self._disk() as connection:
                return connection.execute("SELECT host, port FROM node ORDER BY position LIMIT ?", (MAX_NODES,)).fetchall()

        return [node for node in self._try("read", read, _NO_NODES) if _is_address(*node)]

    def save_state(self, name: str, data: bytes) -> None:
        """Keeps some bytes under a name of ours (``"mainline"``). Raises ``ValueError`` if they are more than `MAX_STATE`."""
        if len(data) > MAX_STATE:
            raise ValueError(f"a state of {len(data)} bytes is larger than {MAX_STATE}")

        def write() -> None:
            with self._disk() as connection:
                connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, data))

        self._try("save", write, None)

    def state(self, name: str) -> bytes | None:
        """What was kept under a name."""

        def read() -> bytes | None:
            with self._disk() as connection:
                row = connection.execute("SELECT data FROM state WHERE name = ?", (name,)).fetchone()
            return bytes(row[0]) if row is not None and isinstance(row[0], bytes) and len(row[0]) <= MAX_STATE else None

        return self._try("read", read, None)


_NO_ROWS: list[_Row] = []
_NO_NODES: list[Address] = []
_PARTICIPLE = {"read": "read", "save": "saved"}


def address_tag(topic_key: bytes) -> bytes:
    """The 16 bytes under which a topic's addresses are kept."""
    return derive(topic_key, b"address book", size=16)


def _trim(topic: _Topic) -> None:
    """Down to the bounds: of a host with too many its worst, then the worst of all."""
    entries = topic.entries
    places = {address: _place(address[0]) for address in entries}
    counts = Counter(places.values())
    for address in sorted(entries, key=lambda address: entries[address].score):
        if counts[places[address]] > MAX_PER_HOST or len(entries) > MAX_ADDRESSES:
            counts[places[address]] -= 1
            del entries[address]
            topic.changed.add(address)


def _place(host: str) -> object:
    literal = host.partition("%")[0]
    try:
        ip = ip_address(literal)
    except ValueError:
        return host
    return ip_network((ip, 64), strict=False) if ip.version == 6 and ip.is_global else literal


def _copy(entry: _Entry | None) -> _Entry | None:
    return None if entry is None else _Entry(entry.successes, entry.failures, entry.worked, entry.worked_at, entry.source)


def _is_address(host: object, port: object) -> bool:
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65_536:
        return False
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
