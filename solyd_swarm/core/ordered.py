"""The ordered set that two members compare: items sorted by (timestamp, id), with the sum of the ids of any stretch.

A blocked sorted list. Each block holds up to `ItemSet._BLOCK` keys and the sum of their ids, so inserting and removing
never rebuild anything: two binary searches and a short memory move. The running sums over the blocks are filled up to
where a question needs them and kept up to the first block that changed; as most timestamps ascend, that is nearly all.

A *key* is the 8-byte big-endian timestamp followed by the 32-byte id: byte order is item order. A *bound* is a key
that may be cut short; the missing bytes count as zeros, which is how bytes compare.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import ClassVar

ID_SIZE = 32
FINGERPRINT_SIZE = 16
INFINITY = 2**64 - 1
"""The timestamp that no item may have: the end of the key space."""

TIMESTAMP_SIZE = 8
_MODULUS_MASK = (1 << 8 * ID_SIZE) - 1


def encode_varint(value: int) -> bytes:
    """A non-negative integer in base 128, most significant digit first (Negentropy Protocol V1, "Varint")."""
    digits = bytearray((value & 0x7F,))
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    digits.reverse()
    return bytes(digits)


def fingerprint(total: int, count: int) -> bytes:
    """The 16 bytes that stand for ``count`` ids whose sum is ``total`` (Negentropy Protocol V1, "Fingerprint Algorithm")."""
    digest = sha256((total & _MODULUS_MASK).to_bytes(ID_SIZE, "little") + encode_varint(count))
    return digest.digest()[:FINGERPRINT_SIZE]


def fingerprint_of(ids: Iterable[bytes]) -> bytes:
    """The 16 bytes that stand for these ids, in whatever order."""
    values = [int.from_bytes(id, "little") for id in ids]
    return fingerprint(sum(values), len(values))


def make_key(timestamp: int, id: bytes) -> bytes:
    """The 40-byte key of an item. Raises `ValueError` for a timestamp outside ``[0, INFINITY)`` or an id not of 32 bytes."""
    if not 0 <= timestamp < INFINITY:
        raise ValueError(f"a timestamp must be at least 0 and below 2**64 - 1, not {timestamp}")
    if len(id) != ID_SIZE:
        raise ValueError(f"an id must be {ID_SIZE} bytes long, not {len(id)}")
    return timestamp.to_bytes(TIMESTAMP_SIZE, "big") + id


def split_key(key: bytes) -> tuple[int, bytes]:
    """Timestamp and id (of a bound: what there is of the id) of a key."""
    return int.from_bytes(key[:TIMESTAMP_SIZE], "big"), key[TIMESTAMP_SIZE:]


def _sum_ids(keys: Iterable[bytes]) -> int:
    return sum([int.from_bytes(key[TIMESTAMP_SIZE:], "little") for key in keys])


class ItemSet:
    """A mutable set of (timestamp, id), shared by all conversations about it. Not thread-safe.

    ``n`` items: `add` and `remove` cost O(log n) comparisons and move at most one block; `summary` is O(1); positions and
    sums are O(log n) plus part of one block, after the running sums behind the last change were filled up again.
    An id under two timestamps is two items, but members that give one id different timestamps may take the two for one,
    as only ids are listed and summed: the id must determine the timestamp.
    """

    _BLOCK: ClassVar[int] = 256

    def __init__(self, items: Iterable[tuple[int, bytes]] = ()) -> None:
        self._blocks: list[list[bytes]] = [[]]
        self._lows: list[bytes] = [b""]  # block b holds the keys from lows[b] on, below lows[b + 1]
        self._sums: list[int] = [0]
        self._counts_before: list[int] = [0]  # both may be shorter than the list of blocks: see _fill
        self._sums_before: list[int] = [0]
        self._count = 0
        self._total = 0
        for timestamp, id in items:
            self.add(timestamp, id)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item: object) -> bool:
        match item:
            case (int() as timestamp, bytes() as id) if 0 <= timestamp < INFINITY and len(id) == ID_SIZE:
                return self._find(make_key(timestamp, id))[2]
        return False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """All (timestamp, id), ascending. The set must not change meanwhile."""
        for block in self._blocks:
            for key in block:
                yield split_key(key)

    def add(self, timestamp: int, id: bytes) -> bool:
        """Insert an item. True if it is new; False, and nothing changes, if it was there. Raises `ValueError` as `make_key`."""
        key = make_key(timestamp, id)
        b, position, found = self._find(key)
        if found:
            return False
        self._blocks[b].insert(position, key)
        self._account(b, int.from_bytes(id, "little"), 1)
        if len(self._blocks[b]) > self._BLOCK:
            self._split(b, position)
        return True

    def remove(self, timestamp: int, id: bytes) -> bool:
        """Take an item out. True if it was there; False, and nothing changes, if not. Raises `ValueError` as `make_key`."""
        key = make_key(timestamp, id)
        b, position, found = self._find(key)
        if not found:
            return False
        del self._blocks[b][position]
        self._account(b, -int.from_bytes(id, "little"), -1)
        if len(self._blocks[b]) < self._BLOCK // 4:
            self._merge(b)
        return True

    def summary(self) -> tuple[int, bytes]:
        """(number of items, 16-byte fingerprint of the whole set), in O(1). Equal sets have equal summaries."""
        return self._count, fingerprint(self._total, self._count)

    def index(self, bound: bytes) -> int:
        """How many items lie below ``bound``."""
        b, position, _ = self._find(bound)
        self._fill()
        return self._counts_before[b] + position

    def sum_before(self, index: int) -> int:
        """The sum (not reduced) of the ids of the first ``index`` items, as little-endian integers."""
        if index == self._count:
            return self._total
        b, position = self._locate(index)
        block = self._blocks[b]
        if 2 * position <= len(block):
            return self._sums_before[b] + _sum_ids(block[:position])
        return self._sums_before[b] + self._sums[b] - _sum_ids(block[position:])

    def fingerprint(self, lower: int, upper: int) -> bytes:
        """The fingerprint of the items at positions ``[lower, upper)``."""
        return fingerprint(self.sum_before(upper) - self.sum_before(lower), upper - lower)

    def key_at(self, index: int) -> bytes:
        """The key of the item at a position below ``len(self)``."""
        b, position = self._locate(index)
        return self._blocks[b][position]

    def ids(self, lower: int, upper: int) -> list[bytes]:
        """The ids of the items at positions ``[lower, upper)``, in item order."""
        found: list[bytes] = []
        if lower >= upper:
            return found
        b, position = self._locate(lower)
        while len(found) < upper - lower:
            stop = position + upper - lower - len(found)
            found += [key[TIMESTAMP_SIZE:] for key in self._blocks[b][position:stop]]
            b, position = b + 1, 0
        return found

    def between(self, first: tuple[int, bytes], last: tuple[int, bytes], most: int) -> list[bytes]:
        """The ids of the items from ``first`` to ``last``, both included, in item order; ``most`` of them at most."""
        lower, upper = self.places(first, last)
        return self.ids(lower, min(upper, lower + most))

    def places(self, first: tuple[int, bytes], last: tuple[int, bytes]) -> tuple[int, int]:
        """Positions ``[lower, upper)`` of the items from ``first`` to ``last``, both included, whether or not they are there."""
        return self.index(make_key(*first)), self.index(make_key(*last)) + (last in self)

    def _find(self, bound: bytes) -> tuple[int, int, bool]:
        """(block, position in it, whether the key there is ``bound``): where ``bound`` is or would be."""
        b = bisect_right(self._lows, bound) - 1
        block = self._blocks[b]
        position = bisect_left(block, bound)
        return b, position, position < len(block) and block[position] == bound

    def _locate(self, index: int) -> tuple[int, int]:
        """(block, position in it) of the item at ``index``, which must be below ``len(self)``."""
        self._fill()
        b = bisect_right(self._counts_before, index) - 1
        return b, index - self._counts_before[b]

    def _fill(self) -> None:
        """Bring the running counts and sums up to the last block."""
        for b in range(len(self._counts_before), len(self._blocks)):
            self._counts_before.append(self._counts_before[-1] + len(self._blocks[b - 1]))
            self._sums_before.append(self._sums_before[-1] + self._sums[b - 1])

    def _forget(self, b: int) -> None:
        """Block ``b`` changed: what runs before it still holds, what runs past it does not."""
        del self._counts_before[b + 1 :]
        del self._sums_before[b + 1 :]

    def _account(self, b: int, value: int, count: int) -> None:
        self._sums[b] += value
        self._total += value
        self._count += count
        self._forget(b)

    def _split(self, b: int, position: int) -> None:
        """Cut a block that is too large in half; at the very end cut off the newest only, so that ascending inserts fill blocks."""
        block = self._blocks[b]
        at_end = b == len(self._blocks) - 1 and position == len(block) - 1
        cut = position if at_end else len(block) // 2
        tail = block[cut:]
        del block[cut:]
        value = _sum_ids(tail)
        self._sums[b] -= value
        self._blocks.insert(b + 1, tail)
        self._lows.insert(b + 1, tail[0])
        self._sums.insert(b + 1, value)
        self._forget(b)

    def _merge(self, b: int) -> None:
        """Join a block that became small with a neighbour, if the two leave room for more."""
        for left in (b - 1, b):
            if not 0 <= left < len(self._blocks) - 1:
                continue
            if len(self._blocks[left]) + len(self._blocks[left + 1]) <= self._BLOCK * 3 // 4:
                self._blocks[left] += self._blocks.pop(left + 1)
                self._sums[left] += self._sums.pop(left + 1)
                del self._lows[left + 1]
                self._forget(left)
                return
