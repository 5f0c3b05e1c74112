"""How far a first pass has come, how fast it is, and how fast it may be."""

from __future__ import annotations

from collections import deque
from typing import Any

import trio
from attrs import frozen

from curling_fd.disk.copy import CopyProgress
from curling_fd.units import format_duration, format_size

#: Seconds that a speed is the mean of: a piece is 4 MiB, and a slow link takes its time for one.
_WINDOW = 2.0


@frozen
class Progress:
    """A moment of a long step. Sizes in bytes, speeds in bytes a second; None: nothing to tell."""

    phase: str
    done: int
    total: int
    rate: float | None = None
    limit: int | None = None

    def show(self) -> dict[str, Any]:
        """As the control interface's type `Progress`."""
        return {
            "phase": self.phase,
            "done_bytes": self.done,
            "total_bytes": self.total,
            "rate": None if self.rate is None else round(self.rate, 1),
            "limit": self.limit,
        }


class _Speed:
    """How fast a number of bytes has grown of late."""

    def __init__(self) -> None:
        self._samples = deque([(trio.current_time(), 0)])

    def at(self, total: int) -> float | None:
        """The number is `total` now; bytes a second."""
        now = trio.current_time()
        self._samples.append((now, total))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW:
            self._samples.popleft()
        then, before = self._samples[0]
        return (total - before) / (now - then) if now > then else None


class CopyMeter:
    """Watches the copy of a VM's disks, held to `limit` bytes a second if that is not None.

    Attributes:
        last: how far it was when it was heard of last.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._speed: _Speed | None = None
        self.last: CopyProgress | None = None

    def done(self, copied: CopyProgress) -> Progress:
        """The copy is that far."""
        if self._speed is None:
            self._speed = _Speed()
        self.last = copied
        return Progress("disk copy", copied.done, copied.total, self._speed.at(copied.done), self._limit)

    def summary(self) -> str:
        """The whole copy in words, once it is over."""
        assert self.last is not None
        return f"{format_size(self.last.total)} of the disks looked at, {format_size(self.last.sent)} sent"


class PassMeter:
    """Watches one first pass over `memory` bytes.

    Attributes:
        limit: what the pass is held to now, if to anything.
    """

    def __init__(self, memory: int, limit: int | None) -> None:
        self.limit = limit
        self._memory = memory
        self._began = trio.current_time()
        self._sent = 0
        self._speed = _Speed()

    def sent(self, total: int) -> Progress:
        """The pass has sent `total` bytes until now."""
        self._sent = total
        rate = self._speed.at(total)
        return Progress("first pass", total, max(total, self._memory), rate, self.limit)

    def summary(self) -> str:
        """The whole pass in words, once it is over."""
        seconds = max(trio.current_time() - self._began, 1e-3)
        speed = f"{format_size(self._sent / seconds)}/s"
        return f"{format_size(self._sent)} in {format_duration(seconds)}, {speed}" + (
            f" (limit {format_size(self.limit)}/s)" if self.limit is not None else ""
        )
