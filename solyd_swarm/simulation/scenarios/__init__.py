"""All named scenarios."""

from solyd_swarm.simulation.scenarios import digests, expiry, failures, joins, neighbours, trees, trust
from solyd_swarm.simulation.scenarios.base import Outcome, Scenario

__all__ = ["SCENARIOS", "Outcome", "Scenario"]

_MODULES = (trees, joins, failures, neighbours, digests, expiry, trust)
SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for module in _MODULES for scenario in module.SCENARIOS}
