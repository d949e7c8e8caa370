"""Who of a crowd answers and dials a newcomer at once. All of them doing so would be a storm, which holds up the newcomer itself."""

import asyncio
import random
from collections.abc import Callable

CROWD, ANSWERS = 12, 8
"""With more known members than `CROWD` about so many of them answer a newcomer, by chance: more than it has room for."""

CROWD_DELAY = 0.02
"""Seconds for each known member of a crowd, within which those who do not answer dial the newcomer: after one to two times that long."""

MAX_WAITING = 64
"""Newcomers that are dialled later: a flood of replays brings many. The rest is reported when it is heard again."""


class Welcome:
    """Decides for each newcomer; owns the timers of those that wait.

    Args:
        report: called with the service's name when its time has come.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._waiting: dict[str, asyncio.TimerHandle] = {}

    def at_once(self, name: str, crowd: int) -> bool:
        """Whether to answer and report it now; else it is reported later.

        Args:
            crowd: members known, the newcomer included.
        """
        if crowd <= CROWD or random.random() < ANSWERS / crowd:
            return True
        if name not in self._waiting and len(self._waiting) < MAX_WAITING:
            delay = CROWD_DELAY * crowd * random.uniform(1, 2)
            self._waiting[name] = asyncio.get_running_loop().call_later(delay, self._due, name)
        return False

    def _due(self, name: str) -> None:
        del self._waiting[name]
        self._report(name)

    def clear(self) -> None:
        """Nobody waits any more."""
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()
