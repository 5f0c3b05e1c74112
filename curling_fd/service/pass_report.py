"""What people are told of a first pass while it is under way."""

from __future__ import annotations

from curling_fd.capture.engine import PassLimit
from curling_fd.disk.copy import CopyProgress
from curling_fd.service.progress import CopyMeter, PassMeter
from curling_fd.service.record import VmRecord
from curling_fd.units import format_size


class PassReport:
    """Of one first pass of the VM of `record`."""

    def __init__(self, record: VmRecord) -> None:
        self._record = record
        self._meter = PassMeter(record.ram_bytes, record.config.resync_bandwidth)
        self._copy = CopyMeter(record.config.disk_copy_rate)

    def limit(self) -> PassLimit | None:
        """How fast the pass may be."""
        bandwidth = self._record.config.resync_bandwidth
        return None if bandwidth is None else PassLimit(bandwidth, self._record.ram_bytes, self._raised)

    def sent(self, count: int) -> None:
        """`count` bytes were sent so far."""
        self._record.progress = self._meter.sent(count)
        self._record.stir()

    def copied(self, progress: CopyProgress) -> None:
        """The copy of the disks is that far."""
        self._record.progress = self._copy.done(progress)
        self._record.stir()

    def over(self) -> None:
        """The backup has a first whole checkpoint."""
        copied = self._copy.last
        if copied is not None:
            words = self._copy.summary()
            self._record.note("disk-copy", words, looked_at_bytes=copied.total, sent_bytes=copied.sent)
        self._record.note("first-pass", self._meter.summary())

    def _raised(self, limit: int) -> None:
        self._meter.limit = limit
        what = f"the guest writes faster than the first pass: its limit is {format_size(limit)}/s now"
        self._record.note("limit-raised", what)
