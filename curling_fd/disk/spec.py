"""What the backup's copy of a disk is to be, and what can be done with one. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from attrs import frozen

from curling_fd.disk.log import Record

#: QEMU counts disks in sectors of this size: a file that is no whole number of them is rounded up.
SECTOR = 512


@frozen
class CopySpec:
    """The copy of a disk.

    Attributes:
        disk: the VM's name for it.
        path: where the backup has it.
        format: `raw` (files and block devices) or `qcow2`, as the standby's command line has it.
        size: bytes the guest sees.
    """

    disk: str
    path: str
    format: str
    size: int

    @property
    def whole(self) -> int:
        """The size in whole sectors, in bytes."""
        return -(-self.size // SECTOR) * SECTOR


class Copy(Protocol):
    """The backup's copy of one disk, open. Calls block; `sync` may be called beside all others but `close`.

    All raise DiskCopyFailed when the copy cannot be read or written: it is of no use then.
    """

    spec: CopySpec

    def apply(self, records: Iterable[Record], view: memoryview) -> None:
        """Do what `records`, found in `view`, say; doing it again changes nothing."""

    def block_digests(self, offset: int, length: int, block: int) -> Iterable[bytes]:
        """Digests of the blocks of that part, see `curling_fd.disk.compare`."""

    def sync(self) -> None:
        """All that has been applied is on stable storage."""

    def close(self) -> None:
        """Give it up, so that a VM can use it; what was not synced may still be on its way to storage."""
