"""What a named scenario is: something that happens to a swarm, the figures that come of it, and what must hold."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from solyd_swarm.simulation.experiment import Progress


@dataclass
class Outcome:
    """What came of one run of a scenario.

    Attributes:
        rows: (what, the paper's or peer's figure or what must hold, ours), to be printed side by side.
        figures: the same and more, for machines.
        failures: what should have held and did not, as sentences.
        curves: (x label, y label, {name: [(x, y)]}) to plot.
    """

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    curves: list[tuple[str, str, dict[str, list[tuple[float, float]]]]] = field(default_factory=list)

    def must(self, what: str, target: str, ours: str, holds: bool) -> None:
        """One line of the table, and a failure where it does not hold."""
        self.rows.append((what, target, ours))
        if not holds:
            self.failures.append(f"{what}: {ours}, but {target} is wanted")

    def note(self, what: str, ours: str, theirs: str = "") -> None:
        """One line of the table that nothing is required of."""
        self.rows.append((what, theirs, ours))


Perform = Callable[[int, int, Progress], Outcome]
"""(size, seed, progress) -> what came of it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario by name.

    Attributes:
        about: one sentence.
        small: size for the test suite (peers, unless `about` says otherwise).
        full: size that the published figures are for.
        least: the smallest size at which it can be run.
    """

    name: str
    about: str
    perform: Perform
    small: int
    full: int
    least: int = 2
