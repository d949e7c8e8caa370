"""All named scenarios."""

from solyd_swarm.simulation.scenarios import trees
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

__all__ = ["SCENARIOS", "Outcome", "Scenario"]

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in (*trees.SCENARIOS,)}
