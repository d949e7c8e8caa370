"""What is dialled for, and what of it may still be reached."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from solyd_swarm.core.events import Addresses


@dataclass(frozen=True, slots=True)
class Goal:
    """For what a candidate is dialled: the topic, the instance expected (empty: whoever answers), its addresses, and who told them."""

    topic_key: bytes
    instance: bytes
    addresses: Addresses
    via: bytes = field(default=b"", compare=False)


class Goals:
    """Goals that may still be reached, each until some loop time. They are our own: no peer can add to them."""

    def __init__(self) -> None:
        self._until: dict[Goal, float] = {}

    def __iter__(self) -> Iterator[Goal]:
        return iter(list(self._until))

    def __len__(self) -> int:
        return len(self._until)

    def add(self, goal: Goal, until: float) -> None:
        """There is hope for it."""
        self._until[goal] = until

    def take(self, which: Callable[[Goal], bool] = lambda goal: True) -> list[Goal]:
        """Those for which there is none any more, or no need; they are forgotten."""
        taken = [goal for goal in self._until if which(goal)]
        for goal in taken:
            del self._until[goal]
        return taken

    def take_due(self, now: float) -> list[Goal]:
        """Those whose time has come."""
        return self.take(lambda goal: self._until[goal] <= now)

    def move_to(self, other: "Goals") -> None:
        """Another channel takes over."""
        other._until |= self._until
        self._until.clear()
