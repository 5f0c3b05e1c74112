"""What an image must hold on which the lab's guest has written (see guest_disk.c), told from outside."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

_MAGIC = 0x31314B5344524743
_MOST_BLOCKS = 8
_WORD = (1 << 64) - 1
_HEAD = struct.Struct("<4Q")


@frozen
class Share:
    """A writer's part of an image.

    Attributes:
        number: the number it has got to.
        wrong: blocks, by their index on the disk, that are not as they must be then; and why.
    """

    writer: int
    number: int
    wrong: tuple[tuple[int, str], ...]


def read_shares(
    image: Path, *, size: int | None = None, block: int = 4096, writers: Sequence[int] = (0,)
) -> list[Share]:
    """Look at every block of the raw `image`.

    Args:
        size: bytes of the disk; those of the file by default.
        writers: the ids of the threads that write to this disk, in the order of their shares.
    """
    size = image.stat().st_size if size is None else size
    count = size // block // len(writers)
    with image.open("rb") as file:
        return [
            _look(file.read(count * block), writer, place * count, count, block)
            for place, writer in enumerate(writers)
        ]


def _look(data: bytes, writer: int, first: int, count: int, block: int) -> Share:
    found = [_HEAD.unpack_from(data, index * block) for index in range(count)]
    top = max((number for magic, _, _, number in found if magic == _MAGIC), default=0)
    # Numbers above it may have zeroed blocks, and have left no stamp: the right one is the one that fits
    # best.
    best: list[tuple[int, str]] | None = None
    chosen = top
    ledger = _ledger(writer, count, top)
    zero = bytes(block)
    for number in range(top, top + 8):
        if number > top:
            start, length, how = operation(writer, number, count)
            if how != "zeroed":
                break
            ledger[start : start + length] = [number] * length
        wrong = []
        for index, last in enumerate(ledger):
            magic, where, who, had = found[index]
            is_zero = data[index * block : (index + 1) * block] == zero
            wants_zero = last == 0 or operation(writer, last, count)[2] == "zeroed"
            if wants_zero != is_zero:
                wrong.append((first + index, f"zero: {is_zero}, after {last}"))
            elif not wants_zero and (magic, where, who, had) != (_MAGIC, first + index, writer, last):
                wrong.append((first + index, f"{had} where {last} was due"))
            elif not wants_zero and not _whole(data, index * block, block):
                wrong.append((first + index, f"{had}, torn"))
        if best is None or len(wrong) < len(best):
            best, chosen = wrong, number
    assert best is not None
    return Share(writer, chosen, tuple(best))


def _ledger(writer: int, count: int, upto: int) -> list[int]:
    ledger = [0] * count
    for number in range(1, upto + 1):
        start, length, _ = operation(writer, number, count)
        ledger[start : start + length] = [number] * length
    return ledger


def operation(writer: int, number: int, count: int) -> tuple[int, int, str]:
    """First block, number of blocks, and what is done to them: `written`, `zeroed` or `discarded` before."""
    x = _seed(writer, number)
    length = 1 if (x >> 32) % 8 else _MOST_BLOCKS
    how = {0: "zeroed", 1: "discarded"}.get((x >> 40) % 16, "written")
    return (x & 0xFFFFFFFF) % (count - length + 1), length, how


def _seed(index: int, written: int) -> int:
    x = (index * 0x9E3779B97F4A7C15 + written * 0xBF58476D1CE4E5B9 + 1) & _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def _whole(data: bytes, offset: int, block: int) -> bool:
    words = list(_words(data, offset, block))
    return sum(words[:-1]) & _WORD == words[-1]


def _words(data: bytes, offset: int, block: int) -> Iterator[int]:
    return iter(struct.unpack_from(f"<{block // 8}Q", data, offset))
