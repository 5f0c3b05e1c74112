"""The backup's copies of disks: raw files and block devices here, qcow2 in `curling_fd.disk.qcow2`."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator

from curling_fd.disk import locks
from curling_fd.disk.compare import block_digests
from curling_fd.disk.log import WRITE, Record
from curling_fd.disk.precheck import OpenFile, open_checked
from curling_fd.disk.qcow2 import Qcow2Copy
from curling_fd.disk.spec import Copy, CopySpec
from curling_fd.errors import CopyInUse, DiskCopyFailed
from curling_fd.system.holes import Clearer, data_extents, write_all

_BLKSSZGET = 0x1268  # linux/fs.h: bytes of a device's logical sector


def open_copy(spec: CopySpec, *, program: str = "qemu-storage-daemon") -> Copy:
    """Open the copy, so that nobody else can write to it.

    Args:
        program: what opens images that are not raw.

    Raises:
        CopyUnfit: it cannot be a copy; nothing was changed.
    """
    file = open_checked(spec)
    if spec.format == "raw":
        return RawCopy(spec, file)
    os.close(file.fd)  # QEMU's program takes the locks itself
    return Qcow2Copy(spec, program)


class RawCopy:
    """A file or a block device whose bytes are the disk's.

    Args:
        file: open; owned from here on.
        punch: False as if its file system could not make holes.
    """

    def __init__(self, spec: CopySpec, file: OpenFile, *, punch: bool = True) -> None:
        self.spec = spec
        self._fd = file.fd
        try:
            if not locks.lock(self._fd):
                raise CopyInUse(spec.disk, spec.path, locks.holders(self._fd))
            alignment = _sector(self._fd) if file.device else 1
        except BaseException:
            os.close(self._fd)
            raise
        self._clearer = Clearer(self._fd, alignment, punch=punch)

    def apply(self, records: Iterable[Record], view: memoryview) -> None:
        """Do what `records`, found in `view`, say."""
        fd = self._fd
        try:
            for record in records:
                if record.kind == WRITE:
                    data = view[record.data : record.data + record.length]
                    if os.pwrite(fd, data, record.offset) != record.length:
                        write_all(fd, data, record.offset)  # it says why
                else:
                    self._clearer.clear(record.offset, record.length)
        except OSError as error:
            raise self._failed(error) from None

    def block_digests(self, offset: int, length: int, block: int) -> Iterator[bytes]:
        """Digests of the blocks of that part."""
        try:
            extents = data_extents(self._fd, offset, length)
            yield from block_digests(offset, length, block, extents, self._read_into)
            # Nobody else reads it: let the host keep other things in its memory.
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failed(error) from None

    def sync(self) -> None:
        """All that has been applied is on stable storage."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Give it up. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            read = os.preadv(self._fd, [view[done:]], offset + done)
            if not read:  # a file that ends within its last sector
                view[done:] = bytes(len(view) - done)
                return
            done += read

    def _failed(self, error: OSError) -> DiskCopyFailed:
        return DiskCopyFailed(self.spec.path, error.strerror or str(error))


def _sector(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])
