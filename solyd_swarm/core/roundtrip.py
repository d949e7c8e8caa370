"""Round-trip times: what timeouts are made of (RFC 6298)."""

_ALPHA = 1 / 8
_BETA = 1 / 4
_VARIANCES = 4
_GRANULARITY = 0.005
"""Seconds that a timer, a busy loop or a batch may add without the network having anything to do with it."""

_FADING = 0.99
_MAX_TRANSIT = 1.0
"""Seconds, at most, that something is taken to have been on its way: bounds a peer that answers late to make what it relays look
old."""


class RoundTrip:
    """A smoothed time and its mean deviation (RFC 6298, section 2), in seconds.

    Whoever takes samples keeps to Karn's rule (section 3): none of what was asked for twice.
    """

    __slots__ = ("smoothed", "variance")

    def __init__(self) -> None:
        self.smoothed: float | None = None
        self.variance = 0.0

    def sample(self, seconds: float) -> None:
        """Takes in one measurement."""
        if self.smoothed is None:
            self.smoothed, self.variance = seconds, seconds / 2
        else:
            self.variance += _BETA * (abs(self.smoothed - seconds) - self.variance)
            self.smoothed += _ALPHA * (seconds - self.smoothed)

    @property
    def transit(self) -> float:
        """How long a frame is on its way, about: half of it. Ages that left it out would make members far apart let an id expire at
        times that differ by all the hops between them, and digests would differ at every moment."""
        return min(_MAX_TRANSIT, (self.smoothed or 0.0) / 2)

    def timeout(self, initial: float, least: float, most: float) -> float:
        """How long to wait before something may be taken for lost: SRTT + 4 RTTVAR within bounds, `initial` without a sample."""
        if self.smoothed is None:
            return initial
        return min(max(self.smoothed + max(_GRANULARITY, _VARIANCES * self.variance), least), most)


class Peak:
    """The longest of the latest times, in seconds: for what takes turns between short and long, where a mean and its deviation forget
    the long ones in between.

    Args:
        fading: what it fades to from one sample to the next; by default to a half in about seventy.
    """

    __slots__ = ("_fading", "seconds")

    def __init__(self, fading: float = _FADING) -> None:
        self._fading = fading
        self.seconds: float | None = None

    def sample(self, seconds: float) -> None:
        """Takes in one measurement."""
        self.seconds = seconds if self.seconds is None else max(seconds, self._fading * self.seconds)

    def timeout(self, initial: float, least: float, most: float) -> float:
        """How long to wait before something may be taken for lost: twice the peak, within bounds; `initial` without a
        sample."""
        if self.seconds is None:
            return initial
        return min(max(2 * self.seconds + _GRANULARITY, least), most)
