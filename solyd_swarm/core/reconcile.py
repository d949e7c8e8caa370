"""Anti-entropy: range-based set reconciliation, Negentropy Protocol V1 on the wire.

The specification is ``docs/negentropy-protocol-v1.md`` of hoytech/negentropy (NIP-77 carries the same messages); the
method is Aljoscha Meyer's "Range-Based Set Reconciliation" (SRDS 2023). The initiator learns which ids only it has
(``have``) and which only the other has (``need``); the responder learns nothing and keeps nothing between messages.

Each message is answered from the set as it is at that moment, by positions that live no longer than the call. So the
sets may change between messages: nothing breaks, what a change hid is found by the next conversation.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from solyd_swarm.core.ordered import (
    FINGERPRINT_SIZE,
    ID_SIZE,
    INFINITY,
    TIMESTAMP_SIZE,
    ItemSet,
    encode_varint,
    fingerprint,
    split_key,
)
from solyd_swarm.errors import RemoteProtocolError

__all__ = [
    "MAX_MESSAGE_SIZE",
    "MAX_RANGES",
    "MAX_REMEMBERED",
    "MIN_FRAME_SIZE",
    "PROTOCOL_VERSION",
    "ItemSet",
    "Negentropy",
    "Reconciliation",
]

PROTOCOL_VERSION = 0x61
"""The first byte of every message: version 1, the highest (and only) one spoken here."""

MAX_MESSAGE_SIZE = 1 << 20
"""Bytes. Longer queries are refused, before any work; no reply gets longer, so that members of this library always agree."""

MAX_RANGES = 16_384
"""Ranges in one message, in either direction.

A range can be three bytes long and costs a search, so without this a flood of tiny ranges would buy the most work for
the fewest bytes. With both limits a query costs O(ranges * log n + bytes in + bytes out); for the initiator, who lists
what it has and the other claims to lack, also O(n), once for each message that it sent itself."""

MAX_REMEMBERED = 65_536
"""Ids that an initiator remembers, until the conversation ends, to report each once although a limited message may make
both sides go over settled ranges again. A responder that makes up ids without end fills it; past it ids may be
reported again, nothing is evicted."""

MIN_FRAME_SIZE = 4096
"""The smallest frame size limit, as in the reference."""

_FRAME_RESERVE = 200  # what the reference keeps free for the last skip, bound and fingerprint of a limited message
_BUCKETS = 16
_JITTERED_ONE_IN = 8
_VARINT_MAX_SIZE = 10  # digits in 64 bits
_INFINITE_BOUND = INFINITY.to_bytes(TIMESTAMP_SIZE, "big")
_EMPTY_FINGERPRINT = fingerprint(0, 0)


class _Mode(IntEnum):
    SKIP = 0
    FINGERPRINT = 1
    ID_LIST = 2


class _Range(NamedTuple):
    bound: bytes  # exclusive upper bound; the lower one is the previous range's
    mode: _Mode
    payload: bytes  # a fingerprint, or ids one after the other


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What one received message led to.

    Attributes:
        reply: the message to send back; None: the initiator has learned everything and the conversation is over.
        have: 32-byte ids that we hold and the other lacks; always empty for a responder.
        runs: 32-byte ids that the other holds and we lack; always empty for a responder. Claims of the other: ids are
            listed without timestamps, so a liar may name ids that we hold elsewhere, or that do not exist. Each run is of
            ids that follow one another in the other's set.
    """

    reply: bytes | None
    have: list[bytes] = field(default_factory=list)
    runs: list[list[bytes]] = field(default_factory=list)

    @property
    def need(self) -> list[bytes]:
        """The ids of all runs."""
        return [id for run in self.runs for id in run]


