"""Whose stop is it: sequences of QEMU's events as they were seen, in QEMU's order and timing."""

from __future__ import annotations

import pytest

from curling_fd.qmp.protocol import Event
from curling_fd.service.statistics import Counters
from curling_fd.service.stops import StopWatcher, Window


def at(now_us: int, name: str, **data: object) -> Event:
    return Event(name, data, now_us)


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def watcher(counters: Counters) -> StopWatcher:
    """Of a guest that runs, between two checkpoints."""
    watcher = StopWatcher(counters)
    watcher.window_opens(Window.PRECOPY, 10, counting=False)
    watcher.feed(at(20, "STOP"), "finish-migrate")
    watcher.feed(at(30, "RESUME"))
    assert not watcher.paused
    return watcher


async def test_a_checkpoint_is_no_pause_and_its_stop_is_counted(
    watcher: StopWatcher, counters: Counters
) -> None:
    watcher.window_opens(Window.LOOP, 1000)
    assert watcher.started_us is None
    assert not watcher.feed(at(1100, "STOP"))
    assert not watcher.feed(at(3100, "RESUME"))
    assert watcher.started_us == 3100
    assert not watcher.paused
    assert counters.statistics().stop_ms_last == 2.0


async def test_the_stop_of_a_first_pass_is_not_counted(watcher: StopWatcher, counters: Counters) -> None:
    assert watcher.started_us == 30
    assert not counters.statistics().stop_ms_last


def test_a_stop_between_two_checkpoints_is_a_pause_until_the_next_start(watcher: StopWatcher) -> None:
    assert watcher.feed(at(500, "STOP"))
    assert watcher.paused
    assert watcher.feed(at(900, "RESUME"))
    assert not watcher.paused


def test_a_pause_just_before_a_checkpoint_outlives_the_start_after_it(watcher: StopWatcher) -> None:
    watcher.window_opens(Window.LOOP, 1000)
    assert watcher.feed(at(990, "STOP"))  # told late
    assert not watcher.feed(at(2000, "RESUME"))  # QEMU starts it all the same
    assert watcher.paused
    assert watcher.started_us == 2000


def test_a_pause_just_after_a_checkpoint_is_one_though_the_checkpoint_is_still_being_seen_to(
    watcher: StopWatcher,
) -> None:
    watcher.window_opens(Window.LOOP, 1000)
    watcher.feed(at(1100, "STOP"))
    watcher.feed(at(1200, "RESUME"))
    assert watcher.feed(at(1210, "STOP"))
    assert watcher.paused


async def test_a_pause_that_qemus_loop_overtook_is_told_after_the_start(
    watcher: StopWatcher, counters: Counters
) -> None:
    """QEMU says STOP when all CPUs stand; its loop may take a whole checkpoint while it waits for them."""
    watcher.window_opens(Window.LOOP, 1000)
    assert not watcher.feed(at(1500, "RESUME"))
    assert watcher.feed(at(1600, "STOP"))
    assert watcher.paused
    assert not counters.statistics().stop_ms_last


def test_pauses_by_way_of_us_count_at_once_and_once(watcher: StopWatcher) -> None:
    assert watcher.order(paused=True)
    assert not watcher.order(paused=True)
    assert not watcher.feed(at(500, "STOP"))
    assert watcher.paused
    assert watcher.order(paused=False)
    assert not watcher.feed(at(600, "RESUME"))
    assert not watcher.paused


def test_a_start_before_qemu_was_told_to_spoils_the_checkpoint(watcher: StopWatcher) -> None:
    watcher.window_opens(Window.LOOP, 1000)
    watcher.feed(at(1100, "STOP"))
    assert not watcher.started_before(1200)
    watcher.feed(at(1150, "RESUME"))
    assert watcher.started_before(1200)
    watcher.window_opens(Window.LOOP, 2000)
    watcher.feed(at(2100, "STOP"))
    watcher.feed(at(2201, "RESUME"))
    assert not watcher.started_before(2200)


# Whole migrations take longer than their stop.


