"""What every scenario of the simulator says must hold does hold, at the size that it has for tests."""

import json
import re

import pytest

from solyd_swarm.simulation.experiment import Progress
from solyd_swarm.simulation.scenarios import SCENARIOS, Outcome, Scenario
from solyd_swarm.simulation.tables import table

SEED = 1


def ignore(share: float) -> None:
    assert 0 <= share <= 1


def perform(scenario: Scenario, seed: int, progress: Progress = ignore) -> Outcome:
    outcome = scenario.perform(scenario.small, seed, progress)
    assert not outcome.failures, f"{scenario.name}, size {scenario.small}, seed {seed}\n" + table(outcome.rows)
    return outcome


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_holds(scenario: Scenario) -> None:
    outcome = perform(scenario, SEED)
    assert outcome.rows
    assert all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in outcome.rows)
    json.dumps(outcome.figures, allow_nan=False)
    assert outcome.figures["events"] > 0
    for x_label, y_label, lines in outcome.curves:
        assert x_label
        assert y_label
        assert all(len(point) == 2 for line in lines.values() for point in line)


def test_names_and_sentences() -> None:
    for name, scenario in SCENARIOS.items():
        assert name == scenario.name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert name != "list"
        assert scenario.about.endswith(".")
        assert 2 <= scenario.small <= scenario.full
