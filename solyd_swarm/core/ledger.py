"""Which sequence numbers of whom were ever accepted: what still refuses a replay when the ids have expired.

Ids are remembered for twice the window, numbers for as long as there is room: an author's numbers of one epoch are dense,
so a few intervals say it all. A restarted node loads its ledger again, so it repeats nothing either.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise

import msgspec

MAX_AUTHORS = 65_536
"""Bounds a flood of fresh author keys; the author unheard of for longest is forgotten (its old envelopes could be replayed)."""
MAX_EPOCHS = 16
"""Epochs of one author, bounding an author that restarts without end. Older ones are refused altogether from then on."""
MAX_HOLES = 1024
"""Gaps in one epoch, bounding an author that skips numbers on purpose. The oldest gap counts as lost."""
MAX_ENTRIES = 1_048_576
"""Epochs and intervals of all authors together, bounding many authors that skip numbers on purpose. Again the author unheard of
for longest is forgotten."""


class _Epoch:
    __slots__ = ("ends", "silenced", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.silenced = False

    def overlaps(self, first: int, last: int) -> bool:
        place = bisect_right(self.starts, last)
        return place > 0 and self.ends[place - 1] >= first

    def mark(self, first: int, last: int) -> None:
        """Adds [first, last], which overlaps nothing."""
        starts, ends = self.starts, self.ends
        place = bisect_right(starts, first)
        joins_left = place > 0 and ends[place - 1] == first - 1
        joins_right = place < len(starts) and starts[place] == last + 1
        if joins_left and joins_right:
            ends[place - 1] = ends[place]
            del starts[place], ends[place]
        elif joins_left:
            ends[place - 1] = last
        elif joins_right:
            starts[place] = first
        else:
            starts.insert(place, first)
            ends.insert(place, last)
            if len(starts) > MAX_HOLES:
                del starts[1], ends[0]

    def without(self, ranges: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Starts and ends, less these ranges."""
        intervals = list(zip(self.starts, self.ends, strict=True))
        for first, last in ranges:
            pieces = [piece for start, end in intervals for piece in ((start, min(end, first - 1)), (max(start, last + 1), end))]
            intervals = [(start, end) for start, end in pieces if start <= end]
        starts, ends = [start for start, _ in intervals], [end for _, end in intervals]
        while len(starts) > MAX_HOLES:
            del starts[1], ends[0]
        return starts, ends


class _Author:
    __slots__ = ("dead_epoch", "epochs")

    def __init__(self) -> None:
        self.dead_epoch = 0
        self.epochs: dict[int, _Epoch] = {}


