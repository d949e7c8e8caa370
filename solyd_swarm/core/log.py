"""What is known of a topic: ids, bodies, ages, numbers, equivocations, within the window.

Bodies are kept for the window, ids for twice as long, so that what one peer has dropped is not fetched again from
another; the ledger refuses replays after that. Retention counts an envelope's age on our own monotonic clock: nobody's
wall clock matters.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heapify, heappop, heappush

from solyd_swarm.core.envelope import Envelope, equivocate, equivocation_id
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.ordered import split_key
from solyd_swarm.core.reconcile import ItemSet
from solyd_swarm.core.wire import MAX_AGE, MAX_ROW, Item

# Ten minutes: a laptop that sleeps for a moment, or a script that is edited and started again, misses nothing.
DEFAULT_WINDOW = 600.0
# What a Raspberry Pi can spare; 100,000 messages of some hundred bytes.
DEFAULT_BYTES = 64 * 1024 * 1024
MAX_IDS = 262_144
"""Bounds a flood of small envelopes. The oldest ids go first, and `max_age` says below which age we ask for nothing."""
MAX_HEARSAY = MAX_IDS // 2
"""Of these, ids known by hearsay only, which anybody can make up: they must not take the place of what we hold. As many as a joiner
is told of, half of all it is told being past the window."""
MAX_DROPPED = 65_536
"""Ids that expired lately and are not taken back from a peer that still advertises them. The oldest go first."""


AGE_SLACK = 2.0
"""Seconds: ages leave out the time on the way."""


class Outcome(Enum):
    """What became of an envelope that was offered to the log."""

    ACCEPTED = auto()
    """New: relay and deliver it."""
    STALE = auto()
    """Said to be older than the window. Nothing but the sender's word says so, and a lie must not keep a fresh copy out: it is as
    good as the word that its body is gone."""
    EXPIRED = auto()
    """Said to be so old that even its id is of no interest."""
    DUPLICATE = auto()
    """Known by its id."""
    REFUSED = auto()
    """Replayed, or of an author and epoch that equivocated."""
    KNOWN = auto()
    """Accepted in an earlier life, and still of the window: kept for others, neither relayed nor delivered."""
    EQUIVOCATION = auto()
    """It convicts its author; `Log.get(equivocation_id(...)).proof` holds the proof."""


@dataclass(slots=True, eq=False)
class Record:
    """One id that we know. `born`: when it was published, on our own monotonic clock.

    `envelope` is None where the body is gone; `proof` is set for the item that stands for an equivocation. `stream` is
    (author, epoch); None where we know the id by hearsay only, as gone. `via`: the peer whose push brought it,
    at `heard_at`. `concealed`: our digest is to be without it, for a while.
    """

    id: bytes
    timestamp: int
    born: float
    hops: int = 0
    stream: tuple[bytes, int] | None = None
    envelope: Envelope | None = None
    proof: tuple[Envelope, Envelope] | None = None
    via: bytes = b""
    heard_at: float = 0.0
    concealed: bool = False

    @property
    def bodies_size(self) -> int:
        """Bytes of bodies that the record keeps."""
        kept = self.proof or (() if self.envelope is None else (self.envelope,))
        return sum(envelope.size for envelope in kept)


class Log:
    """The records of one topic.

    Args:
        window: seconds that bodies are kept for.
        max_bytes: bytes of bodies kept; the oldest go first.
        ledger: numbers accepted in an earlier life.
        on_drop: told of every envelope whose body leaves.
    """

    def __init__(
        self,
        *,
        window: float = DEFAULT_WINDOW,
        max_bytes: int = DEFAULT_BYTES,
        ledger: Ledger | None = None,
        on_drop: Callable[[Envelope], None] = lambda envelope: None,
    ) -> None:
        self.window = window
        self.max_bytes = max_bytes
        self.bytes = 0
        self._on_drop = on_drop
        self.items = ItemSet()
        self.ledger = ledger or Ledger()
        self._records: dict[bytes, Record] = {}
        self._by_birth: list[tuple[float, bytes]] = []
        self._bodies: list[tuple[float, int, bytes]] = []
        # Per author and epoch: (first, id) of what has a body, sorted, to find overlaps; and every id, to silence them.
        self._ranges: dict[tuple[bytes, int], list[tuple[int, bytes]]] = {}
        self._ids: dict[tuple[bytes, int], dict[bytes, None]] = {}
        self._hearsay: dict[bytes, None] = {}
        self._gone = ItemSet()  # their items
        self._dropped: OrderedDict[bytes, None] = OrderedDict()
        self._floor = float("-inf")
        self.rumours = 0
        """Counts what came to be known by hearsay only."""
        self.changes = 0
        """Counts what `holds` came to say of ever more ids."""
        self.started = float("-inf")
        """When this life began, on the clock of `now`."""

    def __len__(self) -> int:
        return len(self._records)

    def get(self, id: bytes) -> Record | None:
        return self._records.get(id)

    def records(self) -> Iterable[Record]:
        """All records, in the order in which they came."""
        return self._records.values()

    def holds(self, id: bytes) -> bool:
        """Whether there is nothing left to ask for: the body is here, or was, or is known to be too old."""
        return id in self._records or id in self._dropped

    def witnessed(self, id: bytes) -> bool:
        """As `holds`, but not on hearsay: a lie that a body is gone must not keep us from taking it of who has it."""
        record = self._records.get(id)
        return id in self._dropped if record is None else record.stream is not None

    def may_be_by(self, id: bytes, author: bytes) -> bool:
        """Whether an id is of this author, as far as we know: False only if it is known to be of another."""
        record = self._records.get(id)
        return record is None or record.stream is None or record.stream[0] == author

    def rows_of_hearsay(self) -> Iterator[tuple[Item, Item, bytes]]:
        """What is known as gone by hearsay only: first item, last item and fingerprint of rows in the digest that hold nothing else
        and no more than `MAX_ROW` ids each, the latest first."""
        gone, upper = self._gone, len(self._gone)
        while upper:
            lower = max(0, upper - MAX_ROW)
            while True:
                first, last = gone.key_at(lower), gone.key_at(upper - 1)
                start, end = self.items.index(first), self.items.index(last) + 1
                if end - start == upper - lower:
                    break
                lower = (lower + upper + 1) // 2
            yield split_key(first), split_key(last), self.items.fingerprint(start, end)
            upper = lower

    def max_age(self, now: float) -> float:
        """Seconds of age beyond which we want no body."""
        return min(self.window, now - self._floor)

    def age_ms(self, record: Record, now: float) -> int:
        """Milliseconds since publication."""
        return min(max(0, int((now - record.born) * 1000)), MAX_AGE)

    def add(self, envelope: Envelope, age: float, hops: int, now: float, *, pulled: bool = False) -> Outcome:
        """Takes in a verified envelope of `age` seconds.

        Args:
            pulled: a digest round showed it to be in a member's set; only then is what an earlier life accepted kept again.
        """
        record = self._records.get(envelope.id)
        stream = (envelope.author, envelope.epoch)
        if record is not None and (record.envelope or record.stream):
            return Outcome.DUPLICATE
        born = now - age
        if envelope.id in self._dropped or self.ledger.is_silenced(*stream):
            self.refuse(envelope.id)
            return Outcome.REFUSED
        if self._too_old(born, now):
            return Outcome.EXPIRED
        if (other := self._overlap(envelope)) is not None:
            self.convict((other, envelope), age, now)
            return Outcome.EQUIVOCATION
        refused = self.ledger.refuses(*stream, envelope.first, envelope.last)
        # What an earlier life accepted is older than this life; past one window a replay cannot claim to be that any more.
        earlier = refused and now - self.started - AGE_SLACK <= age < self.window
        if refused and not (earlier and pulled):
            if not earlier:
                self.refuse(envelope.id)
            return Outcome.REFUSED
        if age >= self.window:
            return Outcome.STALE
        if record is not None:
            # So far known by hearsay only, as gone: now that it is here, what it says itself counts.
            self._remove(record)
        if not refused:
            self.ledger.mark(*stream, envelope.first, envelope.last)
        self._insert(Record(envelope.id, envelope.time, born, hops, stream, envelope.shed()))
        insort(self._ranges.setdefault(stream, []), (envelope.first, envelope.id))
        return Outcome.KNOWN if refused else Outcome.ACCEPTED

    def add_gone(self, id: bytes, timestamp: int, age: float, now: float) -> bool:
        """Learns an id whose body is not to be had (or not wanted). False where it is known, or too old to matter.

        Of what was hearsay before, the latest word counts: by a wrong timestamp it would differ from others' for ever.
        """
        record = self._records.get(id)
        if record is not None and record.stream is None and record.timestamp != timestamp:
            self._remove(record)
        if self.holds(id) or self._too_old(now - age, now):
            return False
        self._insert(Record(id, timestamp, now - age))
        return True

    def refuse(self, id: bytes) -> None:
        """Remembers that this id is not to be asked for again."""
        self._dropped[id] = None
        self.changes += 1
        if len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)

    def convict(self, proof: tuple[Envelope, Envelope], age: float, now: float) -> bool:
        """Replaces all of an author's epoch by the one item of its equivocation. False where that was known.

        A ledger may know of it from an earlier life: then the item is taken in, but it is no news.
        """
        stream = (author, epoch) = (proof[0].author, proof[0].epoch)
        id = equivocation_id(author, epoch)
        record = self._records.get(id)
        known = self.ledger.is_silenced(author, epoch)
        # Once it has expired here it stays so: else members would go on telling it to one another at the end of its time.
        if (record is not None and record.stream is not None) or id in self._dropped:
            return False
        if record is not None:
            self._remove(record)
        self.ledger.silence(author, epoch)
        for other in list(self._ids.get(stream, ())):
            self._remove(self._records[other])
            self.refuse(other)
        # Not older than the floor: what is known of the author matters for as long as it may go on.
        born = now - age
        if self._too_old(born, now):
            born = now
        self._insert(Record(id, epoch, born, stream=stream, proof=proof))
        return not known

    def conceal(self, id: bytes) -> None:
        """Takes an id out of the digest."""
        record = self._records.get(id)
        if record is not None and not record.concealed:
            record.concealed = True
            self.items.remove(record.timestamp, id)

    def reveal(self, id: bytes) -> None:
        """Puts an id back into the digest."""
        record = self._records.get(id)
        if record is not None and record.concealed:
            record.concealed = False
            self.items.add(record.timestamp, id)

    def expire(self, now: float) -> None:
        """Drops the bodies older than the window and the ids older than two."""
        while self._bodies and self._bodies[0][0] + self.window <= now:
            self._drop_body(heappop(self._bodies)[-1])
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

    def _too_old(self, born: float, now: float) -> bool:
        """Whether even the id is of no interest: expired, or older than all that there is room for."""
        is_full = len(self._records) >= MAX_IDS and born <= self._by_birth[0][0]
        return now - born >= 2 * self.window or born <= self._floor or is_full

    def _insert(self, record: Record) -> None:
        """Makes room, then takes the record in; it stays at least until the next one comes, however old it is."""
        while len(self._records) >= MAX_IDS:
            self._floor = max(self._floor, self._by_birth[0][0])
            self._drop_oldest()
        while record.stream is None and len(self._hearsay) >= MAX_HEARSAY:
            self._remove(self._records[next(iter(self._hearsay))])
        size = record.bodies_size
        while self._bodies and self.bytes + size > self.max_bytes:
            self._drop_body(heappop(self._bodies)[-1])
        self._records[record.id] = record
        self.changes += 1
        self.items.add(record.timestamp, record.id)
        if record.stream is not None:
            self._ids.setdefault(record.stream, {})[record.id] = None
        else:
            self._hearsay[record.id] = None
            self._gone.add(record.timestamp, record.id)
            self.rumours += 1
        heappush(self._by_birth, (record.born, record.id))
        if size:
            self.bytes += size
            heappush(self._bodies, self._body_entry(record))
        # Bounds an author that convicts itself again and again: what it took away leaves entries behind.
        if max(len(self._by_birth), len(self._bodies)) > 2 * len(self._records) + 1024:
            self._by_birth = [(kept.born, kept.id) for kept in self._records.values()]
            self._bodies = [self._body_entry(kept) for kept in self._records.values() if kept.bodies_size]
            heapify(self._by_birth)
            heapify(self._bodies)

    def _body_entry(self, record: Record) -> tuple[float, int, bytes]:
        first = record.envelope.first if record.envelope is not None else 0  # what was published in one burst goes in its order
        # A proof is kept for as long as its id: whoever has not heard of it yet needs it.
        return (record.born if record.proof is None else record.born + self.window, first, record.id)

    def _remove(self, record: Record) -> None:
        self._drop_body(record.id)
        del self._records[record.id]
        if not record.concealed:
            self.items.remove(record.timestamp, record.id)
        if record.stream is None:
            self._hearsay.pop(record.id, None)
            self._gone.remove(record.timestamp, record.id)
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
            if record.stream is not None:  # hearsay that has expired must not keep the envelope itself out
                self.refuse(id)

    def _drop_body(self, id: bytes) -> None:
        record = self._records.get(id)
        if record is None:
            return
        self.bytes -= record.bodies_size
        record.proof = None
        if record.envelope is not None and record.stream is not None:
            ranges = self._ranges[record.stream]
            del ranges[bisect_left(ranges, (record.envelope.first, id))]
            if not ranges:
                del self._ranges[record.stream]
            self._on_drop(record.envelope)
            record.envelope = None
