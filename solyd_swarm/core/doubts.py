"""What a peer outside the active view gave us that is too young to tell whether its swarm is ours: neighbours may be about to bring it.

Of a message that members of one swarm have had for `DIVIDED_AGE` without telling us, we know that they are not joined to us. A younger
one is held: delivered, but neither passed on nor in our digest, lest neighbours tell us what they have heard of us. If none of them
brings it or tells of it by then, its giver is of another half.
"""

from collections.abc import Callable

DIVIDED_AGE = 5.0
"""Seconds after which members of one swarm have told one another what is new: who lacks something older is of another half."""
MAX_DOUBTS = 256
"""Messages held at once; beyond them, messages are passed on as they come."""


class Doubts:
    """The messages held, of one topic.

    Args:
        conceal, reveal: take a message out of our digest, and put it back.
    """

    def __init__(self, conceal: Callable[[bytes], None], reveal: Callable[[bytes], None]) -> None:
        self._conceal = conceal
        self._reveal = reveal
        self._held: dict[bytes, tuple[bytes, float]] = {}  # with who gave it, and until when

    def __len__(self) -> int:
        return len(self._held)

    def concerns(self, peer: bytes) -> bool:
        """Whether the peer gave something that is held."""
        return any(giver == peer for giver, _ in self._held.values())

    def hold(self, id: bytes, giver: bytes, until: float) -> bool:
        """Holds a message. False if there are too many."""
        if len(self._held) >= MAX_DOUBTS:
            return False
        self._held[id] = giver, until
        self._conceal(id)
        return True

    def told(self, id: bytes) -> bool:
        """A neighbour pushes or announces a message. True if it was held: now it is not, and is to be passed on."""
        if self._held.pop(id, None) is None:
            return False
        self._reveal(id)
        return True

    def release(self, giver: bytes | None = None) -> list[bytes]:
        """What is held no longer: all that this peer gave, or all there is."""
        released = [id for id, (peer, _) in self._held.items() if giver in (None, peer)]
        for id in released:
            self.told(id)
        return released

    def due(self, now: float) -> list[tuple[bytes, bytes]]:
        """The messages that have been held long enough, with who gave them: no neighbour has told of them."""
        due = [(id, giver) for id, (giver, until) in self._held.items() if until <= now]
        for id, _ in due:
            self.told(id)
        return due

    @property
    def next(self) -> float | None:
        """When the next one has been held long enough."""
        return min((until for _, until in self._held.values()), default=None)