class _Reader:
    """Takes a message apart. Whatever is wrong with it raises `RemoteProtocolError`."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        self._timestamp = 0

    def ranges(self) -> Iterator[_Range]:
        previous = b""
        while self._position < len(self._data):
            bound = self._bound()
            if bound.ljust(len(previous), b"\0") < previous:
                raise RemoteProtocolError("reconciliation: the bounds of ranges descend")
            previous = bound
            match self._varint():
                case _Mode.SKIP:
                    yield _Range(bound, _Mode.SKIP, b"")
                case _Mode.FINGERPRINT:
                    yield _Range(bound, _Mode.FINGERPRINT, self._take(FINGERPRINT_SIZE))
                case _Mode.ID_LIST:
                    yield _Range(bound, _Mode.ID_LIST, self._take(self._varint() * ID_SIZE))
                case mode:
                    raise RemoteProtocolError(f"reconciliation: unknown mode {mode}")

    def _take(self, size: int) -> bytes:
        start = self._position
        if size > len(self._data) - start:
            raise RemoteProtocolError("reconciliation: the message ends too early")
        self._position = start + size
        return self._data[start : self._position]

    def _varint(self) -> int:
        value = 0
        for position in range(self._position, min(self._position + _VARINT_MAX_SIZE, len(self._data))):
            digit = self._data[position]
            if digit == 0x80 and not value:
                raise RemoteProtocolError("reconciliation: a number with leading zeros")
            value = value << 7 | digit & 0x7F
            if digit < 0x80:
                self._position = position + 1
                return value
        raise RemoteProtocolError("reconciliation: a number does not end")

    def _bound(self) -> bytes:
        encoded = self._varint()
        timestamp = INFINITY if encoded == 0 else self._timestamp + encoded - 1
        if encoded and timestamp >= INFINITY:
            raise RemoteProtocolError("reconciliation: a timestamp out of range")
        self._timestamp = timestamp
        size = self._varint()
        if size > ID_SIZE:
            raise RemoteProtocolError("reconciliation: a bound longer than an id")
        return timestamp.to_bytes(TIMESTAMP_SIZE, "big") + self._take(size)


class _Writer:
    """Puts a message together, and can take back the last ranges."""

    def __init__(self, size_limit: int) -> None:
        self.data = bytearray((PROTOCOL_VERSION,))
        self.room = size_limit - _FRAME_RESERVE
        self._timestamp = 0
        self._ranges = 0

    def full(self) -> bool:
        """Nothing but a skip and a last fingerprint may follow."""
        return len(self.data) > self.room or self._ranges > MAX_RANGES - 2

    def mark(self) -> tuple[int, int, int]:
        return len(self.data), self._timestamp, self._ranges

    def take_back(self, mark: tuple[int, int, int]) -> None:
        size, self._timestamp, self._ranges = mark
        del self.data[size:]

    def write(self, bound: bytes, mode: _Mode, payload: bytes = b"") -> None:
        timestamp, prefix = split_key(bound)
        encoded = 0 if timestamp == INFINITY else timestamp - self._timestamp + 1
        self._timestamp = timestamp
        self._ranges += 1
        self.data += encode_varint(encoded) + bytes((len(prefix),)) + prefix + bytes((mode,)) + payload

    def write_ids(self, bound: bytes, ids: list[bytes]) -> None:
        self.write(bound, _Mode.ID_LIST, encode_varint(len(ids)) + b"".join(ids))

    def write_split(self, items: ItemSet, lower: int, upper: int, bound: bytes, jitter: random.Random | None) -> None:
        """The items at ``[lower, upper)``, up to ``bound``: listed if they are few, else as fingerprints of buckets."""
        if upper - lower < 2 * _BUCKETS:
            self.write_ids(bound, items.ids(lower, upper))
            return
        cuts = [*_cuts(lower, upper, jitter), upper]
        start, sum_before = lower, items.sum_before(lower)
        for cut in cuts:
            sum_here = items.sum_before(cut)
            border = bound if cut == upper else _shortest_bound(items.key_at(cut - 1), items.key_at(cut))
            self.write(border, _Mode.FINGERPRINT, fingerprint(sum_here - sum_before, cut - start))
            start, sum_before = cut, sum_here


class Negentropy:
    """One conversation about a set: the initiator's side after `initiate`, else the responder's.

    A responder is stateless: one object may answer any number of initiators. An initiator needs an object for each
    conversation; many may share one `ItemSet`, which may change at any time between calls.

    Args:
        frame_size_limit: the longest message to produce, in bytes; at least `MIN_FRAME_SIZE`. 0, and whatever is
            larger, mean `MAX_MESSAGE_SIZE`. What does not fit follows in further rounds.
        items: the set to talk about; None: a new one.
        rng: when given, about one in eight conversations initiated cuts its ranges at random places, so that ids
            crafted to make certain sums collide hide a difference for a while only. Without, every cut is the reference's.

    Raises:
        ValueError: a frame size limit that is neither 0 nor at least `MIN_FRAME_SIZE`.
    """

    def __init__(self, frame_size_limit: int = 0, items: ItemSet | None = None, rng: random.Random | None = None) -> None:
        if frame_size_limit != 0 and frame_size_limit < MIN_FRAME_SIZE:
            raise ValueError(f"a frame size limit must be 0 or at least {MIN_FRAME_SIZE}, not {frame_size_limit}")
        self._size_limit = min(frame_size_limit or MAX_MESSAGE_SIZE, MAX_MESSAGE_SIZE)
        self._items = ItemSet() if items is None else items
        self._rng = rng
        self._jitter: random.Random | None = None  # the rng, in a conversation that cuts at random places
        self._initiator = False
        self._reported: set[bytes] = set()

    @property
    def items(self) -> ItemSet:
        """The set that this conversation is about."""
        return self._items

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def add(self, timestamp: int, id: bytes) -> bool:
        """`ItemSet.add`: True if the item is new. Raises `ValueError`."""
        return self._items.add(timestamp, id)

    def remove(self, timestamp: int, id: bytes) -> bool:
        """`ItemSet.remove`: True if the item was there. Raises `ValueError`."""
        return self._items.remove(timestamp, id)

    def initiate(self) -> bytes:
        """Start a conversation (a further call: another one, afresh) and return its first message, at most 1 KiB long."""
        self._initiator = True
        self._reported.clear()
        self._jitter = self._rng if self._rng is not None and self._rng.randrange(_JITTERED_ONE_IN) == 0 else None
        writer = _Writer(self._size_limit)
        writer.write_split(self._items, 0, len(self._items), _INFINITE_BOUND, self._jitter)
        return bytes(writer.data)

    def reconcile(self, query: bytes) -> Reconciliation:
        """Answer a message of the other side. The whole message is checked before anything is done with it.

        Returns:
            The reply and, for an initiator, what this message revealed. Within a conversation no id comes twice, up
            to `MAX_REMEMBERED` of them.

        Raises:
            RemoteProtocolError: the message is malformed or beyond `MAX_MESSAGE_SIZE` or `MAX_RANGES`, or the
                responder does not speak version 1. A responder answers a version it does not know with its own.
        """
        if len(query) > MAX_MESSAGE_SIZE:
            raise RemoteProtocolError(f"reconciliation: a message of {len(query)} bytes")
        if not query or not 0x60 <= query[0] <= 0x6F:
            raise RemoteProtocolError("reconciliation: no version byte")
        if query[0] != PROTOCOL_VERSION:
            if self._initiator:
                raise RemoteProtocolError(f"reconciliation: the peer speaks version {query[0] - 0x60} only")
            return Reconciliation(bytes((PROTOCOL_VERSION,)))
        ranges: list[_Range] = []
        for received in _Reader(query, 1).ranges():
            if len(ranges) == MAX_RANGES:
                raise RemoteProtocolError("reconciliation: too many ranges in a message")
            ranges.append(received)
        work = _Round(self._items, self._reported if self._initiator else None, self._jitter, _Writer(self._size_limit))
        result = work.run(ranges)
        if result.reply is None:
            self._reported.clear()
        return result


class _Round:
    """The work on one message. ``reported``: the ids that an initiator reported already; None: we are a responder."""

    def __init__(self, items: ItemSet, reported: set[bytes] | None, jitter: random.Random | None, writer: _Writer) -> None:
        self._items = items
        self._reported = reported
        self._jitter = jitter
        self._writer = writer
        self._settled: bytes | None = None  # bound of the settled ranges that no skip was written for yet
        self._have: list[bytes] = []
        self._runs: list[list[bytes]] = []

    def run(self, ranges: list[_Range]) -> Reconciliation:
        lower = 0
        for bound, mode, payload in ranges:
            upper = self._items.index(bound)
            unsent: int | None = None  # where the items begin that did not fit into this message
            if mode is _Mode.SKIP:
                self._settled = bound
            elif mode is _Mode.FINGERPRINT:
                unsent = self._compare(lower, upper, bound, payload)
            elif self._reported is None:
                unsent = self._list(lower, upper, bound)
            else:
                self._learn(lower, upper, payload, self._reported)
                self._settled = bound
            if unsent is not None:
                rest = self._items.fingerprint(unsent, len(self._items))
                self._writer.write(_INFINITE_BOUND, _Mode.FINGERPRINT, rest)
                break
            lower = upper
        message = bytes(self._writer.data)
        finished = self._reported is not None and len(message) == 1
        return Reconciliation(None if finished else message, self._have, self._runs)

    def _compare(self, lower: int, upper: int, bound: bytes, theirs: bytes) -> int | None:
        """They sent a fingerprint: the range is settled if ours is equal, else we say more about it."""
        if theirs == self._items.fingerprint(lower, upper):
            self._settled = bound
            return None
        self._write_skip()
        mark = self._writer.mark()
        self._writer.write_split(self._items, lower, upper, bound, self._jitter)
        if not self._writer.full():
            return None
        self._writer.take_back(mark)
        # The range left out and all after it become one range, to be compared again. As in the reference its
        # fingerprint leaves out our items of this range, so that it surely differs from that of a peer with items
        # here. A peer with none could take it for equal and miss ours: to that one the true fingerprint is sent.
        return lower if theirs == _EMPTY_FINGERPRINT else upper

    def _learn(self, lower: int, upper: int, payload: bytes, reported: set[bytes]) -> None:
        """They listed all they have in a range, to us who asked for it."""
        ours = dict.fromkeys(self._items.ids(lower, upper))
        theirs = dict.fromkeys(payload[i : i + ID_SIZE] for i in range(0, len(payload), ID_SIZE))
        self._have += [id for id in ours if id not in theirs and self._is_news(id, reported)]
        run: list[bytes] = []
        for id in theirs:
            if id not in ours and self._is_news(id, reported):
                run.append(id)
            elif run:
                self._runs.append(run)
                run = []
        if run:
            self._runs.append(run)

    @staticmethod
    def _is_news(id: bytes, reported: set[bytes]) -> bool:
        if id in reported:
            return False
        if len(reported) < MAX_REMEMBERED:
            reported.add(id)
        return True

    def _list(self, lower: int, upper: int, bound: bytes) -> int | None:
        """They listed all they have in a range: list ours, as far as it fits."""
        most = (self._writer.room - len(self._writer.data)) // ID_SIZE + 1
        self._write_skip()
        stop = min(upper, lower + most)
        self._writer.write_ids(bound if stop == upper else self._items.key_at(stop), self._items.ids(lower, stop))
        return stop if stop < upper or self._writer.full() else None

    def _write_skip(self) -> None:
        if self._settled is not None:
            self._writer.write(self._settled, _Mode.SKIP)
            self._settled = None


def _cuts(lower: int, upper: int, jitter: random.Random | None) -> list[int]:
    """Positions strictly between ``lower`` and ``upper`` that cut the items there into `_BUCKETS` buckets, none empty.

    Equal but for one item, the larger first; with ``jitter`` each cut comes earlier by up to a bucket's size less one.
    """
    size, larger = divmod(upper - lower, _BUCKETS)
    cuts = [lower + i * size + min(i, larger) for i in range(1, _BUCKETS)]
    return cuts if jitter is None else [cut - jitter.randrange(size) for cut in cuts]


def _shortest_bound(before: bytes, key: bytes) -> bytes:
    """The shortest bound that separates two adjacent keys: above ``before``, not above ``key``."""
    size = TIMESTAMP_SIZE
    if before[:size] != key[:size]:
        return key[:size]
    while before[size] == key[size]:
        size += 1
    return key[: size + 1]
