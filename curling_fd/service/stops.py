"""Whose stop was it? Tells the checkpoints' stops from the operator's pauses, by QEMU's own clock.

QEMU reports every stop and start of the guest with STOP and RESUME, stamped in microseconds of the same
wall clock as ours, and does not say who asked. A stop inside a checkpoint's window is the checkpoint's; any
other is a pause somebody ordered. QEMU's checkpoint loop starts a paused guest again, so no checkpoint may be
taken while it is paused, and one that was under way must be followed by a new `stop`.
"""

from __future__ import annotations

import math

from curling_fd.qmp.protocol import Event
from curling_fd.service.statistics import Counters


class StopWatcher:
    """Follows STOP and RESUME. `window_opens` and `window_closes` frame each checkpoint.

    Attributes:
        paused: the operator wants the guest to stand still.
    """

    def __init__(self, counters: Counters) -> None:
        self.paused = False
        self._counters = counters
        # The first pass ends with a stop too: until the first checkpoint every stop is ours.
        self._opened = 0.0
        self._closed = math.inf
        self._first_pass = True
        self._stopped_at: int | None = None

    def window_opens(self, now_us: int) -> None:
        """A checkpoint begins: a stop from `now_us` on is its own."""
        self._opened, self._closed, self._first_pass = now_us, math.inf, False

    def window_closes(self, now_us: int) -> None:
        self._closed = now_us

    def feed(self, event: Event) -> bool:
        """Take a STOP or RESUME; True if `paused` changed."""
        ours = self._opened <= event.timestamp_us <= self._closed
        before = self.paused
        if event.name == "STOP":
            if ours:
                self._stopped_at = event.timestamp_us
            else:
                self.paused = True
        elif event.name == "RESUME":
            if self._stopped_at is not None:
                if not self._first_pass:
                    self._counters.stopped((event.timestamp_us - self._stopped_at) / 1000)
                self._stopped_at = None
            elif not ours:
                self.paused = False
        return self.paused != before
