"""One peer of one topic: what went over its link, and what it has acknowledged of our own messages.

Both ends number the ids that cross a link (by Gossip, Ihave, Have or Transfer). The receiver acknowledges the longest run
from the start of which it holds everything; no acknowledgement is given for what was merely announced.
"""

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from solyd_swarm.core.events import Addresses
from solyd_swarm.core.roundtrip import RoundTrip
from solyd_swarm.core.wire import PeerInfo

MAX_PENDING = 65_536
"""Announced ids that we do not hold yet, per link: bounds a peer that announces what it never sends. Its newest announcements
are then not acknowledged one by one; the next digest round that finds the sets equal does it for all at once."""
MAX_UNHELD = 65_536
"""Our own envelopes that a peer is not known to hold: bounds one that never acknowledges. Past it only a digest round that finds
the sets equal tells."""
SERVED_BYTES = 1024 * 1024
"""Bytes of bodies (and digests) that the frames received together may ask for: bounds small frames that ask for all there is, again
and again. The rest is offered, to be pulled when these have come."""
MAX_SPARED = 64
"""Envelopes of which a second copy is on its way, per link: bounds those that never come."""


class Link:
    """State of one link; the parts of the overlay share it."""

    __slots__ = (
        "_base",
        "_excused",
        "_lowest",
        "_own",
        "_pending",
        "_spared",
        "_strict",
        "_synced_to",
        "_unheld",
        "_wanted",
        "acked_count",
        "author",
        "congested",
        "dialled",
        "divided",
        "eager",
        "eager_since",
        "gain",
        "info",
        "initiated",
        "joined_at",
        "overflow",
        "parted_at",
        "peer",
        "pruned_at",
        "received",
        "round_trip",
        "sent",
        "served",
        "up",
    )

    def __init__(self, info: PeerInfo, author: bytes, *, initiated: bool, dialled: Addresses = ()) -> None:
        self.peer = info.instance
        self.info = info
        self.author = author
        self.initiated = initiated
        self.dialled = dialled
        self.up = False  # in the active view
        self.eager = True
        self.eager_since = float("-inf")  # when it became so; from the start is before all
        self.congested = False
        self.pruned_at = float("-inf")
        self.divided = False  # one end has had messages that the other lacked for so long that no common neighbour told it
        self.gain = 0.0  # hops by which its announcements were shorter than the tree, smoothed
        self.joined_at = float("-inf")  # when a Join of it last set off walks
        self.parted_at = 0.0  # when it left the active view, or we last told the peer that it is not in it
        self.round_trip = RoundTrip()
        self._spared: dict[bytes, None] = {}  # ids of which a second copy makes the link no less eager
        self.served = 0  # bytes of bodies and digests that the frames at hand have asked for
        # Inbound: ids received; those not held yet, by their number; what we last acknowledged.
        self.received = 0
        self.acked_count = 0
        self.overflow = False
        self._pending: deque[tuple[int, bytes]] = deque()
        self._excused: set[bytes] = set()  # announced ids that the peer itself said it cannot give
        self._wanted = 0  # the highest of their numbers whose acknowledgement the peer waits for
        # Outbound: ids sent, and of our own envelopes among them (number, first sequence).
        self.sent = 0
        self._own: deque[tuple[int, int]] = deque()
        # Our own envelopes that the peer is not known to hold, by first sequence: whether a digest has shown that it lacks them.
        self._unheld: dict[int, bool] = {}
        self._lowest: list[int] = []  # a heap of their first sequences, and of some that are held by now
        self._synced_to = 0
        self._base = 0
        self._strict = False

    def make_eager(self, now: float) -> None:
        """What is new is pushed over it from now on."""
        if not self.eager:
            self.eager, self.eager_since = True, now

    def spare(self, id: bytes) -> None:
        """A second copy of this envelope says nothing about the link: both are on their way already."""
        self._spared[id] = None
        if len(self._spared) > MAX_SPARED:
            del self._spared[next(iter(self._spared))]

    def is_spared(self, id: bytes) -> bool:
        """Whether this is such a copy; the next one is none."""
        return self._spared.pop(id, b"") is None

    # -- inbound ----------------------------------------------------------------------------------------------

    @property
    def owes(self) -> bool:
        """Whether there are ids to be acknowledged once we hold them."""
        return bool(self._pending)

    def note_received(self, id: bytes, held: bool, *, matters: bool = True) -> None:
        """Counts an id that arrived.

        Args:
            matters: it may be of the peer's own making. Nobody waits to hear that we hold what others have published.
        """
        self.received += 1
        if held and matters:
            self._wanted = self.received
        if held or self.overflow:
            return
        if len(self._pending) >= MAX_PENDING:
            self.overflow = True
            return
        self._pending.append((self.received, id))

    def caught_up(self) -> None:
        """The sets were equal: what the peer announced before is held, or was dropped by the peer itself."""
        self._pending.clear()
        self._excused.clear()
        self.overflow = False

    def excuse(self, id: bytes) -> None:
        """The peer announced this id, and cannot give it: nothing of it is left to acknowledge."""
        if len(self._excused) < len(self._pending):
            self._excused.add(id)

    def acknowledge(self, holds: Callable[[bytes], bool], matters: Callable[[bytes], bool]) -> int | None:
        """The count to acknowledge now, or None where it has not grown by anything that `matters`."""
        pending = self._pending
        while pending and (pending[0][1] in self._excused or holds(pending[0][1])):
            number, id = pending.popleft()
            self._excused.discard(id)
            if matters(id):
                self._wanted = max(self._wanted, number)
        if self.overflow and not pending:
            return None
        count = pending[0][0] - 1 if pending else self.received
        if count <= self.acked_count or self._wanted <= self.acked_count:
            return None
        self.acked_count = count
        return count

    # -- outbound ---------------------------------------------------------------------------------------------

    def covers_from(self, published: int) -> None:
        """The link is in the active view: every own envelope after this sequence is noted on it, earlier ones may not be."""
        self._base = published

    @property
    def lacks_round(self) -> bool:
        """Whether only a digest round can tell if the peer holds what was published before it became a neighbour."""
        return self._synced_to < self._base

    def note_own(self, first: int, *, owed: bool = False) -> None:
        """The peer is not known to hold our own envelope that starts at this sequence."""
        if first not in self._unheld:
            heappush(self._lowest, first)
        self._unheld[first] = owed or self._unheld.get(first, False)
        if len(self._unheld) > MAX_UNHELD:
            self._base = max(self._base, *self._unheld)
            self._strict = True
            self._synced_to = min(self._synced_to, heappop(self._lowest) - 1)
            self._unheld.clear()
            self._lowest.clear()
            self._own.clear()

    def note_sent(self, own_first: int = 0, *, owed: bool = False) -> None:
        """Counts an id that was sent; `own_first` is its first sequence where the envelope is our own."""
        self.sent += 1
        if own_first:
            self._own.append((self.sent, own_first))
            self.note_own(own_first, owed=owed)
            if len(self._own) > 2 * MAX_UNHELD:
                self._own.popleft()  # sent again and again: a later number stands for it

    def acked(self, count: int) -> bool:
        """Takes in an acknowledgement. False where it claims more than was sent."""
        if count > self.sent:
            return False
        while self._own and self._own[0][0] <= count:
            self._unheld.pop(self._own.popleft()[1], None)
        return True

    def synced(self, through: int, *, equal: bool = False) -> None:
        """A digest round has shown that the peer holds all our own messages up to this sequence, but for those owed.

        Args:
            equal: the sets were equal, so that nothing is owed.
        """
        if self._strict and not (equal and through >= self._base):
            return
        self._strict = False
        self._synced_to = max(self._synced_to, through)
        self._unheld = {first: owed for first, owed in self._unheld.items() if first > through or (owed and not equal)}
        self._lowest = list(self._unheld)
        heapify(self._lowest)

    def holds_through(self, published: int) -> int:
        """The peer holds all our own messages up to this sequence; `published` is our last one."""
        while self._lowest and self._lowest[0] not in self._unheld:
            heappop(self._lowest)
        through = self._synced_to if self.lacks_round else published
        return min(through, self._lowest[0] - 1) if self._lowest else through
