"""From envelopes in any order to messages in order: per author and epoch, by sequence.

A joiner's base is the lowest number it holds after its first digest round; without replay, the first one it hears live.
A gap is waited for, then given up; what comes later still is delivered as late.
"""

from collections import OrderedDict
from typing import NamedTuple

from solyd_swarm.core.envelope import Envelope

MAX_STREAMS = 65_536
"""Bounds a flood of fresh author keys; the stream unheard of for longest is forgotten, and what waited in it delivered."""


class Delivery(NamedTuple):
    envelope: Envelope
    propagation_source: bytes
    late: bool


class _Stream:
    __slots__ = ("gap_since", "next", "waiting")

    def __init__(self, next: int | None) -> None:
        self.next = next
        self.waiting: dict[int, tuple[Envelope, bytes]] = {}
        self.gap_since: float | None = None


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
        self._streams: OrderedDict[tuple[bytes, int], _Stream] = OrderedDict()
        self._gaps: OrderedDict[tuple[bytes, int], _Stream] = OrderedDict()

    @property
    def has_gap(self) -> bool:
        """Whether a number is missing before something that already came."""
        return bool(self._gaps)

    @property
    def deadline(self) -> float | None:
        """When the oldest gap is to be given up."""
        for stream in self._gaps.values():
            assert stream.gap_since is not None
            return stream.gap_since + self._gap_wait
        return None

    def accept(self, envelope: Envelope, source: bytes, expected: int | None, now: float) -> list[Delivery]:
        """Takes in an accepted envelope and returns what can be delivered now.

        Args:
            source: the peer that gave it to us.
            expected: the number after the highest one the ledger knew before this envelope, if any.
        """
        key = (envelope.author, envelope.epoch)
        delivered: list[Delivery] = []
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= MAX_STREAMS:
                delivered = self._forget_oldest(now)
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
        stream.waiting[envelope.first] = (envelope, source)
        self._waiting_bytes += envelope.size
        if not self.settled:
            return delivered + (self.settle(now) if self._waiting_bytes > self._max_waiting else [])
        delivered += self._drain(key, stream, now)
        while self._waiting_bytes > self._max_waiting and self._gaps:
            delivered += self._give_up(*next(iter(self._gaps.items())), now)
        return delivered

    def _base(self, envelope: Envelope, expected: int | None) -> int | None:
        if not self._replay:
            return max(expected or 0, envelope.first)  # what was missed before is not wanted, and not waited for
        return 1 if expected is None and self.settled else expected

    def _forget_oldest(self, now: float) -> list[Delivery]:
        key, stream = next(iter(self._streams.items()))
        delivered: list[Delivery] = []
        while stream.waiting:
            delivered += self._give_up(key, stream, now)
        del self._streams[key]
        return delivered

    def settle(self, now: float) -> list[Delivery]:
        """The first digest round is over: bases are known, and delivery begins."""
        if self.settled:
            return []
        self.settled = True
        delivered: list[Delivery] = []
        for key, stream in self._streams.items():
            if stream.next is None and stream.waiting:
                stream.next = min(stream.waiting)
            late = sorted(number for number in stream.waiting if number < (stream.next or 0))
            delivered += [self._release(stream, number, late=True) for number in late]
            delivered += self._drain(key, stream, now)
        return delivered

    def expire(self, now: float) -> list[Delivery]:
        """Gives up the gaps that were waited for long enough."""
        delivered: list[Delivery] = []
        while (deadline := self.deadline) is not None and deadline <= now:
            delivered += self._give_up(*next(iter(self._gaps.items())), now)
        return delivered

    def silence(self, author: bytes, epoch: int) -> None:
        """The author equivocated: what still waits is not delivered any more."""
        stream = self._streams.pop((author, epoch), None)
        if stream is not None:
            self._gaps.pop((author, epoch), None)
            self._waiting_bytes -= sum(envelope.size for envelope, _ in stream.waiting.values())

    def waiting(self) -> list[Envelope]:
        """What was accepted and is not delivered yet."""
        return [envelope for stream in self._streams.values() for envelope, _ in stream.waiting.values()]

    def _release(self, stream: _Stream, first: int, *, late: bool) -> Delivery:
        envelope, source = stream.waiting.pop(first)
        self._waiting_bytes -= envelope.size
        return Delivery(envelope, source, late)

    def _give_up(self, key: tuple[bytes, int], stream: _Stream, now: float) -> list[Delivery]:
        stream.next = min(stream.waiting)
        return self._drain(key, stream, now)

    def _drain(self, key: tuple[bytes, int], stream: _Stream, now: float) -> list[Delivery]:
        delivered: list[Delivery] = []
        while stream.next is not None and stream.next in stream.waiting:
            delivered.append(self._release(stream, stream.next, late=False))
            stream.next = delivered[-1].envelope.last + 1
        if not stream.waiting:
            stream.gap_since = None
            self._gaps.pop(key, None)
        elif delivered or stream.gap_since is None:
            # A new gap waits its own time: at the end of the queue, which stays sorted by `gap_since`.
            stream.gap_since = now
            self._gaps.pop(key, None)
            self._gaps[key] = stream
        return delivered
