"""Candidates of one topic that the DHT has told of, kept for when it tells of them no more."""

import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from solyd_swarm.discovery.source import Candidate

MAX_CACHED = 1_024
MAX_REPEATED = 32
CACHE_SECONDS = 3_600.0
"""How long a candidate is handed out again: longer than its record lives, as the record may be what an attacker keeps from us."""


@dataclass(frozen=True, slots=True)
class _Cached:
    slot: bytes
    sequence: int
    candidate: Candidate
    heard: float


class CandidateCache:
    """The newest candidate of each instance, bounded.

    Args:
        monotonic: seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._cached: OrderedDict[bytes, _Cached] = OrderedDict()
        self._instances: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def add(self, slot: bytes, sequence: int, instance: bytes, candidate: Candidate) -> bool:
        """Remember what a record says of an instance. Returns False if this, or something newer, was known."""
        known = self._cached.get(instance)
        if known is not None:
            if known.sequence >= sequence:
                return False
            self._instances.pop(known.slot, None)
        self._cached[instance] = _Cached(slot, sequence, candidate, self._monotonic())
        self._cached.move_to_end(instance)
        self._instances[slot] = instance
        # Attack: a member makes up instances. The one heard of longest ago is forgotten, and would be reported again.
        while len(self._cached) > MAX_CACHED:
            self._forget(next(iter(self._cached)))
        return True

    def withdraw(self, slot: bytes, sequence: int) -> None:
        """Forget the candidate of a slot: its record was withdrawn."""
        instance = self._instances.get(slot)
        if instance is not None and self._cached[instance].sequence < sequence:
            self._forget(instance)

    def recent(self) -> list[Candidate]:
        """Candidates heard of within the last hour: all if they are few, else any of them."""
        now = self._monotonic()
        live = [each.candidate for each in self._cached.values() if now - each.heard < CACHE_SECONDS]
        # Random ones: however many instances an attacker makes up after an honest one, that has its share of the tries.
        return random.sample(live, min(MAX_REPEATED, len(live)))

    def _forget(self, instance: bytes) -> None:
        self._instances.pop(self._cached.pop(instance).slot, None)
