"""Holes in files and block devices: making them, and finding them.

Sources: fallocate(2), lseek(2) under SEEK_DATA; for block devices blkdev_fallocate() in block/fops.c of the
kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_ZEROES = bytes(1 << 20)

#: What the kernel says when a file system or a device cannot do it.
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` to `fd`, borrowed, at `offset`.

    Raises:
        OSError: it cannot be.
    """
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def write_zeroes(fd: int, offset: int, length: int) -> None:
    """Write zeroes, allocating what they need."""
    end = offset + length
    while offset < end:
        size = min(len(_ZEROES), end - offset)
        write_all(fd, _ZEROES if size == len(_ZEROES) else _ZEROES[:size], offset)
        offset += size


class Clearer:
    """Makes parts of a file or block device read as zeroes, freeing their space where it can.

    Args:
        fd: borrowed.
        alignment: bytes; what is not a multiple of it is written. 1 for files: their systems see to it.
        punch: False as if the file system could not.
    """

    def __init__(self, fd: int, alignment: int = 1, *, punch: bool = True) -> None:
        self._fd = fd
        self._alignment = alignment
        self._modes = [_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE] if punch else []

    def clear(self, offset: int, length: int) -> None:
        """That part reads as zeroes from now on.

        Raises:
            OSError: it cannot be written either.
        """
        end = offset + length
        start = -(-offset // self._alignment) * self._alignment
        stop = end // self._alignment * self._alignment
        if start < stop and self._free(start, stop - start):
            write_zeroes(self._fd, offset, start - offset)
            write_zeroes(self._fd, stop, end - stop)
        else:
            write_zeroes(self._fd, offset, length)

    def _free(self, offset: int, length: int) -> bool:
        while self._modes:
            if not _libc.fallocate(self._fd, self._modes[0], offset, length):
                return True
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number not in _CANNOT:
                raise OSError(number, os.strerror(number))
            del self._modes[0]
        return False


def data_extents(fd: int, offset: int, length: int) -> Iterator[tuple[int, bool]]:
    """What that part of `fd`, borrowed, consists of: lengths in bytes, and whether it is a hole.

    What lies beyond the end of a file is a hole.

    Raises:
        OSError: the file cannot be read.
    """
    end = offset + length
    while offset < end:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a block device: who knows
                yield end - offset, False
                return
            if error.errno != errno.ENXIO:
                raise
            data = end  # nothing but holes from here on
        if data > offset:
            yield data - offset, True
        if data < end:
            stop = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            yield stop - data, False
            data = stop
        offset = data
