"""Dividing a disk into what is read, offered and sent at once. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import frozen

from curling_fd.disk.bitmap import Range
from curling_fd.disk.compare import BLOCK, FINE, zero_digest
from curling_fd.disk.compare import digest as block_digest

_NOTHING = bytes(FINE)


@frozen
class Step:
    """A part of a disk, and where in it there are data: ranges, in order; the rest reads as zeroes.

    Data are whole blocks of `BLOCK` bytes, counted from `offset`; the last may end with the step.
    """

    offset: int
    length: int
    data: tuple[Range, ...]

    @property
    def size(self) -> int:
        """Bytes of data."""
        return sum(length for _, length in self.data)


def next_step(offset: int, extents: Iterable[tuple[int, bool]], most: int) -> Step:
    """The beginning of what lies at `offset`: as much of it as there is, or as has `most` bytes of data.

    Args:
        extents: lengths in bytes, and whether that part reads as zeroes; not empty.
        most: at least `BLOCK`, and a multiple of it.
    """
    runs: list[list[int]] = []
    at = 0
    whole = 0
    extents = list(extents)
    end = sum(length for length, _ in extents)
    for length, zero in extents:
        if not zero:
            start = at // BLOCK * BLOCK
            stop = min(-(-(at + length) // BLOCK) * BLOCK, end)
            if runs and runs[-1][1] >= start:
                whole += max(0, stop - runs[-1][1])
                runs[-1][1] = max(runs[-1][1], stop)
            else:
                whole += stop - start
                runs.append([start, stop])
            if whole >= most:
                end = min(end, runs[-1][1] - (whole - most))
                runs[-1][1] = end
                break
        at += length
    return Step(offset, end, tuple((offset + start, stop - start) for start, stop in runs))


def digests(step: Step, data: memoryview) -> bytes:
    """The digests of all blocks of `step`, whose data are one after the other in `data`."""
    found = []
    at = step.offset
    used = 0
    for start, length in (*step.data, (step.offset + step.length, 0)):
        found += [zero_digest(min(BLOCK, start - place)) for place in range(at, start, BLOCK)]
        found += [
            block_digest(data[used + place : used + min(place + BLOCK, length)])
            for place in range(0, length, BLOCK)
        ]
        used += length
        at = start + length
    return b"".join(found)


def parts(data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Where in `data` there are zeroes: starts, ends, and whether what lies between is all zeroes.

    Looked at in pieces of `FINE` bytes, which are put together as far as they are alike.
    """
    begun = 0
    before: bool | None = None
    for start in range(0, len(data), FINE):
        piece = bytes(data[start : start + FINE])
        zero = piece == _NOTHING[: len(piece)]
        if zero is not before:
            if before is not None:
                yield begun, start, before
            begun, before = start, zero
    if before is not None:
        yield begun, len(data), before
