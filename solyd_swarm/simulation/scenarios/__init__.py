"""All named scenarios."""

from solyd_swarm.simulation.scenarios import failures, trees
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

__all__ = ["SCENARIOS", "Outcome", "Scenario"]

_MODULES = (trees, failures)
SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for module in _MODULES for scenario in module.SCENARIOS}
