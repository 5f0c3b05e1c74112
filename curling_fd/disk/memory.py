"""The memory of a disk log: memfds for what is written, and one for the maps of dirty blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from curling_fd.disk.bitmap import DirtyBitmap, map_size
from curling_fd.system.buffers import PREFAULT, Buffer


class LogMemory:
    """`count` buffers of `capacity` bytes, and a map for each disk. Not for two threads at once.

    Args:
        keep: bytes of a buffer that stay allocated when it comes back.
        maps: a memfd with the maps another process left; owned from here on. New ones are all dirty.
        buffer: likewise one of the buffers; it is the next one that is taken.

    Attributes:
        map: the memfd with the maps.
        bitmaps: the maps, in the order of the disks.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        capacity: int,
        count: int,
        keep: int,
        maps: int | None = None,
        buffer: int | None = None,
    ) -> None:
        self._keep = keep
        self._buffers: list[Buffer] = []
        self._views: list[memoryview] = []
        try:
            needed = sum(map(map_size, sizes))
            self.map = Buffer("curling-disk-map", max(needed, 1), prefault=0, fd=maps)
            self._buffers.append(self.map)
            while len(self._buffers) < count:
                self._buffers.append(Buffer("curling-disk-log", capacity))
            prefault = PREFAULT if buffer is None else 0
            self._buffers.append(Buffer("curling-disk-log", capacity, prefault, fd=buffer))
        except BaseException:
            self.close()
            raise
        self._free = deque(self._buffers[1:])
        self._warm = {free.fd: PREFAULT for free in self._free if free.fd != buffer}
        self.bitmaps: list[DirtyBitmap] = []
        at = 0
        for size in sizes:
            self._views.append(self.map.view[at : at + map_size(size)])
            self.bitmaps.append(DirtyBitmap(size, self._views[-1]))
            at += map_size(size)
        if maps is None:
            for bitmap in self.bitmaps:
                bitmap.mark_all()

    def take(self) -> Buffer:
        """A free buffer, the one used last first, for its pages are warm. There must be one."""
        assert self._free, "more logs on their way than were agreed"
        return self._free.pop()

    def warm(self, buffer: Buffer) -> int:
        """Bytes at the beginning of `buffer` that have been used before: its pages are there."""
        return self._warm.get(buffer.fd, 0)

    def give_back(self, buffer: Buffer, used: int) -> None:
        """`buffer` is free; its first `used` bytes were written."""
        if buffer.fd >= 0:
            assert buffer not in self._free, "given back twice"
            buffer.trim(self._keep)
            self._warm[buffer.fd] = min(max(used, self.warm(buffer)), self._keep)
            self._free.append(buffer)

    def allocated(self) -> int:
        """Bytes of host memory that all of it takes now."""
        return sum(buffer.allocated() for buffer in self._buffers if buffer.fd >= 0)

    def limit(self) -> int:
        """What `allocated` can never exceed."""
        return sum(buffer.capacity for buffer in self._buffers)

    def close(self) -> None:
        """Free all of it."""
        for view in self._views:
            view.release()
        for buffer in self._buffers:
            buffer.close()
