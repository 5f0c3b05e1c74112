"""The backup's copies of a VM's disks: what a session and a failover do with them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from curling_fd.disk.inventory import Disk
from curling_fd.disk.log import WRITE, check, scan
from curling_fd.errors import CopyUnusable, DiskCopyFailed


class Copies:
    """Copies of `disks`, by `paths` on this host; they are opened here, and nobody else is to use them.

    All methods but the first may block.
    """

    def __init__(self, disks: Sequence[Disk], paths: Sequence[str]) -> None:
        self.disks = tuple(disks)
        self.paths = tuple(paths)
        self._sizes = [disk.size for disk in disks]
        self._fds: list[int] = []
        for disk, path in zip(disks, paths, strict=True):
            try:
                self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                self.close()
                raise CopyUnusable(disk.name, path, error.strerror or str(error)) from None

    def check(self, view: memoryview, start: int, end: int) -> None:
        """See that `view[start:end]` is a log of these disks.

        Raises:
            FrameError: it is not.
        """
        check(view, start, end, self._sizes)

    def apply(self, view: memoryview, start: int, end: int) -> None:
        """Do what the log in `view[start:end]`, which was checked, says.

        Raises:
            DiskCopyFailed: a copy is not whole any more.
        """
        for record in scan(view, start, end, self._sizes):
            try:
                fd = self._fds[record.disk]
                if record.kind == WRITE:
                    os.pwrite(fd, view[record.data : record.data + record.length], record.offset)
                else:
                    _zero(fd, record.offset, record.length)
            except OSError as error:
                raise DiskCopyFailed(self.paths[record.disk], error.strerror or str(error)) from None

    def close(self) -> None:
        """Let others use the copies; what was written is on stable storage."""
        while self._fds:
            fd = self._fds.pop()
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)


def _zero(fd: int, offset: int, length: int) -> None:
    while length:
        part = min(length, 1 << 20)
        os.pwrite(fd, bytes(part), offset)
        offset += part
        length -= part
