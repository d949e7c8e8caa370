"""What a DHT node stores for others, merged by slot, capped and expiring; and how much one network may ask of it."""

import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from itertools import chain, zip_longest

from kademlia.storage import IStorage

from solyd_swarm.discovery.records import SignedRecord
from solyd_swarm.discovery.scope import scope_of

SWEEP_SECONDS = 10.0
OVERHEAD = 1_400
"""Bytes charged per record on top of its own, for the objects around it; 1,040 were measured (tracemalloc, CPython 3.11) where each
record has a key to itself."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Bounds of a storage: records per key; bytes per source network and in total."""

    per_key: int = 256
    per_source: int = 512 * 1024
    total: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it is stored.

    Attributes:
        record: the verified record.
        sender: IP literal of the node that stored it here; empty: this node itself.
    """

    record: SignedRecord
    sender: str

    @property
    def size(self) -> int:
        return len(self.record.raw) + OVERHEAD


@lru_cache(4096)
def subscriber_of(ip: str) -> str:
    """What one subscriber has: an IPv4 address, or an IPv6 /64."""
    address = ip_address(ip)
    return address.packed[:8].hex() if address.version == 6 else ip


@lru_cache(4096)
def network_of(ip: str) -> str:
    """The unit that bounds are counted in, which cannot be had in any number: a global IPv4 /24, another IPv4 address, or an IPv6 /64."""
    return ip.rpartition(".")[0] if "." in ip and ":" not in ip and scope_of(ip) == "global" else subscriber_of(ip)


class RecordStorage(IStorage):  # type: ignore[misc]
    """Verified records under 20-byte keys. ``storage[key] = Entry`` merges: of one slot the highest sequence stays.

    Own records (no sender) are neither counted nor evicted nor replaced by a peer's. It must stay without ``__len__``:
    the package takes an empty, hence false, storage for none.
    """

    def __init__(self, caps: Caps | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._caps = Caps() if caps is None else caps
        self._monotonic = monotonic
        self._keys: dict[bytes, dict[bytes, tuple[Entry, float]]] = {}
        self._sources: dict[str, OrderedDict[tuple[bytes, bytes], int]] = {}
        self._bytes: Counter[str] = Counter()
        self._total = 0
        self._swept = monotonic()

    @property
    def total(self) -> int:
        """Bytes charged for the records of others."""
        return self._total

    def put(self, key: bytes, entry: Entry) -> bool:
        """Merge a record. Returns True if it is new here or newer than the one it replaces.

        The same sequence again changes nothing, its expiry included: a replay must not prolong a record's life.
        """
        self._sweep()
        now = self._monotonic()
        slots = self._keys.get(key, {})
        held = slots.get(entry.record.slot)
        newer = held is None or entry.record.sequence > held[0].record.sequence
        foreign = held is not None and bool(entry.sender) and not held[0].sender
        if held is not None and held[1] > now and (foreign or not newer):
            return False
        self._drop(key, entry.record.slot)
        if entry.sender:
            self._make_room(key, entry)
            self._charge(key, entry)
        self._keys.setdefault(key, {})[entry.record.slot] = (entry, now + entry.record.life)
        return True

    def holds(self, key: bytes, record: SignedRecord) -> bool:
        """Whether exactly this record is stored and has not expired."""
        held = self._keys.get(key, {}).get(record.slot)
        return held is not None and held[0].record.raw == record.raw and held[1] > self._monotonic()

    def entries(self, key: bytes) -> list[Entry]:
        """What is stored under a key and has not expired."""
        now = self._monotonic()
        return [entry for entry, expires in self._keys.get(key, {}).values() if expires > now]

    def sample(self, key: bytes, size: int, skips: Callable[[bytes, int], bool] | None = None) -> tuple[list[bytes], int]:
        """Random records of a key whose raw bytes, with 3 bytes of framing each, fit into ``size`` bytes; and how many there are in all.

        Random, so that whoever asks several nodes sees all of them, and no order can be bought; from each network in turn, so that one
        that stored many does not hide the others.

        Args:
            skips: called with slot and sequence of a record: whether it is left out, also of the number.
        """
        entries = self.entries(key)
        if skips is not None:
            entries = [entry for entry in entries if not skips(entry.record.slot, entry.record.sequence)]
        random.shuffle(entries)
        networks: dict[str, list[Entry]] = {}
        for entry in entries:
            networks.setdefault(network_of(entry.sender) if entry.sender else "", []).append(entry)
        chosen = []
        for entry in chain.from_iterable(zip_longest(*networks.values())):
            if entry is None:
                continue
            size -= len(entry.record.raw) + 3
            if size < 0:
                break
            chosen.append(entry.record.raw)
        return chosen, len(entries)

    def _make_room(self, key: bytes, entry: Entry) -> None:
        source = network_of(entry.sender)
        # Attack: a member invents instances to fill a topic's key. The network that holds most of this key loses its oldest there.
        others = [(slot, network_of(held.sender)) for slot, (held, _) in self._keys.get(key, {}).items() if held.sender]
        if len(others) >= self._caps.per_key:
            counts = Counter(network for _, network in others)
            counts[source] += 1
            largest = counts.most_common(1)[0][0]
            self._drop(key, next(slot for slot, network in others if network == largest))
        # Attack: one address invents keys of its own to fill the memory. It loses its own oldest records.
        while self._bytes[source] + entry.size > self._caps.per_source and self._sources.get(source):
            self._drop_oldest(source)
        # Attack: many addresses do that together. The network that holds most loses its oldest; small ones keep theirs.
        while self._total + entry.size > self._caps.total and self._total:
            self._drop_oldest(self._bytes.most_common(1)[0][0])

    def _charge(self, key: bytes, entry: Entry) -> None:
        source = network_of(entry.sender)
        self._sources.setdefault(source, OrderedDict())[key, entry.record.slot] = entry.size
        self._bytes[source] += entry.size
        self._total += entry.size

    def _drop_oldest(self, source: str) -> None:
        self._drop(*next(iter(self._sources[source])))

    def _drop(self, key: bytes, slot: bytes) -> None:
        slots = self._keys.get(key, {})
        held = slots.pop(slot, None)
        if held is None:
            return
        if not slots:
            del self._keys[key]
        if not held[0].sender:
            return
        source = network_of(held[0].sender)
        size = self._sources[source].pop((key, slot))
        self._bytes[source] -= size
        self._total -= size
        if not self._sources[source]:
            del self._sources[source], self._bytes[source]

    def _sweep(self) -> None:
        now = self._monotonic()
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        for key, slot in [(key, slot) for key, slots in self._keys.items() for slot, (_, expires) in slots.items() if expires <= now]:
            self._drop(key, slot)

    # What the package's interface asks for.

    def __setitem__(self, key: bytes, value: Entry) -> None:
        self.put(key, value)

    def __getitem__(self, key: bytes) -> list[Entry]:
        entries = self.entries(key)
        if not entries:
            raise KeyError(key)
        return entries

    def get(self, key: bytes, default: list[Entry] | None = None) -> list[Entry] | None:
        return self.entries(key) or default

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[bytes, Entry]]:
        """Nothing: this is what the package would republish, and only announcers prolong their records."""
        return iter(())

    def __iter__(self) -> Iterator[tuple[bytes, list[Entry]]]:
        return iter([(key, entries) for key in self._keys if (entries := self.entries(key))])


class RateLimit:
    """A token bucket per source network, and one for all of them together."""

    SOURCES = 4096

    def __init__(self, rate: float, burst: float, total: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            rate: requests a second that one source may make in the long run.
            burst: requests that it may make at once.
            total: requests a second, and at once, from all sources.
        """
        self._rate, self._burst, self._all = rate, burst, total
        self._monotonic = monotonic
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._rest = (total, monotonic())

    def allow(self, source: str | None) -> bool:
        """Take one token. ``source`` None is bounded by the common bucket only."""
        now = self._monotonic()
        common, then = self._rest
        common = min(self._all, common + (now - then) * self._all)
        tokens = self._burst
        if source is not None:
            tokens, then = self._buckets.pop(source, (self._burst, now))
            tokens = min(self._burst, tokens + (now - then) * self._rate)
        # A source without tokens must not use up the common ones: one flooder would silence everybody else.
        allowed = tokens >= 1 and common >= 1
        if source is not None:
            self._buckets[source] = (tokens - allowed, now)
            # Attack: forged source addresses fill the table. The one that was quiet longest is forgotten; the common bucket still holds.
            while len(self._buckets) > self.SOURCES:
                self._buckets.popitem(last=False)
        self._rest = (common - allowed, now)
        return allowed
