"""What is written to a part of a disk while that part is being read. No I/O."""

from __future__ import annotations


class Watch:
    """A part of a disk that is being read; `touched` are the ranges that were written meanwhile."""

    __slots__ = ("_merge_at", "disk", "end", "start", "touched")

    def __init__(self, disk: int, start: int, end: int) -> None:
        self.disk = disk
        self.start = start
        self.end = end
        self.touched: list[tuple[int, int]] = []
        self._merge_at = 256

    def touch(self, start: int, end: int) -> None:
        """Something was written there."""
        if start < self.end and end > self.start:
            self.touched.append((start, end))
            # A busy part, watched while the other host takes its time: what overlaps becomes one.
            if len(self.touched) > self._merge_at:
                parts = self.untouched(self.start, self.end)
                ends = [self.start, *(place for part in parts for place in part), self.end]
                pairs = zip(ends[::2], ends[1::2], strict=True)
                self.touched = [(first, after) for first, after in pairs if first < after]
                self._merge_at = 256 + 2 * len(self.touched)

    def untouched(self, start: int, end: int) -> list[tuple[int, int]]:
        """Starts and ends of what is left of `start` to `end`."""
        parts = []
        for first, after in sorted(self.touched):
            if first >= end:
                break
            if first > start:
                parts.append((start, first))
            start = max(start, after)
        if start < end:
            parts.append((start, end))
        return parts
