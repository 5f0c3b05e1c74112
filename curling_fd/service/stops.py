"""Whose stop was it? Tells the checkpoints' stops from the operator's pauses.

QEMU reports every stop and start of the guest with STOP and RESUME, in order and stamped in microseconds of
the same wall clock as ours, and does not say who asked. A checkpoint stops the guest at most once and then
starts it, be it that an operator had paused it before. So from `window_opens` to the next RESUME both are the
checkpoint's, and every other stop is a pause that somebody ordered. Two kinds of checkpoint take longer than
their stop, and tell more:

    snapshot     QEMU stops the guest right after the migration has become `active`
    precopy      and the first pass of incremental: the guest runs until QEMU's state is `finish-migrate`

Since a paused guest is started by the checkpoint that was under way, the pause must then be ordered again;
and while it lasts no checkpoint is taken.

One thing cannot be told: a `stop` on another monitor while the guest stands still for a checkpoint of the
loop, or is just about to. QEMU answers it, and starts the guest after the checkpoint all the same.
"""

from __future__ import annotations

import math
import time
from enum import Enum

from curling_fd.qmp.protocol import Event
from curling_fd.service.statistics import Counters

#: Microseconds by which the wall clock may drift, or be slewed, between two looks.
_CLOCK_STEP_US = 50_000


class Window(Enum):
    """What a window frames: a checkpoint of QEMU's loop, or a whole migration."""

    LOOP = "loop"
    SNAPSHOT = "snapshot"
    PRECOPY = "precopy"


class StopWatcher:
    """Follows STOP, RESUME and MIGRATION. Times are microseconds since the Unix epoch.

    Attributes:
        paused: the operator wants the guest to stand still.
        started_us: when the guest was started again in, or after, the last window; None until then.
    """

    def __init__(self, counters: Counters) -> None:
        self.paused = False
        self.started_us: int | None = 0
        self._counters = counters
        self._window = Window.LOOP
        self._counting = False
        self._opened = 0.0
        self._closed = 0.0
        self._active = False
        self._stopped_at: int | None = None
        self._stepped = False
        self._clock_ahead = clock_ahead_us()

    def window_opens(self, window: Window, now_us: int, *, counting: bool = True) -> None:
        """A checkpoint begins. Its stop goes into the statistics if `counting`."""
        self._window, self._counting = window, counting
        self._opened, self._closed = now_us, math.inf
        self._active, self._stopped_at, self.started_us = False, None, None
        self._stepped = False

    def clock_stepped(self, by_us: int) -> None:
        """The wall clock was set since the window opened: events may be of the old time or of the new."""
        self._opened = min(self._opened, self._opened + by_us)
        self._closed = max(self._closed, self._closed + by_us)
        self._stopped_at, self._stepped = None, True

    def look_at_clock(self) -> None:
        """Notice that the clock by which QEMU stamps its events has been set."""
        ahead = clock_ahead_us()
        step, self._clock_ahead = ahead - self._clock_ahead, ahead
        if abs(step) > _CLOCK_STEP_US:
            self.clock_stepped(step)

    def window_closes(self, now_us: int) -> None:
        """The checkpoint is over, though the guest was not started: it had been paused before."""
        self._closed = now_us

    def must_look(self, event: Event) -> bool:
        """Whether `feed` needs QEMU's run state to tell whose stop `event` is."""
        return event.name == "STOP" and self._window is Window.PRECOPY and self._is_ours(event)

    def feed(self, event: Event, run_state: str | None = None) -> bool:
        """Take an event; True if `paused` changed."""
        before = self.paused
        if event.name == "MIGRATION" and event.data.get("status") == "active":
            self._active = True
        elif event.name == "STOP":
            early = self._window is Window.SNAPSHOT and not self._active
            if self._is_ours(event) and not early and run_state != "paused":
                self._stopped_at = event.timestamp_us
            else:
                self.paused = True
        elif event.name == "RESUME":
            if self._is_ours(event):
                self._started(event.timestamp_us)
            else:
                self.paused = False
        return self.paused != before

    def started_before(self, now_us: int) -> bool:
        """Whether the guest was started in the window before that time: by a `cont` on another monitor."""
        return self.started_us is not None and self.started_us < now_us and not self._stepped

    def order(self, paused: bool) -> bool:
        """Take an operator's word that came by way of us; True if `paused` changed."""
        before, self.paused = self.paused, paused
        return paused != before

    def _is_ours(self, event: Event) -> bool:
        return self.started_us is None and self._opened <= event.timestamp_us <= self._closed

    def _started(self, now_us: int) -> None:
        if self._stopped_at is not None and self._counting:
            self._counters.stopped((now_us - self._stopped_at) / 1000)
        self.started_us = now_us


def now_us() -> int:
    """The wall clock by which QEMU stamps its events: microseconds since the Unix epoch."""
    return time.time_ns() // 1000


def clock_ahead_us() -> int:
    """How far that clock is ahead of one that nobody can set, microseconds."""
    return (time.time_ns() - time.monotonic_ns()) // 1000


def how_it_ended(event: Event) -> str | None:
    """How the guest ended, in words, if `event` says that it did."""
    if event.name == "SHUTDOWN":
        reason = str(event.data.get("reason", "unknown"))
        return "the guest powered off" if event.data.get("guest") else f"its QEMU was ended ({reason})"
    if event.name == "GUEST_PANICKED" and event.data.get("action") != "run":
        return "the guest's kernel panicked"
    return None
