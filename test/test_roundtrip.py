"""Round-trip estimates: RFC 6298's arithmetic, and bounds that hold whatever is measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solyd_swarm.core.roundtrip import Peak, RoundTrip


def test_the_first_sample_and_the_second_are_the_rfc_s() -> None:
    """RFC 6298, section 2.2 and 2.3."""
    estimate = RoundTrip()
    estimate.sample(1.0)
    assert (estimate.smoothed, estimate.variance) == (1.0, 0.5)
    assert estimate.timeout(9.0, 0.0, 10.0) == 1.0 + 4 * 0.5
    estimate.sample(2.0)
    assert estimate.variance == pytest.approx(0.75 * 0.5 + 0.25 * 1.0)
    assert estimate.smoothed == pytest.approx(7 / 8 * 1.0 + 1 / 8 * 2.0)


def test_without_a_sample_the_initial_value_counts() -> None:
    assert RoundTrip().timeout(9.0, 0.1, 1.0) == 9.0


def test_a_steady_time_leaves_room_for_timers() -> None:
    estimate = RoundTrip()
    for _ in range(200):
        estimate.sample(0.001)
    assert 0.005 <= estimate.timeout(1.0, 0.0, 1.0) <= 0.01


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1), st.floats(1, 100))
def test_timeouts_stay_within_their_bounds(samples: list[float], least: float, most: float) -> None:
    estimate = RoundTrip()
    for sample in samples:
        estimate.sample(sample)
        assert least <= estimate.timeout(0.5, least, most) <= most


def test_a_peak_is_remembered_while_short_times_follow() -> None:
    peak = Peak()
    assert peak.timeout(0.3, 0.0, 10.0) == 0.3
    peak.sample(1.0)
    for _ in range(20):
        peak.sample(0.01)
    assert 1.5 < peak.timeout(0.3, 0.0, 10.0) < 2.0
    for _ in range(2000):
        peak.sample(0.01)
    assert peak.timeout(0.3, 0.0, 10.0) == pytest.approx(0.025)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1), st.floats(1, 100))
def test_what_a_peak_allows_stays_within_its_bounds(samples: list[float], least: float, most: float) -> None:
    peak = Peak()
    for sample in samples:
        peak.sample(sample)
        assert least <= peak.timeout(0.5, least, most) <= most
        assert peak.timeout(0.5, 0.0, 1e9) >= sample
