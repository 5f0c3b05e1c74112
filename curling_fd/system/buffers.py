"""Memory that has an fd: memfds, mapped once, pooled and reused.

A checkpoint is read into such a buffer and leaves it by `sendfile`, arrives in another by `splice`. First
use of a page costs several times its copying, so buffers are made beforehand, their first megabytes already
touched, and kept. A pool makes no more of them later, and none grows past its capacity: that is where
invariant I6 (memory is bounded) stands.
"""

from __future__ import annotations

import mmap
import os
from collections import deque

import trio
from attrs import frozen

#: madvise value of Linux 5.14 and later; Python has no name for it.
_MADV_POPULATE_WRITE = 23

#: Bytes of each buffer that are touched when it is made.
PREFAULT = 4 << 20

#: Bytes of a buffer that stay allocated when it returns to its pool; what a rare large checkpoint used
#: beyond goes back to the host.
KEEP = 256 << 20

#: Characters of a memfd's name; the kernel takes 249 bytes, and a RAM block's name can be longer.
_LONGEST_NAME = 60


class Buffer:
    """A memfd of `capacity` bytes (allocated as they are touched) and its mapping, `view`.

    The fd and the mapping belong to this object until `close`.

    Args:
        fd: a memfd of that size to take over, in place of a new one.
    """

    def __init__(self, name: str, capacity: int, prefault: int = PREFAULT, *, fd: int | None = None) -> None:
        self.capacity = capacity
        self.fd = os.memfd_create(name[:_LONGEST_NAME], os.MFD_CLOEXEC) if fd is None else fd
        try:
            if fd is None:
                os.ftruncate(self.fd, capacity)
            self._map = mmap.mmap(self.fd, capacity)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._map)
        if prefault:
            self._prefault(min(prefault, capacity))

    def _prefault(self, length: int) -> None:
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, 0, _whole_pages(length))
        except (OSError, ValueError):  # an older kernel: the first checkpoints fault the pages in
            pass

    def allocated(self) -> int:
        """Bytes of host memory the buffer holds now."""
        return os.fstat(self.fd).st_blocks * 512

    def trim(self, keep: int = KEEP) -> None:
        """Give memory past the first `keep` bytes back to the host."""
        start = _whole_pages(keep)
        if self.capacity > start and self.allocated() > start:
            self._map.madvise(mmap.MADV_REMOVE, start)

    def close(self) -> None:
        """Free the buffer. Views made from `view` must be released before."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1  # a second close must not hit an fd that was reused
        self.view.release()
        self._map.close()
        os.close(fd)


@frozen
class PoolStatistics:
    """Buffers and bytes of a pool. `limit` is what `allocated` can never exceed."""

    buffers: int
    free: int
    allocated: int
    limit: int


class BufferPool:
    """`count` buffers of `capacity` bytes each.

    Waiting in `acquire` is the backpressure of the whole data path: no free buffer, no checkpoint.
    """

    def __init__(self, name: str, count: int, capacity: int) -> None:
        self._limit = count * _whole_pages(capacity)
        self._all: list[Buffer] = []
        self._free: deque[Buffer] = deque()
        try:
            while len(self._all) < count:
                self._all.append(Buffer(name, capacity))
        except BaseException:
            for buffer in self._all:
                buffer.close()
            raise
        self._free.extend(self._all)
        self._returned = trio.lowlevel.ParkingLot()
        self._closed = False

    async def acquire(self) -> Buffer:
        """A free buffer, the one used last first, for its pages are warm. Waits while there is none."""
        await trio.lowlevel.checkpoint()
        while not self._free:
            await self._returned.park()
        return self._free.pop()

    def release(self, buffer: Buffer) -> None:
        """Take `buffer` back. Once the pool is closed, this frees it."""
        if self._closed:
            buffer.close()
            return
        buffer.trim()
        self._free.append(buffer)
        self._returned.unpark()

    def statistics(self) -> PoolStatistics:
        """What the pool holds now, in bytes."""
        return PoolStatistics(
            buffers=len(self._all),
            free=len(self._free),
            allocated=sum(buffer.allocated() for buffer in self._all if buffer.fd >= 0),
            limit=self._limit,
        )

    def close(self) -> None:
        """Free what is free now, and the rest as it is released."""
        self._closed = True
        while self._free:
            self._free.pop().close()


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
