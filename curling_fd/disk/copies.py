"""All copies of a VM's disks on the backup, as one: a log is about all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from operator import attrgetter
from typing import Self

import trio
from attrs import frozen

from curling_fd.disk.compare import Offer, answer
from curling_fd.disk.image import open_copy
from curling_fd.disk.log import check, scan
from curling_fd.disk.spec import Copy, CopySpec

#: Seconds between writing out what was applied: so much a failover has to write out at most.
SYNC_INTERVAL = 1.0


@frozen
class CopiesStatistics:
    """`applied`: bytes of logs. `offered`: bytes compared. `syncs`: how often all was written out."""

    applied: int
    offered: int
    syncs: int


class Copies:
    """Copies in the order of the disks' numbers; owned from here on, until `close`.

    All but `keep_synced` block, and are for threads; one at a time, but for `sync`. All raise DiskCopyFailed
    when a copy cannot be read or written: none is of any use then.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = tuple(copies)
        self.sizes = tuple(copy.spec.whole for copy in copies)
        self._applied = self._synced = self._offered = self._syncs = 0

    @classmethod
    def open(cls, specs: Sequence[CopySpec], *, program: str = "qemu-storage-daemon") -> Self:
        """Open all of them, or none.

        Raises:
            CopyUnfit: the first that cannot be one; nothing was changed.
        """
        with ExitStack() as opened:
            copies = []
            for spec in specs:
                copy = open_copy(spec, program=program)
                opened.callback(copy.close)
                copies.append(copy)
            opened.pop_all()
        return cls(copies)

    def check(self, view: memoryview, start: int, end: int) -> None:
        """Is there a whole log of these disks in `view[start:end]`? Nothing is changed.

        Raises:
            FrameError: no.
        """
        check(view, start, end, self.sizes)

    def apply(self, view: memoryview, start: int, end: int) -> None:
        """Do what the log in `view[start:end]` says; it was checked. Doing it again changes nothing."""
        for disk, records in groupby(scan(view, start, end, self.sizes), attrgetter("disk")):
            self._copies[disk].apply(records, view)
        self._applied += end - start

    def answer(self, payload: bytes | memoryview) -> bytes:
        """The answer to an offer.

        Raises:
            FrameError: it is none.
        """
        offer = Offer.decode(payload, self.sizes)
        self._offered += sum(length for _, length in offer.ranges)
        return answer(offer, self._copies[offer.disk].block_digests)

    def sync(self) -> None:
        """All that has been applied is on stable storage."""
        applied = self._applied
        for copy in self._copies:
            copy.sync()
        self._synced = applied
        self._syncs += 1

    async def keep_synced(self, interval: float = SYNC_INTERVAL) -> None:
        """Write out what was applied, again and again, until cancelled."""
        while True:
            await trio.sleep(interval)
            if self._applied > self._synced:
                await trio.to_thread.run_sync(self.sync)

    def close(self) -> None:
        """Give them up, so that a VM can use them. What was not synced before is lost if the host is."""
        with ExitStack() as each:
            for copy in self._copies:
                each.callback(copy.close)

    def statistics(self) -> CopiesStatistics:
        """What was done so far."""
        return CopiesStatistics(self._applied, self._offered, self._syncs)
