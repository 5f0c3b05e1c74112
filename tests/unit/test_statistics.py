"""Counters, and the picture that is made of them."""

from __future__ import annotations

from collections import deque

import pytest
import trio
import trio.testing
from attrs.exceptions import FrozenInstanceError
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.service.statistics import WINDOW, Counters, percentile

numbers = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50)


async def test_nothing_has_happened_yet() -> None:
    statistics = Counters().statistics()
    assert statistics.stop_ms_last is statistics.stop_ms_p50 is statistics.stop_ms_p99 is None
    assert statistics.detection_ms is statistics.failover_ms is None
    assert statistics.checkpoints == statistics.committed == statistics.bytes_total == 0
    assert statistics.checkpoints_per_s == statistics.lag_ms == statistics.first_pass_ms == 0
    with pytest.raises(FrozenInstanceError):
        statistics.committed = 1  # type: ignore[misc]


async def test_a_picture_does_not_change_with_its_counters() -> None:
    counters = Counters()
    counters.captured(10, 1000)
    before = counters.statistics()
    counters.captured(20, 2000)
    assert (before.checkpoints, before.pages_last, before.bytes_total) == (1, 10, 1000)
    after = counters.statistics()
    assert (after.checkpoints, after.pages_last, after.bytes_last, after.bytes_total) == (2, 20, 2000, 3000)


async def test_stops_are_told_by_their_last_their_middle_and_their_worst() -> None:
    counters = Counters()
    for milliseconds in (*[2.0] * 98, 50.0, 1.23456):
        counters.stopped(milliseconds)
    statistics = counters.statistics()
    assert (statistics.stop_ms_last, statistics.stop_ms_p50, statistics.stop_ms_p99) == (1.235, 2.0, 50.0)


async def test_the_lag_grows_until_the_next_commit(mock_clock: trio.testing.MockClock) -> None:
    counters = Counters()
    counters.commit(1)
    mock_clock.jump(0.25)
    assert counters.statistics().lag_ms == pytest.approx(250)
    counters.commit(2)
    assert counters.statistics().lag_ms == 0
    assert counters.statistics().committed == 2


async def test_the_rate_is_that_of_the_last_seconds(mock_clock: trio.testing.MockClock) -> None:
    counters = Counters()
    for sequence in range(1, 101):
        mock_clock.jump(0.1)
        counters.commit(sequence)
    assert counters.statistics().checkpoints_per_s == pytest.approx(10, rel=0.05)
    mock_clock.jump(5)
    for sequence in range(101, 601):
        mock_clock.jump(0.01)
        counters.commit(sequence)
    assert counters.statistics().checkpoints_per_s == pytest.approx(100, rel=0.02)
    mock_clock.jump(60)
    assert counters.statistics().checkpoints_per_s == 0


async def test_samples_are_bounded_and_old_ones_forgotten() -> None:
    counters = Counters()
    for _ in range(WINDOW):
        counters.stopped(100.0)
        counters.captured(100, 1)
    for _ in range(WINDOW):
        counters.stopped(1.0)
        counters.captured(1, 1)
    statistics = counters.statistics()
    assert (statistics.stop_ms_p99, statistics.pages_p50) == (1.0, 1)
    assert statistics.checkpoints == statistics.bytes_total == 2 * WINDOW


async def test_what_is_known_of_the_last_failover_outlives_the_session() -> None:
    before = Counters()
    before.detection_ms, before.failover_ms = 1003.0, 41.5
    before.captured(1, 1)
    statistics = Counters(before).statistics()
    assert (statistics.detection_ms, statistics.failover_ms) == (1003.0, 41.5)
    assert statistics.checkpoints == 0


def test_percentiles_of_nothing_and_of_one() -> None:
    assert percentile([], 50) == 0
    assert percentile([7.0], 0) == percentile([7.0], 50) == percentile([7.0], 100) == 7


@settings(max_examples=100, deadline=None, derandomize=True)
@given(numbers, st.floats(0, 100))
def test_a_percentile_has_as_many_values_below_it_as_it_says(values: list[float], rank: float) -> None:
    found = percentile(deque(values), rank)
    assert found in values
    assert sum(value < found for value in values) <= len(values) * rank / 100
    assert sum(value <= found for value in values) >= len(values) * rank / 100
