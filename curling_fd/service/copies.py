"""The backup's copies of a VM's disks: what a session and a failover do with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from curling_fd.disk.compare import Offer, answer
from curling_fd.disk.image import open_copy
from curling_fd.disk.inventory import Disk
from curling_fd.disk.log import Record, check, scan
from curling_fd.disk.spec import Copy, CopySpec


class Copies:
    """Copies of `disks`, by `paths` on this host; they are opened here, and nobody else can use them then.

    All methods block; `sync` may be called beside all others but `close`.

    Raises:
        CopyUnfit: what is there cannot be a copy; nothing was changed.
    """

    def __init__(self, disks: Sequence[Disk], paths: Sequence[str]) -> None:
        self.disks = tuple(disks)
        self.sizes = [disk.size for disk in disks]
        self._copies: list[Copy] = []
        try:
            for disk, path in zip(disks, paths, strict=True):
                self._copies.append(open_copy(CopySpec(disk.name, path, disk.format, disk.size)))
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> list[str]:
        return [copy.spec.path for copy in self._copies]

    def check(self, view: memoryview, start: int, end: int) -> None:
        """See that `view[start:end]` is a log of these disks.

        Raises:
            FrameError: it is not.
        """
        check(view, start, end, self.sizes)

    def apply(self, view: memoryview, start: int, end: int) -> None:
        """Do what the log in `view[start:end]`, which was checked, says.

        Raises:
            DiskCopyFailed: a copy is of no use any more.
        """
        records = scan(view, start, end, self.sizes)
        for disk, run in groupby(records, key=_disk):
            self._copies[disk].apply(run, view)

    def answer(self, payload: bytes) -> bytes:
        """The payload of a WANT for that of an OFFER.

        Raises:
            FrameError: it is none.
            DiskCopyFailed: a copy cannot be read.
        """
        offer = Offer.decode(payload, self.sizes)
        return answer(offer, self._copies[offer.disk].block_digests)

    def sync(self) -> None:
        """All that was applied is on stable storage.

        Raises:
            DiskCopyFailed: it is not.
        """
        for copy in self._copies:
            copy.sync()

    def close(self) -> None:
        """Let others use the copies."""
        while self._copies:
            self._copies.pop().close()


def _disk(record: Record) -> int:
    return record.disk
