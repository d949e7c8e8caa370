"""Findings, and the checkup that gathers them: many small looks, side by side, none of which can stop or outlast the others."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("solyd_swarm.doctor")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look has found.

    Attributes:
        part: what was looked at, one word; several findings may share it.
        works: True, False, or None where it cannot be told, or does not matter.
        says: whole sentences.
        advice: what to do, whole sentences; empty if nothing is to be done.
        figures: the same for programs: plain values, keys that stay.
        way: the way of finding peers that this is evidence for: it works (True) or may work (None).
    """

    part: str
    works: bool | None
    says: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    way: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One independent look. It must bear being cancelled, and owns whatever it opens."""

    part: str
    look: Callable[[], Awaitable[Sequence[Finding]]]


class Checkup:
    """Runs checks side by side.

    Args:
        checks: what to look at.
        limit: seconds for each of them.
    """

    def __init__(self, checks: Sequence[Check], limit: float) -> None:
        self._checks = tuple(checks)
        self._limit = limit

    async def run(self) -> list[Finding]:
        """The findings, in the order of the checks."""
        found = await asyncio.gather(*(self._run(check) for check in self._checks))
        return [finding for findings in found for finding in findings]

    async def _run(self, check: Check) -> Sequence[Finding]:
        try:
            async with asyncio.timeout(self._limit):
                return await check.look()
        except TimeoutError:
            return [Finding(check.part, None, f"Looking at the {check.part} took longer than {self._limit:.0f} s and was given up.")]
        except Exception as error:  # one look that fails, in whatever way, takes nothing from the others
            log.exception("looking at the %s failed", check.part)
            return [Finding(check.part, None, f"The {check.part} could not be looked at: {error or type(error).__name__}.")]


def listed(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def counted(number: int, one: str, many: str = "") -> str:
    """``1 host``, ``2 hosts``, ``no host``."""
    return f"{number or 'no'} {one if number < 2 else many or one + 's'}"
