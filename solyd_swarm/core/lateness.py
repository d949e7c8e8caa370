"""How late the tree brings what was announced: when to graft, and when a way has become so much longer that it is to be sought anew."""

from solyd_swarm.core.roundtrip import Peak, RoundTrip

MAX_AUTHORS = 256
"""Authors whose last lag is kept: bounds a flood of fresh keys. The one unheard of for longest is forgotten."""
SOLO = 16
"""Envelopes in a row by one author after which the tree is taken to serve nobody else."""
USUAL_FADING = 0.97
"""Per envelope: what a lag was while the swarm formed says nothing about failures a hundred envelopes later."""
GRAFT_HOPS = 20
"""Hops by which a new tree may lag behind an announcement: what trees of 1,000 peers have."""


class Lateness:
    """Lags in seconds: the time from the first announcement of an envelope to the envelope; 0 where that came first.

    Args:
        initial, least, most: how long to wait before a graft, until the tree has lagged once, and the bounds after that.
    """

    def __init__(self, initial: float, least: float, most: float) -> None:
        self._initial = initial
        self._least = least
        self._most = most
        self._mean = RoundTrip()
        self._longest = Peak()
        self._usual = Peak(USUAL_FADING)  # of every envelope, also of those that came first, but for sudden lags
        self._last: dict[bytes, tuple[float, bytes]] = {}  # by author: lag and neighbour of the last envelope
        # The author of the last envelope, how many in a row are its, and its age when it came.
        self._latest = b""
        self._in_a_row = 0
        self._age = 0.0

    def sample(self, lag: float) -> None:
        """Takes in the lag of what nobody was asked for."""
        self._mean.sample(lag)
        self._longest.sample(lag)

    def timeout(self, round_trip: float | None, *, failing: bool = False) -> float:
        """How long to wait for the tree after an announcement.

        Args:
            round_trip: of the announcer's link, smoothed.
            failing: frames get lost, so that nothing is pruned; there is no harm in a second copy then.
        """
        if failing:
            return self._mean.timeout(self._initial, self._least, self._most)
        first = self._initial if round_trip is None else max(self._initial, GRAFT_HOPS / 2 * round_trip)
        return self._longest.timeout(min(first, self._most), self._least, self._most)

    def has_jumped(self, author: bytes, via: bytes, lag: float, age: float) -> bool:
        """Whether the tree has failed an envelope somewhere: it lags so much more than the author's last one, and than envelopes do here,
        that somebody must have grafted it, at least a timeout later.

        Where one author speaks alone, what an envelope is older than its last one was is a lag too: nobody announces anything where
        all neighbours wait. Where there are several, it must come from another neighbour than the author's last one did. What is the
        fastest way for one is none for the next; so those who still hear of it as before leave the tree at rest.

        Args:
            via: the neighbour that brought it; none where it was pulled.
            age: seconds since publication.
        """
        self._in_a_row = self._in_a_row + 1 if author == self._latest else 0
        alone = self._in_a_row >= SOLO
        growth = age - self._age if alone else 0.0
        self._latest, self._age = author, age
        before = self._last.pop(author, None)
        late = max(lag, growth)
        self._last[author] = late, via
        if len(self._last) > MAX_AUTHORS:
            del self._last[next(iter(self._last))]
        if before is not None and (alone or via != before[1]):
            # Announcements are gathered, and so are off by more than ages are.
            usual = 2 * before[0] + self._usual.timeout(self._least, self._least, self._most)
            if growth > usual or lag > max(usual, self._initial / 2):
                return True
        self._usual.sample(late)
        return False


class Pause:
    """A pause after each use, twice as long each time, within bounds; in seconds."""

    __slots__ = ("_least", "_most", "_next", "_until")

    def __init__(self, least: float, most: float) -> None:
        self._least = self._next = least
        self._most = most
        self._until = 0.0

    def reset(self) -> None:
        """The next pause is the shortest again; the present one goes on."""
        self._next = self._least

    def is_over(self, now: float) -> bool:
        return now >= self._until

    def begin(self, now: float) -> None:
        self._until = now + self._next
        self._next = min(2 * self._next, self._most)
