"""Counting what was dropped because handlers are too slow, and telling it."""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("solyd_swarm.swarm")


class Lagging:
    """The messages dropped, of one swarm.

    Args:
        enqueue: has a function called where handlers run; False if there is no room.
        tell: called there with the number of messages dropped since the last time.
    """

    def __init__(self, topic: str, enqueue: Callable[[Callable[[], object]], bool], tell: Callable[[int], object]) -> None:
        self.count = 0
        """How many there were so far."""
        self._topic = topic
        self._enqueue = enqueue
        self._tell = tell
        # Reentrant: collecting garbage may close an iterator, and with it drop messages, anywhere.
        self._state = threading.RLock()
        self._untold = 0  # of those, what the next event tells
        self._told = True  # none is on its way

    def dropped(self, count: int) -> None:
        """So many were dropped. From any thread."""
        with self._state:
            first = not self.count
            self.count += count
            self._untold += count
            told, self._told = self._told, False
        if first:
            log.warning("handlers of %r are too slow: messages are dropped, oldest first (the lagged event counts them)", self._topic)
        if told and not self._enqueue(self._tell_all):
            self._told = True

    def _tell_all(self) -> None:
        """One event for all that was dropped since the last: a handler that hangs must not make a queue of them."""
        with self._state:
            count, self._untold, self._told = self._untold, 0, True
        self._tell(count)
