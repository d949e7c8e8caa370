"""Which of our addresses others hear of: those that somebody has managed to reach. Without IO.

Private addresses are for the LAN and are always told; nobody outside it may dial them (see `solyd_swarm.discovery.scope`). A global
address of an interface is told from the start, lest the first two members never meet, until dials of it fail; an address of a
translator in between (NAT), only once somebody came in by it. The idea is that of libp2p's AutoNAT.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

Address = tuple[str, int]

WITNESSES = 2
"""Hosts whose dials must have failed, with none that succeeded since, before an address is told no more: a single liar is not enough."""
RETEST = 300.0
"""Seconds after which an address that was reached is tried anew, as mappings and firewalls change."""
RETRY = 5.0
RETRY_MAX = 600.0
"""Seconds between tries of one that was not; the pause doubles, up to the longest, once enough have failed."""
MAX_CANDIDATES = 16


@dataclass(slots=True)
class _Candidate:
    own: bool
    due: float
    reached: bool = False
    failed: dict[str, None] = field(default_factory=dict)
    pause: float = RETRY

    @property
    def is_told(self) -> bool:
        return (self.own or self.reached) and len(self.failed) < WITNESSES


class Reachable:
    """The global addresses that may be ours, and what became of dials of them. Times are those of one monotonic clock."""

    def __init__(self) -> None:
        self._candidates: dict[Address, _Candidate] = {}

    def update(self, own: Iterable[Address], outside: Iterable[Address], now: float) -> None:
        """There are these: of our interfaces, and of translators. What is gone is forgotten."""
        mine = dict.fromkeys(own)
        wanted = dict.fromkeys([*mine, *outside][:MAX_CANDIDATES])
        self._candidates = {address: self._candidates.get(address) or _Candidate(address in mine, now) for address in wanted}

    def start_over(self, now: float) -> None:
        """Our network has changed: what was known of it counts no more."""
        for address, candidate in self._candidates.items():
            self._candidates[address] = _Candidate(candidate.own, now)

    def __contains__(self, address: Address) -> bool:
        return address in self._candidates

    def reached(self, address: Address, now: float) -> bool:
        """Somebody has reached us there. Returns whether that is news."""
        candidate = self._candidates.get(address)
        if candidate is None:
            return False
        is_news = not candidate.reached
        candidate.reached, candidate.due, candidate.pause = True, now + RETEST, RETRY
        candidate.failed.clear()
        return is_news

    def failed(self, address: Address, host: str, now: float) -> bool:
        """A dial from this host did not reach us there. Returns whether the address is told no more for it."""
        candidate = self._candidates.get(address)
        if candidate is None:
            return False
        was_told, is_news = candidate.is_told, host not in candidate.failed
        candidate.failed[host] = None
        if len(candidate.failed) >= WITNESSES:
            candidate.reached = False
            while len(candidate.failed) > WITNESSES:
                del candidate.failed[next(iter(candidate.failed))]
        candidate.due = now + (0.0 if is_news and candidate.is_told else candidate.pause)  # a second opinion, at once
        candidate.pause = min(2 * candidate.pause, RETRY_MAX)
        return was_told and not candidate.is_told

    def due(self, now: float) -> list[Address]:
        """Those that are to be tried."""
        return [address for address, candidate in self._candidates.items() if candidate.due <= now]

    def doubters(self, address: Address) -> tuple[str, ...]:
        """Hosts whose dials have failed since somebody last came in."""
        candidate = self._candidates.get(address)
        return tuple(candidate.failed) if candidate is not None else ()

    def is_told(self, address: Address) -> bool:
        """Whether others may hear of it."""
        candidate = self._candidates.get(address)
        return candidate is not None and candidate.is_told

    def told(self) -> list[Address]:
        """What others may hear of, those first that were reached."""
        found = [address for address, candidate in self._candidates.items() if candidate.is_told]
        return sorted(found, key=lambda address: not self._candidates[address].reached)