class Ledger:
    """Accepted numbers by author and epoch, bounded."""

    def __init__(self) -> None:
        self._authors: OrderedDict[bytes, _Author] = OrderedDict()
        self._entries = 0
        self.version = 0
        """Counts changes, so that who saves it knows when to."""

    def refuses(self, author: bytes, epoch: int, first: int, last: int) -> bool:
        """Whether any of the numbers was accepted before, or the epoch is too old to tell."""
        entry = self._authors.get(author)
        if entry is None:
            return False
        if epoch <= entry.dead_epoch:
            return True
        known = entry.epochs.get(epoch)
        return known is not None and known.overlaps(first, last)

    def is_silenced(self, author: bytes, epoch: int) -> bool:
        """Whether the author equivocated in that epoch."""
        entry = self._authors.get(author)
        known = entry and entry.epochs.get(epoch)
        return bool(known and known.silenced)

    def expected(self, author: bytes, epoch: int) -> int | None:
        """The number after the highest one accepted, or None where nothing was."""
        entry = self._authors.get(author)
        known = entry and entry.epochs.get(epoch)
        return known.ends[-1] + 1 if known and known.ends else None

    def mark(self, author: bytes, epoch: int, first: int, last: int) -> None:
        """Remembers that these numbers, none of which may have been marked before, were accepted."""
        known = self._epoch(author, epoch)
        if known is None:
            return
        before = len(known.starts)
        known.mark(first, last)
        self._entries += len(known.starts) - before
        while self._entries > MAX_ENTRIES and len(self._authors) > 1:
            self._forget_oldest()

    def silence(self, author: bytes, epoch: int) -> None:
        """Remembers an equivocation."""
        known = self._epoch(author, epoch)
        if known is not None:
            known.silenced = True

    def _epoch(self, author: bytes, epoch: int) -> _Epoch | None:
        """The entry to change, or None where the epoch is too old to be told from others."""
        self.version += 1
        entry = self._authors.get(author)
        if entry is None:
            entry = self._authors[author] = _Author()
            if len(self._authors) > MAX_AUTHORS:
                self._forget_oldest()
        else:
            self._authors.move_to_end(author)
        if epoch not in entry.epochs and epoch > entry.dead_epoch:
            entry.epochs[epoch] = _Epoch()
            self._entries += 1
            if len(entry.epochs) > MAX_EPOCHS:
                entry.dead_epoch = min(entry.epochs)
                self._entries -= 1 + len(entry.epochs.pop(entry.dead_epoch).starts)
        return entry.epochs.get(epoch)

    def _forget_oldest(self) -> None:
        _, entry = self._authors.popitem(last=False)
        self._entries -= sum(1 + len(known.starts) for known in entry.epochs.values())

    def dump(self, max_authors: int = 4096, *, without: Iterable[tuple[bytes, int, int, int]] = ()) -> bytes:
        """The ledger of the authors heard last, as bytes for `load`.

        Args:
            without: (author, epoch, first, last) of numbers that are to count as never accepted.
        """
        ranges: dict[tuple[bytes, int], list[tuple[int, int]]] = {}
        for author, epoch, first, last in sorted(without):
            known_ranges = ranges.setdefault((author, epoch), [])
            if known_ranges and first <= known_ranges[-1][1] + 1:
                known_ranges[-1] = (known_ranges[-1][0], max(last, known_ranges[-1][1]))
            else:
                known_ranges.append((first, last))
        rows = [
            (
                author,
                entry.dead_epoch,
                [(number, known.silenced, *known.without(ranges.get((author, number), ()))) for number, known in entry.epochs.items()],
            )
            for author, entry in list(self._authors.items())[-max_authors:]
        ]
        return msgspec.msgpack.encode(rows)

    @classmethod
    def load(cls, data: bytes) -> "Ledger":
        """What `dump` wrote. Raises ``ValueError`` for anything else: a torn file must not make us forget, or refuse, at random."""
        rows = msgspec.msgpack.decode(data, type=list[tuple[bytes, int, list[tuple[int, bool, list[int], list[int]]]]])
        ledger = cls()
        for author, dead_epoch, epochs in rows:
            entry = ledger._authors[author] = _Author()
            entry.dead_epoch = dead_epoch
            for number, silenced, starts, ends in epochs:
                bounds = [bound for interval in zip(starts, ends, strict=True) for bound in interval]
                # Within an interval equal is fine; the next one starts past the number after its end, or they would be one.
                sorted_so = all(one <= other - place % 2 * 2 for place, (one, other) in enumerate(pairwise(bounds)))
                if number <= dead_epoch or not sorted_so or (bounds and bounds[0] < 1) or len(starts) > MAX_HOLES:
                    raise ValueError("this is no ledger")
                known = entry.epochs[number] = _Epoch()
                known.silenced, known.starts, known.ends = silenced, starts, ends
                ledger._entries += 1 + len(starts)
            if len(author) != 32 or len(entry.epochs) != len(epochs) or len(epochs) > MAX_EPOCHS:
                raise ValueError("this is no ledger")
        if len(ledger._authors) != len(rows) or len(rows) > MAX_AUTHORS or ledger._entries > MAX_ENTRIES:
            raise ValueError("this is no ledger")
        return ledger
