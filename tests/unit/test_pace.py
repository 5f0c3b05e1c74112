"""When a checkpoint is due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from curling_fd.service.pace import Pace

times = st.floats(0, 1e9)


def test_an_epoch_ends_early_for_waiting_output_and_late_without() -> None:
    pace = Pace(shortest=0.01, longest=0.5)
    assert pace.due(100.0, output_waiting=True) == 100.01
    assert pace.due(100.0, output_waiting=False) == 100.5


@given(times, times, st.floats(0, 100), st.floats(0, 100))
def test_waiting_output_never_makes_an_epoch_longer(
    boundary: float, later: float, one: float, two: float
) -> None:
    pace = Pace(min(one, two), max(one, two))
    early, late = pace.due(boundary, output_waiting=True), pace.due(boundary, output_waiting=False)
    assert boundary <= early <= late
    if later >= boundary:
        assert pace.due(later, output_waiting=True) >= early
