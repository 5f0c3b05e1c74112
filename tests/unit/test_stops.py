"""Whose stop was it: the checkpoint's, or an operator's?"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.qmp.protocol import Event
from curling_fd.service.statistics import Counters
from curling_fd.service.stops import StopWatcher, Window


@define
class Watched:
    """A watcher, and the stops it counted in milliseconds."""

    counted: list[float] = field(factory=list)
    watcher: StopWatcher = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.watcher = StopWatcher(self)  # type: ignore[arg-type]

    def stopped(self, milliseconds: float) -> None:
        self.counted.append(milliseconds)

    def feed(self, name: str, at: int, run_state: str | None = None, **data: Any) -> bool:
        return self.watcher.feed(Event(name, data, at), run_state)

    @property
    def paused(self) -> bool:
        return self.watcher.paused


@pytest.fixture
def it() -> Watched:
    return Watched()


async def test_stops_of_checkpoints_end_up_in_the_statistics() -> None:
    counters = Counters()
    watcher = StopWatcher(counters)
    for n in range(3):
        watcher.window_opens(Window.LOOP, 1000 * n)
        watcher.feed(Event("STOP", {}, 1000 * n + 100))
        watcher.feed(Event("RESUME", {}, 1000 * n + 350))
    assert counters.statistics().stop_ms_last == 0.25
    await trio.lowlevel.checkpoint()


def test_a_stop_outside_every_checkpoint_is_a_pause(it: Watched) -> None:
    assert it.feed("STOP", 100)
    assert it.paused
    assert not it.feed("STOP", 110), "it was paused already"
    assert it.feed("RESUME", 200)
    assert not it.paused
    assert it.counted == []


def test_a_stop_inside_a_checkpoint_is_its_own(it: Watched) -> None:
    it.watcher.window_opens(Window.LOOP, 1000)
    assert not it.feed("STOP", 1100)
    assert not it.paused
    assert it.watcher.started_us is None
    assert not it.feed("RESUME", 3100)
    assert it.watcher.started_us == 3100
    assert it.counted == [2.0]


def test_a_stop_after_the_checkpoints_start_is_a_pause_though_the_window_is_open(it: Watched) -> None:
    it.watcher.window_opens(Window.LOOP, 1000)
    it.feed("STOP", 1100)
    it.feed("RESUME", 1200)
    assert it.feed("STOP", 1300)
    assert it.paused


def test_a_pause_just_before_a_checkpoint_is_told_by_its_time_however_late_it_is_heard_of(
    it: Watched,
) -> None:
    it.watcher.window_opens(Window.LOOP, 1000)
    assert it.feed("STOP", 999)
    assert it.paused
    # QEMU's checkpoint loop starts a paused guest again; the pause is still wanted.
    assert not it.feed("RESUME", 1200)
    assert it.paused
    assert it.watcher.started_us == 1200
    assert it.counted == [], "the guest did not stand still for the checkpoint"


def test_a_paused_guest_that_is_not_started_is_told_by_the_end_of_the_window(it: Watched) -> None:
    it.feed("STOP", 500)
    it.watcher.window_opens(Window.LOOP, 1000)
    it.watcher.window_closes(2000)
    assert it.feed("RESUME", 2001), "that was the operator"
    assert not it.paused


def test_a_first_pass_stops_the_guest_and_is_not_counted(it: Watched) -> None:
    it.watcher.window_opens(Window.PRECOPY, 0, counting=False)
    it.feed("STOP", 100, "finish-migrate")
    it.feed("RESUME", 9100)
    assert not it.paused
    assert it.counted == []
    assert it.watcher.started_us == 9100


def test_during_a_plain_migration_only_qemus_state_tells(it: Watched) -> None:
    it.watcher.window_opens(Window.PRECOPY, 0)
    stop = Event("STOP", {}, 100)
    assert it.watcher.must_look(stop)
    assert it.feed("STOP", 100, "paused")
    assert it.paused
    it.watcher.window_opens(Window.PRECOPY, 1000)
    it.feed("STOP", 1100, "finish-migrate")
    it.feed("RESUME", 1200)
    assert it.counted == [0.1]


@pytest.mark.parametrize("window", [Window.LOOP, Window.SNAPSHOT])
def test_elsewhere_nobody_need_look(it: Watched, window: Window) -> None:
    assert not it.watcher.must_look(Event("STOP", {}, 1))
    it.watcher.window_opens(window, 0)
    assert not it.watcher.must_look(Event("STOP", {}, 1))
    it.watcher.window_opens(Window.PRECOPY, 0)
    assert not it.watcher.must_look(Event("RESUME", {}, 1))
    it.feed("STOP", 1, "finish-migrate")
    it.feed("RESUME", 2)
    assert not it.watcher.must_look(Event("STOP", {}, 3)), "it is over"


def test_a_background_snapshot_stops_the_guest_only_once_it_is_active(it: Watched) -> None:
    it.watcher.window_opens(Window.SNAPSHOT, 0)
    assert it.feed("STOP", 100), "before that it is a pause"
    it.feed("RESUME", 150)
    it.watcher.order(False)
    it.watcher.window_opens(Window.SNAPSHOT, 200)
    it.feed("MIGRATION", 210, status="setup")
    it.feed("MIGRATION", 220, status="active")
    assert not it.feed("STOP", 230)
    it.feed("RESUME", 1230)
    assert not it.paused
    assert it.counted == [1.0]


def test_an_operators_word_counts_at_once(it: Watched) -> None:
    assert it.watcher.order(True)
    assert not it.watcher.order(True)
    assert not it.feed("STOP", 100)
    assert it.watcher.order(False)
    assert not it.feed("RESUME", 200)
    assert not it.paused


def test_other_events_say_nothing(it: Watched) -> None:
    it.watcher.window_opens(Window.LOOP, 0)
    for name in ("MIGRATION_PASS", "RTC_CHANGE", "NIC_RX_FILTER_CHANGED", "POWERDOWN"):
        assert not it.feed(name, 10)
    assert it.watcher.started_us is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["checkpoint", "pause", "resume"]), max_size=30))
def test_pauses_and_checkpoints_in_any_order_are_told_apart(story: list[str]) -> None:
    """No checkpoint is begun while the guest is paused, as the session sees to."""
    it, now, wanted, checkpoints = Watched(), 0, False, 0
    for what in story:
        now += 100
        if what == "checkpoint" and not wanted:
            it.watcher.window_opens(Window.LOOP, now)
            assert not it.feed("STOP", now + 10)
            assert not it.feed("RESUME", now + 30)
            checkpoints += 1
        elif what == "pause" and not wanted:
            assert it.feed("STOP", now)
            wanted = True
        elif what == "resume" and wanted:
            assert it.feed("RESUME", now)
            wanted = False
        assert it.paused == wanted
    assert it.counted == [0.02] * checkpoints
