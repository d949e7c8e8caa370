"""One peer of one topic: what went over its link, and what it has acknowledged of our own messages.

Both ends number the ids that cross a link (by Gossip, Ihave, Have or Transfer). The receiver acknowledges the longest run
from the start of which it holds everything; no acknowledgement is given for what was merely announced.
"""

from collections import deque
from collections.abc import Callable

from solyd_swarm.core.wire import PeerInfo

MAX_PENDING = 65_536
"""Announced ids that we do not hold yet, per link: bounds a peer that announces what it never sends. Its newest announcements
are then not acknowledged one by one; the next digest round does it for all at once."""


class Link:
    """State of one link; the parts of the overlay share it."""

    __slots__ = (
        "_owed",
        "_own",
        "_pending",
        "acked_count",
        "author",
        "congested",
        "eager",
        "info",
        "initiated",
        "overflow",
        "peer",
        "received",
        "sent",
        "synced_to",
        "up",
    )

    def __init__(self, info: PeerInfo, author: bytes, *, initiated: bool) -> None:
        self.peer = info.instance
        self.info = info
        self.author = author
        self.initiated = initiated
        self.up = False  # in the active view
        self.eager = True
        self.congested = False
        # Inbound: ids received; those not held yet, by their number; what we last acknowledged.
        self.received = 0
        self.acked_count = 0
        self.overflow = False
        self._pending: deque[tuple[int, bytes]] = deque()
        # Outbound: ids sent; our own envelopes among them, as (number, first sequence), and those a digest found missing.
        self.sent = 0
        self._own: deque[tuple[int, int]] = deque()
        self._owed: deque[tuple[int, int]] = deque()
        self.synced_to = -1

    # -- inbound ----------------------------------------------------------------------------------------------

    def note_received(self, id: bytes, held: bool) -> None:
        """Counts an id that arrived."""
        self.received += 1
        if held or self.overflow:
            return
        if len(self._pending) >= MAX_PENDING:
            self.overflow = True
            return
        self._pending.append((self.received, id))

    def acknowledge(self, holds: Callable[[bytes], bool]) -> int | None:
        """The count to acknowledge now, or None where it has not grown."""
        pending = self._pending
        while pending and holds(pending[0][1]):
            pending.popleft()
        if self.overflow and not pending:
            return None
        count = pending[0][0] - 1 if pending else self.received
        if count <= self.acked_count:
            return None
        self.acked_count = count
        return count

    # -- outbound ---------------------------------------------------------------------------------------------

    def note_sent(self, own_first: int = 0, *, owed: bool = False) -> None:
        """Counts an id that was sent; `own_first` is its first sequence where the envelope is our own."""
        self.sent += 1
        if own_first:
            (self._owed if owed else self._own).append((self.sent, own_first))

    def acked(self, count: int) -> bool:
        """Takes in an acknowledgement. False where it claims more than was sent."""
        if count > self.sent:
            return False
        for queue in (self._own, self._owed):
            while queue and queue[0][0] <= count:
                queue.popleft()
        return True

    def synced(self, through: int) -> None:
        """A digest round has shown that the peer holds all our own messages up to this sequence (but for those owed)."""
        self.synced_to = max(self.synced_to, through)
        while self._own and self._own[0][1] <= through:
            self._own.popleft()

    def holds_through(self, published: int) -> int:
        """The peer holds all our own messages up to this sequence; `published` is our last one."""
        if self.synced_to < 0:
            return 0
        missing = [queue[0][1] for queue in (self._own, self._owed) if queue]
        return min(missing, default=published + 1) - 1
