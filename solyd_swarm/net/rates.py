"""How often something may be done for others: token buckets (as in RFC 2697), one for each who asks and one for all together."""

from collections import OrderedDict

MAX_ASKERS = 256
"""Askers whose bucket is remembered: bounds a flood of addresses; the one that asked longest ago goes, and starts afresh. What all
of them together may have done is bounded all the same."""


class Rates:
    """Requests granted or not; times are those of one monotonic clock.

    Args:
        burst, every: each asker has so many requests at once, and one more every so many seconds.
        total_burst, total_every: the same for all together.
    """

    def __init__(self, burst: float, every: float, total_burst: float, total_every: float) -> None:
        self._burst, self._every = burst, every
        self._total_burst, self._total_every = total_burst, total_every
        self._askers: OrderedDict[str, tuple[float, float]] = OrderedDict()  # with what is left, and when that was
        self._total: tuple[float, float] | None = None

    def take(self, asker: str, now: float) -> bool:
        """Whether one more is granted, which then counts."""
        left, at = self._askers.get(asker, (self._burst, now))
        own = min(self._burst, left + (now - at) / self._every)
        left, at = self._total or (self._total_burst, now)
        together = min(self._total_burst, left + (now - at) / self._total_every)
        granted = own >= 1 and together >= 1
        self._askers[asker] = (own - granted, now)
        self._askers.move_to_end(asker)
        while len(self._askers) > MAX_ASKERS:
            self._askers.popitem(last=False)
        self._total = (together - granted, now)
        return granted
