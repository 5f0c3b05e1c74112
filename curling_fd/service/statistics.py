"""Counters of a protected VM, and the frozen picture of them that everything shown is made from."""

from __future__ import annotations

from collections import deque

import trio
from attrs import frozen

#: Samples that percentiles are taken from: at 100 checkpoints a second the last ten seconds.
WINDOW = 1000


@frozen
class Statistics:
    """A VM's protection in numbers; fields in milliseconds, bytes and pages as their names say.

    Stop times are known only where the guest runs, and detection and failover only after one.
    """

    checkpoints: int
    committed: int
    checkpoints_per_s: float
    stop_ms_last: float | None
    stop_ms_p50: float | None
    stop_ms_p99: float | None
    pages_last: int
    pages_p50: int
    bytes_last: int
    bytes_total: int
    lag_ms: float
    first_pass_ms: float
    detection_ms: float | None
    failover_ms: float | None


@frozen
class Totals:
    """What of the counters goes on when the daemon is restarted."""

    checkpoints: int
    committed: int
    bytes_total: int
    first_pass_ms: float
    detection_ms: float | None
    failover_ms: float | None


class Counters:
    """Collects what `Statistics` shows. Times are trio's clock, in seconds.

    Args:
        before: of the session before; what is known of the last failover is taken over from it.
    """

    def __init__(self, before: Counters | None = None) -> None:
        self.checkpoints = 0
        self.committed = 0
        self.bytes_total = 0
        self.first_pass_ms = 0.0
        self.detection_ms: float | None = before.detection_ms if before else None
        self.failover_ms: float | None = before.failover_ms if before else None
        self._committed_at = 0.0
        self._commits: deque[float] = deque(maxlen=WINDOW)
        self._stops: deque[float] = deque(maxlen=WINDOW)
        self._pages: deque[int] = deque(maxlen=WINDOW)
        self._bytes: deque[int] = deque(maxlen=WINDOW)

    def totals(self) -> Totals:
        return Totals(*(getattr(self, name) for name in Totals.__annotations__))

    def inherit(self, totals: Totals) -> None:
        """Go on from the `totals` of the daemon before us."""
        for name in Totals.__annotations__:
            setattr(self, name, getattr(totals, name))

    def captured(self, pages: int, size: int) -> None:
        self.checkpoints += 1
        self.bytes_total += size
        self._pages.append(pages)
        self._bytes.append(size)

    def stopped(self, milliseconds: float) -> None:
        """The guest stood still for a checkpoint, by QEMU's own clock."""
        self._stops.append(milliseconds)

    def commit(self, sequence: int) -> None:
        self.committed = sequence
        self._committed_at = trio.current_time()
        self._commits.append(self._committed_at)

    def statistics(self) -> Statistics:
        return Statistics(
            checkpoints=self.checkpoints,
            committed=self.committed,
            checkpoints_per_s=round(self._rate(), 1),
            stop_ms_last=round(self._stops[-1], 3) if self._stops else None,
            stop_ms_p50=round(percentile(self._stops, 50), 3) if self._stops else None,
            stop_ms_p99=round(percentile(self._stops, 99), 3) if self._stops else None,
            pages_last=self._pages[-1] if self._pages else 0,
            pages_p50=int(percentile(self._pages, 50)),
            bytes_last=self._bytes[-1] if self._bytes else 0,
            bytes_total=self.bytes_total,
            lag_ms=round((trio.current_time() - self._committed_at) * 1000, 1) if self._commits else 0.0,
            first_pass_ms=round(self.first_pass_ms, 1),
            detection_ms=self.detection_ms,
            failover_ms=self.failover_ms,
        )

    def _rate(self) -> float:
        """Commits a second over the last five seconds, or as long as there are any."""
        now = trio.current_time()
        recent = [at for at in self._commits if now - at <= 5.0]
        return len(recent) / max(now - recent[0], 0.001) if len(recent) > 1 else 0.0


def percentile(values: deque[float] | deque[int] | list[float], rank: float) -> float:
    """The value below which `rank` percent of `values` lie (nearest rank); 0 for none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * rank / 100))]