async def test_a_snapshot_stops_the_guest_when_it_has_become_active(
    watcher: StopWatcher, counters: Counters
) -> None:
    watcher.window_opens(Window.SNAPSHOT, 1000)
    watcher.feed(at(1010, "MIGRATION", status="setup"))
    watcher.feed(at(8000, "MIGRATION", status="active"))
    stop = at(10_000, "STOP")
    assert not watcher.must_look(stop)
    assert not watcher.feed(stop)
    assert not watcher.feed(at(16_000, "RESUME"))
    watcher.feed(at(900_000, "MIGRATION", status="completed"))
    watcher.window_closes(910_000)
    assert not watcher.paused
    assert counters.statistics().stop_ms_last == 6.0


def test_a_pause_while_a_snapshot_is_set_up_outlives_the_start_after_it(watcher: StopWatcher) -> None:
    """QEMU 7.2 starts the guest; QEMU 11 leaves it as it was, and tells nothing."""
    watcher.window_opens(Window.SNAPSHOT, 1000)
    watcher.feed(at(1010, "MIGRATION", status="setup"))
    assert watcher.feed(at(5000, "STOP"))
    watcher.feed(at(8000, "MIGRATION", status="active"))
    assert not watcher.feed(at(16_000, "RESUME"))
    assert watcher.paused


def test_a_pause_while_a_snapshot_is_written_is_one(watcher: StopWatcher) -> None:
    watcher.window_opens(Window.SNAPSHOT, 1000)
    watcher.feed(at(8000, "MIGRATION", status="active"))
    watcher.feed(at(10_000, "STOP"))
    watcher.feed(at(16_000, "RESUME"))
    assert watcher.feed(at(500_000, "STOP"))
    watcher.window_closes(910_000)
    assert watcher.feed(at(950_000, "RESUME"))
    assert not watcher.paused


def test_a_paused_guest_that_a_snapshot_left_as_it_was_is_resumed_by_its_operator(
    watcher: StopWatcher,
) -> None:
    watcher.window_opens(Window.SNAPSHOT, 1000)
    watcher.feed(at(990, "STOP"))
    watcher.feed(at(8000, "MIGRATION", status="active"))
    watcher.window_closes(900_000)
    assert watcher.paused
    assert watcher.feed(at(950_000, "RESUME"))
    assert not watcher.paused


async def test_a_precopy_stops_the_guest_in_the_state_finish_migrate(
    watcher: StopWatcher, counters: Counters
) -> None:
    watcher.window_opens(Window.PRECOPY, 1000)
    watcher.feed(at(1010, "MIGRATION", status="active"))
    stop = at(500_000, "STOP")
    assert watcher.must_look(stop)
    assert not watcher.feed(stop, "finish-migrate")
    assert not watcher.feed(at(530_000, "RESUME"))
    assert not watcher.paused
    assert counters.statistics().stop_ms_last == 30.0


def test_a_pause_in_a_precopy_outlives_the_start_after_it(watcher: StopWatcher) -> None:
    watcher.window_opens(Window.PRECOPY, 1000)
    stop = at(300_000, "STOP")
    assert watcher.must_look(stop)
    assert watcher.feed(stop, "paused")
    assert not watcher.feed(at(530_000, "RESUME"))
    assert watcher.paused


def test_nobody_must_look_between_checkpoints(watcher: StopWatcher) -> None:
    assert not watcher.must_look(at(500, "STOP"))
    assert not watcher.must_look(at(500, "RESUME"))


HOUR = 3_600_000_000


@pytest.mark.parametrize("step", [-HOUR, HOUR])
@pytest.mark.parametrize("stamped", ["before", "after", "between"])
def test_a_clock_that_is_set_during_a_checkpoint_makes_no_pause_of_it(
    watcher: StopWatcher, counters: Counters, step: int, stamped: str
) -> None:
    opened = 2 * HOUR
    watcher.window_opens(Window.LOOP, opened)
    watcher.clock_stepped(step)
    stop, start = (opened + 100 + (step if new else 0) for new in (stamped == "after", stamped != "before"))
    assert not watcher.feed(at(stop, "STOP"))
    assert not watcher.feed(at(start, "RESUME"))
    assert watcher.started_us == start
    assert not watcher.started_before(opened + 50), "which clock that is of cannot be told"


def test_a_clock_that_was_set_before_the_checkpoint_changes_nothing(watcher: StopWatcher) -> None:
    watcher.clock_stepped(-HOUR)
    watcher.window_opens(Window.LOOP, 1000)
    assert watcher.feed(at(990, "STOP"))
    assert watcher.paused
