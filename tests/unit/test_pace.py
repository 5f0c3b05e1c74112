"""When a checkpoint is due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from curling_fd.service.pace import Boundary, Pace

PACE = Pace(shortest=0.01, longest=0.5)
spans = st.floats(0, 100)


def test_an_epoch_ends_early_for_waiting_output_and_late_without() -> None:
    last = Boundary(100.0, 100.001)
    assert PACE.due(last, output_waiting=True) == 100.01
    assert PACE.due(last, output_waiting=False) == 100.5


def test_a_guest_that_stood_still_for_long_runs_as_long_whatever_waits() -> None:
    assert PACE.due(Boundary(100.0, 100.125), output_waiting=True) == 100.25


def test_it_never_runs_longer_than_the_longest_epoch_though() -> None:
    assert PACE.due(Boundary(100.0, 100.4), output_waiting=True) == 100.5


@given(spans, spans, spans, spans)
def test_waiting_output_never_makes_an_epoch_longer(
    stopped: float, stood: float, one: float, two: float
) -> None:
    pace, last = Pace(min(one, two), max(one, two)), Boundary(stopped, stopped + stood)
    early, late = pace.due(last, output_waiting=True), pace.due(last, output_waiting=False)
    assert stopped <= early <= late
