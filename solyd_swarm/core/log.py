"""What is known of a topic: ids, bodies, ages, numbers, equivocations, within the window.

Bodies are kept for the window, ids for twice as long, so that what one peer has dropped is not fetched again from
another; the ledger refuses replays after that. Retention counts an envelope's age on our own monotonic clock: nobody's
wall clock matters.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heappop, heappush

from solyd_swarm.core.envelope import Envelope, equivocate, equivocation_id
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.reconcile import ItemSet

DEFAULT_WINDOW = 600.0
DEFAULT_BYTES = 64 * 1024 * 1024
MAX_IDS = 262_144
"""Bounds a flood of small envelopes. The oldest ids go first, and `max_age` says below which age we ask for nothing."""
MAX_DROPPED = 65_536
"""Ids that expired lately and are not taken back from a peer that still advertises them. The oldest go first."""


class Outcome(Enum):
    """What became of an envelope that was offered to the log."""

    ACCEPTED = auto()
    """New: relay and deliver it."""
    STALE = auto()
    """Said to be older than the window: its id is known now, its body neither kept nor delivered."""
    EXPIRED = auto()
    """Said to be so old that even its id is of no interest."""
    DUPLICATE = auto()
    """Known by its id."""
    REFUSED = auto()
    """Replayed, or of an author and epoch that equivocated."""
    EQUIVOCATION = auto()
    """It convicts its author; `Log.get(equivocation_id(...)).proof` holds the proof."""


@dataclass(slots=True, eq=False)
class Record:
    """One id that we know. `born`: when it was published, on our own monotonic clock.

    `envelope` is None where the body is gone; `proof` is set for the item that stands for an equivocation.
    """

    id: bytes
    timestamp: int
    born: float
    hops: int = 0
    stream: tuple[bytes, int] | None = None
    envelope: Envelope | None = None
    proof: tuple[Envelope, Envelope] | None = None


class Log:
    """The records of one topic.

    Args:
        window: seconds that bodies are kept for.
        max_bytes: bytes of bodies kept; the oldest go first.
        ledger: numbers accepted in an earlier life.
    """

    def __init__(self, *, window: float = DEFAULT_WINDOW, max_bytes: int = DEFAULT_BYTES, ledger: Ledger | None = None) -> None:
        self.window = window
        self.max_bytes = max_bytes
        self.bytes = 0
        self.items = ItemSet()
        self.ledger = ledger or Ledger()
        self._records: dict[bytes, Record] = {}
        self._by_birth: list[tuple[float, bytes]] = []
        self._bodies: list[tuple[float, bytes]] = []
        # Per author and epoch: (first, id) of what has a body, sorted, to find overlaps; and every id, to silence them.
        self._ranges: dict[tuple[bytes, int], list[tuple[int, bytes]]] = {}
        self._ids: dict[tuple[bytes, int], dict[bytes, None]] = {}
        self._dropped: OrderedDict[bytes, None] = OrderedDict()
        self._floor = float("-inf")

    def __len__(self) -> int:
        return len(self._records)

    def get(self, id: bytes) -> Record | None:
        return self._records.get(id)

    def holds(self, id: bytes) -> bool:
        """Whether there is nothing left to ask for: the body is here, or was, or is known to be too old."""
        return id in self._records or id in self._dropped

    def max_age(self, now: float) -> float:
        """Seconds of age beyond which we want no body."""
        return min(self.window, now - self._floor)

    def age_ms(self, record: Record, now: float) -> int:
        """Milliseconds since publication."""
        return max(0, int((now - record.born) * 1000))

    def add(self, envelope: Envelope, age: float, hops: int, now: float) -> Outcome:
        """Takes in a verified envelope of `age` seconds."""
        record = self._records.get(envelope.id)
        stream = (envelope.author, envelope.epoch)
        if record is not None and (record.envelope or record.stream):
            return Outcome.DUPLICATE
        born = now - age
        if envelope.id in self._dropped or self.ledger.is_silenced(*stream):
            return Outcome.REFUSED
        if age >= 2 * self.window or born <= self._floor:
            return Outcome.EXPIRED
        if (other := self._overlap(envelope)) is not None:
            self.convict((other, envelope), age, now)
            return Outcome.EQUIVOCATION
        if self.ledger.refuses(*stream, envelope.first, envelope.last):
            return Outcome.REFUSED
        if age >= self.window:
            # As hearsay: nothing but the sender's word says so, and a lie must not keep a fresh copy out.
            self.add_gone(envelope.id, envelope.time, age, now)
            return Outcome.STALE
        if record is not None:
            # So far known by hearsay only, as gone: now that it is here, what it says itself counts.
            self._remove(record)
        self.ledger.mark(*stream, envelope.first, envelope.last)
        record = Record(envelope.id, envelope.time, born, hops, stream)
        self._insert(record)
        record.envelope = envelope
        self.bytes += envelope.size
        insort(self._ranges.setdefault(stream, []), (envelope.first, envelope.id))
        heappush(self._bodies, (born, envelope.id))
        self._evict_bodies()
        return Outcome.ACCEPTED

    def add_gone(self, id: bytes, timestamp: int, age: float, now: float) -> bool:
        """Learns an id whose body is not to be had (or not wanted). False where it is known, or too old to matter."""
        if self.holds(id) or age >= 2 * self.window or now - age <= self._floor:
            return False
        self._insert(Record(id, timestamp, now - age))
        return True

    def refuse(self, id: bytes) -> None:
        """Remembers that this id is not to be asked for again."""
        self._dropped[id] = None
        if len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)

    def convict(self, proof: tuple[Envelope, Envelope], age: float, now: float) -> bool:
        """Replaces all of an author's epoch by the one item of its equivocation. False where that was known."""
        author, epoch = proof[0].author, proof[0].epoch
        if self.ledger.is_silenced(author, epoch):
            return False
        self.ledger.silence(author, epoch)
        for id in list(self._ids.get((author, epoch), ())):
            self._remove(self._records[id])
            self.refuse(id)
        self._insert(Record(equivocation_id(author, epoch), epoch, now - age, proof=proof))
        return True

    def expire(self, now: float) -> None:
        """Drops the bodies older than the window and the ids older than two."""
        while self._bodies and self._bodies[0][0] + self.window <= now:
            self._drop_body(heappop(self._bodies)[1])
        while self._by_birth and self._by_birth[0][0] + 2 * self.window <= now:
            self._drop_oldest()

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next."""
        times = [self._bodies[0][0] + self.window] if self._bodies else []
        times += [self._by_birth[0][0] + 2 * self.window] if self._by_birth else []
        return min(times, default=None)

    def _overlap(self, envelope: Envelope) -> Envelope | None:
        ranges = self._ranges.get((envelope.author, envelope.epoch))
        if not ranges:
            return None
        place = bisect_left(ranges, (envelope.first, b""))
        for index in (place - 1, place):
            if 0 <= index < len(ranges):
                other = self._records[ranges[index][1]].envelope
                if other is not None and equivocate(other, envelope):
                    return other
        return None

    def _insert(self, record: Record) -> None:
        self._records[record.id] = record
        self.items.add(record.timestamp, record.id)
        if record.stream is not None:
            self._ids.setdefault(record.stream, {})[record.id] = None
        heappush(self._by_birth, (record.born, record.id))
        while len(self._records) > MAX_IDS:
            self._floor = max(self._floor, self._by_birth[0][0])
            self._drop_oldest()

    def _remove(self, record: Record) -> None:
        self._drop_body(record.id)
        del self._records[record.id]
        self.items.remove(record.timestamp, record.id)
        if record.stream is not None:
            ids = self._ids[record.stream]
            del ids[record.id]
            if not ids:
                del self._ids[record.stream]

    def _drop_oldest(self) -> None:
        born, id = heappop(self._by_birth)
        record = self._records.get(id)
        # A record that came back with another birth has a heap entry of its own.
        if record is not None and record.born == born:
            self._remove(record)
            self.refuse(id)

    def _drop_body(self, id: bytes) -> None:
        record = self._records.get(id)
        if record is None or record.envelope is None or record.stream is None:
            return
        self.bytes -= record.envelope.size
        ranges = self._ranges[record.stream]
        del ranges[bisect_left(ranges, (record.envelope.first, id))]
        if not ranges:
            del self._ranges[record.stream]
        record.envelope = None

    def _evict_bodies(self) -> None:
        while self.bytes > self.max_bytes and len(self._bodies) > 1:
            self._drop_body(heappop(self._bodies)[1])
