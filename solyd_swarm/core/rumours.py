"""Rumours: what peers say of bodies that are gone, until it is believed, and what of it we miss.

That a body is gone is believed only when it was said twice with the same timestamp, by two peers or by one after a while, or by the
only neighbour; then the id enters our digest. Anybody can make it up: new neighbours are asked for it all the same (`Puller.seek`).
"""

from collections import OrderedDict
from collections.abc import Callable

from solyd_swarm.core.log import Log
from solyd_swarm.core.ordered import make_key
from solyd_swarm.core.wire import Item

MAX_WORDS = 8
"""Peers whose word on one id is remembered."""
MAX_SAID_ONCE = 65_536
"""Ids of which it is not believed yet. The oldest go first."""


class Rumours:
    """What is said to be gone, in one topic.

    Args:
        accept_age: seconds of age beyond which we want no body, at the time given.
        patience: seconds after which the same peer's word counts for the second time.
    """

    def __init__(self, log: Log, accept_age: Callable[[float], float], patience: float) -> None:
        self._log = log
        self._accept_age = accept_age
        self._patience = patience
        # Id -> who says that it is gone, of what timestamp, since when: until that is believed.
        self._words: OrderedDict[bytes, dict[bytes, tuple[int, float]]] = OrderedDict()
        self._missed: dict[bytes, None] = {}  # what is said to be gone although it would be young enough

    def is_believed(self, peer: bytes, id: bytes, timestamp: int, now: float, *, alone: bool) -> bool:
        """Notes that the peer says that a body is gone; whether that is enough now. `alone`: we have no other neighbour."""
        words = self._words.setdefault(id, {})
        said, since = words.pop(peer, (timestamp, now))
        since = since if said == timestamp else now
        if alone or now >= since + self._patience or any(other == timestamp for other, _ in words.values()):
            del self._words[id]
            return True
        words[peer] = (timestamp, since)
        if len(words) > MAX_WORDS:
            del words[next(iter(words))]
        if len(self._words) > MAX_SAID_ONCE:
            self._words.popitem(last=False)
        return False

    def believe(self, id: bytes, timestamp: int, age: float, now: float) -> bool:
        """From now on it is in our digest, and no round will show that we lack its body: true if we would still want it."""
        if not self._log.add_gone(id, timestamp, age, now) or age > self._accept_age(now):
            return False
        self._missed[id] = None
        return True

    def lacks(self, now: float) -> bool:
        """Whether there is something that others said is gone, and that we would still want."""
        since = now - self._accept_age(now)
        while self._missed:
            id = next(iter(self._missed))
            record = self._log.get(id)
            if record is not None and record.stream is None and record.born >= since:
                return True
            del self._missed[id]
        return False

    def in_runs(self, items: list[Item], step: int) -> list[list[bytes]]:
        """Ids in the order of the digest, apart where we know of something between; `step`: 1 if they are in our digest, 0 if not."""
        runs: list[list[bytes]] = []
        last = -1
        for timestamp, id in sorted(items):
            place = self._log.items.index(make_key(timestamp, id))
            if not runs or place != last + step:
                runs.append([])
            runs[-1].append(id)
            last = place
        return runs
