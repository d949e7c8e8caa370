"""What a peer outside the active view gave us that is too young to tell whether its swarm is ours: neighbours may be about to bring it.

Of a message that members of one swarm have had for `DIVIDED_AGE` without telling us, we know that they are not joined to us. A younger
one is held: delivered, but neither passed on nor in our digest, lest neighbours tell us what they have heard of us. If none of them
brings it or tells of it by then, its giver is of another half.
"""

from collections.abc import Callable
from dataclasses import dataclass

DIVIDED_AGE = 5.0
"""Seconds after which members of one swarm have told one another what is new: who lacks something older is of another half."""
MAX_DOUBTS = 256
"""Messages held at once; beyond them, messages are passed on as they come."""


@dataclass(slots=True)
class Doubt:
    """A message held, who gave it, until when, and whether a neighbour has told of it since."""

    giver: bytes
    until: float
    told: bool = False


class Doubts:
    """The messages held, of one topic.

    Args:
        conceal, reveal: take a message out of our digest, and put it back.
    """

    def __init__(self, conceal: Callable[[bytes], None], reveal: Callable[[bytes], None]) -> None:
        self._conceal = conceal
        self._reveal = reveal
        self._held: dict[bytes, Doubt] = {}

    def __len__(self) -> int:
        return len(self._held)

    def concerns(self, peer: bytes) -> bool:
        """Whether the peer gave something that is held."""
        return any(doubt.giver == peer for doubt in self._held.values())

    def hold(self, id: bytes, giver: bytes, until: float) -> bool:
        """Holds a message. False if there are too many."""
        if len(self._held) >= MAX_DOUBTS:
            return False
        self._held[id] = Doubt(giver, until)
        self._conceal(id)
        return True

    def told(self, id: bytes) -> None:
        """A neighbour announces a message."""
        doubt = self._held.get(id)
        if doubt is not None:
            doubt.told = True
            self._reveal(id)

    def brought(self, id: bytes) -> bool:
        """A neighbour pushes a message. True if it was held: now it is not, and is to be passed on."""
        if self._held.pop(id, None) is None:
            return False
        self._reveal(id)
        return True

    def due(self, now: float) -> list[tuple[bytes, Doubt]]:
        """The messages that have been held long enough, with what has become of the doubt."""
        due = [(id, doubt) for id, doubt in self._held.items() if doubt.until <= now]
        for id, _ in due:
            del self._held[id]
            self._reveal(id)
        return due

    @property
    def next(self) -> float | None:
        """When the next one has been held long enough."""
        return min((doubt.until for doubt in self._held.values()), default=None)
