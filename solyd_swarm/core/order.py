"""From envelopes in any order to messages in order: per author and epoch, by sequence.

A joiner's base is the lowest number it holds after its first digest round; without replay, the first one it hears live.
A gap is waited for, then given up; what comes later still is delivered as late.
"""

from collections import OrderedDict
from heapq import heappop, heappush
from typing import NamedTuple

from solyd_swarm.core.envelope import Envelope

MAX_STREAMS = 65_536
"""Bounds a flood of fresh author keys; the stream unheard of for longest is forgotten, and what waited in it delivered."""


OVERHEAD = 500
"""Bytes that an envelope which waits takes beside its body: bounds a flood of small ones."""

Key = tuple[bytes, int]
"""Author and epoch."""


class Delivery(NamedTuple):
    envelope: Envelope
    propagation_source: bytes
    late: bool


class _Stream:
    __slots__ = ("filled_at", "firsts", "gap_since", "next", "waiting")

    def __init__(self, next: int | None) -> None:
        self.next = next
        self.waiting: dict[int, tuple[Envelope, bytes, float]] = {}  # with who gave it and when, in the order in which they came
        self.firsts: list[int] = []  # of those, a heap; also of some that wait no more
        self.gap_since: float | None = None  # since when we know that a number is missing, and nothing has come of it
        self.filled_at = float("-inf")  # when what was missing last came

    def lowest(self) -> int:
        """The lowest number that waits."""
        while self.firsts[0] not in self.waiting:
            heappop(self.firsts)
        return self.firsts[0]


class Sequencer:
    """Orders what was accepted. Each envelope comes in once (the log sees to that) and goes out once.

    Args:
        replay: deliver what the window held before we joined; decides the base of each stream.
        gap_wait: seconds to wait for missing numbers (three digest periods).
        max_waiting: bytes that may wait for gaps; beyond it the gap at hand is given up at once.
    """

    def __init__(self, *, replay: bool, gap_wait: float, max_waiting: int) -> None:
        self.settled = not replay
        self._replay = replay
        self._gap_wait = gap_wait
        self._max_waiting = max_waiting
        self._waiting_bytes = 0
        self._settled_at = float("-inf")
        self._streams: OrderedDict[Key, _Stream] = OrderedDict()
        self._gaps: list[tuple[float, Key]] = []  # a heap; entries whose stream has another `gap_since` by now are stale

    def has_gap_in(self, key: Key) -> bool:
        """Whether a number of this author and epoch is missing before something that already came."""
        stream = self._streams.get(key)
        return stream is not None and stream.gap_since is not None

    @property
    def deadline(self) -> float | None:
        """When the oldest gap is to be given up."""
        key = self._oldest_gap()
        return None if key is None else self._gaps[0][0] + self._gap_wait

    def _oldest_gap(self) -> Key | None:
        while self._gaps:
            since, key = self._gaps[0]
            stream = self._streams.get(key)
            if stream is not None and stream.gap_since == since:
                return key
            heappop(self._gaps)
        return None

    def accept(self, envelope: Envelope, source: bytes, expected: int | None, now: float) -> list[Delivery]:
        """Takes in an accepted envelope and returns what can be delivered now.

        Args:
            source: the peer that gave it to us.
            expected: the number after the highest one the ledger knew before this envelope, if any.
        """
        key: Key = (envelope.author, envelope.epoch)
        delivered: list[Delivery] = []
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= MAX_STREAMS:
                delivered = self._forget_oldest()
            stream = self._streams[key] = _Stream(self._base(envelope, expected))
        else:
            self._streams.move_to_end(key)
        if stream.next is None and envelope.first == 1:
            stream.next = 1  # nothing can come before it, so the digest round need not be waited for
        if stream.next is not None:
            if envelope.first < stream.next and self.settled:
                return [*delivered, Delivery(envelope, source, True)]
            if envelope.first == stream.next and not stream.waiting:
                stream.next = envelope.last + 1
                return [*delivered, Delivery(envelope, source, False)]
        stream.waiting[envelope.first] = (envelope, source, now)
        heappush(stream.firsts, envelope.first)
        self._waiting_bytes += envelope.size + OVERHEAD
        if not self.settled:
            return delivered + (self.settle(now) if self._waiting_bytes > self._max_waiting else [])
        delivered += self._drain(key, stream, now)
        while self._waiting_bytes > self._max_waiting and (oldest := self._oldest_gap()) is not None:
            delivered += self._give_up(oldest)
        return delivered

    def _base(self, envelope: Envelope, expected: int | None) -> int | None:
        if not self._replay:
            return max(expected or 0, envelope.first)  # what was missed before is not wanted, and not waited for
        return 1 if expected is None and self.settled else expected

    def _forget_oldest(self) -> list[Delivery]:
        key, stream = next(iter(self._streams.items()))
        delivered: list[Delivery] = []
        while stream.waiting:
            delivered += self._give_up(key)
        del self._streams[key]
        return delivered

    def settle(self, now: float) -> list[Delivery]:
        """The first digest round is over: bases are known, and delivery begins."""
        if self.settled:
            return []
        self.settled = True
        self._settled_at = now
        delivered: list[Delivery] = []
        for key, stream in self._streams.items():
            if stream.next is None and stream.waiting:
                stream.next = stream.lowest()
            late = sorted(number for number in stream.waiting if number < (stream.next or 0))
            delivered += [self._release(stream, number, late=True) for number in late]
            delivered += self._drain(key, stream)
        return delivered

    def expire(self, now: float) -> list[Delivery]:
        """Gives up the gaps that were waited for long enough."""
        delivered: list[Delivery] = []
        while (key := self._oldest_gap()) is not None and self._gaps[0][0] + self._gap_wait <= now:
            delivered += self._give_up(key)
        return delivered

    def silence(self, author: bytes, epoch: int) -> None:
        """The author equivocated: what still waits is not delivered any more."""
        stream = self._streams.pop((author, epoch), None)
        if stream is not None:
            self._waiting_bytes -= sum(envelope.size + OVERHEAD for envelope, _, _ in stream.waiting.values())

    def waiting(self) -> list[Envelope]:
        """What was accepted and is not delivered yet."""
        return [envelope for stream in self._streams.values() for envelope, _, _ in stream.waiting.values()]

    def _release(self, stream: _Stream, first: int, *, late: bool) -> Delivery:
        envelope, source, _ = stream.waiting.pop(first)
        self._waiting_bytes -= envelope.size + OVERHEAD
        return Delivery(envelope, source, late)

    def _give_up(self, key: Key) -> list[Delivery]:
        stream = self._streams[key]
        stream.next = stream.lowest()
        return self._drain(key, stream)

    def _drain(self, key: Key, stream: _Stream, filled_at: float | None = None) -> list[Delivery]:
        """What can be delivered now. `filled_at`: the time, where it is because something came."""
        delivered: list[Delivery] = []
        while stream.next is not None and stream.next in stream.waiting:
            delivered.append(self._release(stream, stream.next, late=False))
            stream.next = delivered[-1].envelope.last + 1
        if not stream.waiting:
            stream.gap_since = None
            stream.firsts.clear()
            return delivered
        if delivered and filled_at is not None:
            stream.filled_at = filled_at
        # Whatever waits shows that a number is missing: the wait counts from the first of them that came, so that many gaps take no
        # longer than one; and anew when what is missing does come.
        since = max(next(iter(stream.waiting.values()))[2], stream.filled_at, self._settled_at)
        if stream.gap_since != since:
            stream.gap_since = since
            self._oldest_gap()  # of entries out of date, so that there are few
            heappush(self._gaps, (since, key))
        return delivered
