"""Which blocks of a disk were written: one bit for each 4 KiB. No I/O.

Bit i of the map is bit i % 8, counted from the lowest, of byte i / 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: Bytes of the disk for each bit: what guests' file systems write at least, mostly.
BLOCK = 4096

#: Bytes of a map handled at once where a copy is made of them.
_PIECE = 1 << 16

# Long runs of one kind are found at C speed; only bytes with some bits set are looked at singly.
_SOME = re.compile(rb"\xff+|[^\x00\xff]", re.DOTALL)

Range = tuple[int, int]
"""Offset and length, in bytes of the disk."""


def map_size(size: int) -> int:
    """Bytes of the map of a disk of `size` bytes."""
    return -(-size // (8 * BLOCK))


class DirtyBitmap:
    """The map of a disk of `size` bytes.

    Args:
        bits: where it is, of `map_size` bytes; borrowed. By default memory of its own, all clean.
    """

    def __init__(self, size: int, bits: memoryview | bytearray | None = None) -> None:
        self.size = size
        self._blocks = -(-size // BLOCK)
        self._bits = bytearray(map_size(size)) if bits is None else bits
        assert len(self._bits) == map_size(size)

    def mark(self, offset: int, length: int) -> None:
        """Every block that has a byte in there is dirty; what is beyond the disk is not looked at."""
        first = offset // BLOCK
        end = min(-(-(offset + length) // BLOCK), self._blocks)
        bits = self._bits
        if end - first == 1:
            bits[first >> 3] |= 1 << (first & 7)
            return
        if first >= end:
            return
        head, tail = first >> 3, end >> 3
        if head == tail:
            bits[head] |= (1 << (end & 7)) - (1 << (first & 7))
            return
        bits[head] |= 0xFF & -(1 << (first & 7))
        for start in range(head + 1, tail, _PIECE):
            stop = min(start + _PIECE, tail)
            bits[start:stop] = b"\xff" * (stop - start)
        if end & 7:
            bits[tail] |= (1 << (end & 7)) - 1

    def mark_all(self) -> None:
        """Nothing is known of the disk."""
        self.mark(0, self.size)

    def clear(self) -> None:
        """No block is dirty."""
        for start in range(0, len(self._bits), _PIECE):
            stop = min(start + _PIECE, len(self._bits))
            self._bits[start:stop] = bytes(stop - start)

    def copy(self) -> DirtyBitmap:
        """Another map, in memory of its own, with the same blocks dirty."""
        return DirtyBitmap(self.size, bytearray(self._bits))

    def merge(self, ranges: Iterable[Range]) -> None:
        """Mark all these."""
        for offset, length in ranges:
            self.mark(offset, length)

    def dirty_bytes(self) -> int:
        """How many bytes of the disk the dirty blocks are; a last block that is not whole counts as one."""
        return BLOCK * sum(
            int.from_bytes(self._bits[start : start + _PIECE]).bit_count()
            for start in range(0, len(self._bits), _PIECE)
        )

    def ranges(self) -> Iterator[Range]:
        """What is dirty, from the beginning of the disk to its end, as few ranges as there can be.

        The map is not to be changed meanwhile.
        """
        start = stop = 0
        for first, end in self._runs():
            if first != stop:
                if stop > start:
                    yield start, stop - start
                start = first
            stop = end
        if stop > start:
            yield start, stop - start

    def _runs(self) -> Iterator[tuple[int, int]]:
        """First byte and end of dirty runs; one may begin where the one before ended."""
        for found in _SOME.finditer(self._bits):
            value = self._bits[found.start()]
            if value == 0xFF:
                yield self._place(found.start() * 8), self._place(found.end() * 8)
                continue
            for bit in range(8):
                if value >> bit & 1:
                    block = found.start() * 8 + bit
                    yield self._place(block), self._place(block + 1)

    def _place(self, block: int) -> int:
        return min(block * BLOCK, self.size)
