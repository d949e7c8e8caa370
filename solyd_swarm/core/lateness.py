"""How late the tree brings what was announced, and how old: when to graft, and when a way has become so much longer, or shorter, that
ways are to be sought anew."""

from collections import deque

from solyd_swarm.core.roundtrip import Peak, RoundTrip

SOLO = 16
"""Envelopes in a row by one author after which the tree is taken to serve nobody else."""
USUAL_FADING = 0.97
"""Per envelope: what a lag was while the swarm formed says nothing about failures a hundred envelopes later."""
FALL = 0.1
"""Share by which the age on arrival falls, at least, where a shorter way has opened: less is hardly worth a race."""
LEAST_FALL = 0.002
"""The same in seconds: ages are told in whole milliseconds, and rounded at every hop."""
FALL_SAMPLES = 3
"""Envelopes that were all older than that: one that was late by chance is followed by one that seems early."""
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
        # The author of the last envelope, how many before that were its in a row, its age when it came, and its lag.
        self._author = b""
        self._in_a_row = 0
        self._age = 0.0
        self._lag = 0.0
        self._ages: deque[float] = deque(maxlen=FALL_SAMPLES)
        self.has_fallen = False
        """Whether the last envelope came by a shorter way than those before; where one author speaks alone."""

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

    @property
    def is_alone(self) -> bool:
        """Whether one author speaks alone."""
        return self._in_a_row >= SOLO

    def has_jumped(self, author: bytes, lag: float, age: float) -> bool:
        """Whether the tree has failed an envelope somewhere: it lags so much more than the last one, and than envelopes do here, that
        somebody must have grafted it, at least a timeout later. What it is older than the last one was on arrival is a lag too: nobody
        announces anything where all neighbours wait.

        Only where one author speaks alone. With several the tree is a compromise, in which lags come and go with every swap; if each
        made somebody seek what is the fastest way for whoever speaks next, it would not come to rest.

        Args:
            age: seconds since publication.
        """
        self._in_a_row = self._in_a_row + 1 if author == self._author else 0
        is_alone = self.is_alone
        low = min(self._ages, default=0.0)
        self.has_fallen = is_alone and low - age > max(FALL * low, LEAST_FALL)
        self._ages.append(age)
        growth = age - self._age if is_alone else 0.0
        # Announcements are gathered, and so are off by more than ages are.
        usual = 2 * self._lag + self._usual.timeout(self._least, self._least, self._most)
        self._author, self._age, self._lag = author, age, max(lag, growth)
        if is_alone and (growth > usual or lag > max(usual, self._initial / 2)):
            return True
        self._usual.sample(self._lag)
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
