"""The map of dirty blocks against a set of their numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from curling_fd.disk.bitmap import BLOCK, DirtyBitmap, map_size

SIZES = st.integers(0, 70 * BLOCK) | st.just(8 * BLOCK * 3) | st.just(200_000 * BLOCK)


@st.composite
def marked(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    size = draw(SIZES)
    ranges = []
    for _ in range(draw(st.integers(0, 6))):
        offset = draw(st.integers(0, size))
        ranges.append((offset, draw(st.integers(0, size - offset) | st.integers(0, min(9, size - offset)))))
    return size, ranges


def blocks_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {
        block
        for offset, length in ranges
        if length
        for block in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
    }


@given(marked())
def test_the_dirty_ranges_are_the_blocks_that_were_touched(case: tuple[int, list[tuple[int, int]]]) -> None:
    size, marks = case
    bitmap = DirtyBitmap(size)
    for offset, length in marks:
        if length:
            bitmap.mark(offset, length)
    found = list(bitmap.ranges())
    assert blocks_of(found) == blocks_of(marks)
    assert bitmap.dirty_bytes() == BLOCK * len(blocks_of(marks))
    for offset, length in found:
        assert length > 0 and offset % BLOCK == 0
        assert offset + length <= size
        assert offset + length == size or (offset + length) % BLOCK == 0
    for (offset, length), (after, _) in pairwise(found):
        assert offset + length < after, "runs that touch are one"


@given(marked())
def test_a_map_in_lent_memory_stays_there_and_a_copy_does_not(
    case: tuple[int, list[tuple[int, int]]],
) -> None:
    size, marks = case
    memory = memoryview(bytearray(map_size(size)))
    bitmap = DirtyBitmap(size, memory)
    bitmap.merge((offset, length) for offset, length in marks if length)
    again = DirtyBitmap(size, memory)
    copy = bitmap.copy()
    assert list(again.ranges()) == list(bitmap.ranges()) == list(copy.ranges())
    bitmap.clear()
    assert not list(again.ranges())
    assert blocks_of(list(copy.ranges())) == blocks_of(marks)


def test_all_of_a_disk_of_odd_size_is_one_range() -> None:
    bitmap = DirtyBitmap(5 * BLOCK + 17)
    bitmap.mark_all()
    assert list(bitmap.ranges()) == [(0, 5 * BLOCK + 17)]
