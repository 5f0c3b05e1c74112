"""Comparing the disk with the backup's copy without sending it: offers of digests, and answers. No I/O.

    OFFER    disk u16, zero u16, block u32, ranges u32
             each range: offset u64, length u64
             each block of each range: XXH3-128, 16 bytes
    answer   each block of the offer: a `Verdict`, one byte

Blocks are counted from the beginning of their range; the last one of a range may be shorter than `block`
bytes. Integers are big endian. A block that reads as zeroes has the digest of zeroes, allocated or not.

XXH3 is no cryptographic digest: a guest that wants to can write two blocks that look the same, and then has a
copy of its own disk that differs from it. It harms nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import groupby
from struct import Struct

import xxhash
from attrs import frozen

from curling_fd.disk.bitmap import Range
from curling_fd.errors import FrameError

#: Bytes of a block as it is offered first; its digest is 1/4096 of it.
BLOCK = 64 << 10

#: Bytes of the blocks into which one that differs is divided, and offered again: what guests write at least.
FINE = 4096

#: Bytes read at once.
CHUNK = 1 << 20

#: Blocks of one offer at most.
MAX_BLOCKS = 1 << 16

DIGEST = 16

_HEAD = Struct(">HHII")
_RANGE = Struct(">QQ")


class Verdict(IntEnum):
    """What the backup says of a block."""

    SAME = 0
    DIFFERS = 1
    EMPTY = 2  # it differs, and ours is all zeroes: no use asking for parts of it


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """XXH3-128 of a block."""
    return xxhash.xxh3_128_digest(data)


@lru_cache(maxsize=64)
def zero_digest(length: int) -> bytes:
    """That of `length` zeroes."""
    return digest(bytes(length))


def pieces(offset: int, length: int, size: int) -> Iterator[Range]:
    """A range in pieces of `size` bytes, counted from its beginning; the last one may be shorter."""
    end = offset + length
    while offset < end:
        yield offset, min(size, end - offset)
        offset += size


@frozen
class Offer:
    """Blocks of a disk as the primary reads them: `digests` has 16 bytes for each, in order."""

    disk: int
    block: int
    ranges: tuple[Range, ...]
    digests: bytes

    def blocks(self) -> Iterator[Range]:
        """All blocks of all ranges."""
        for offset, length in self.ranges:
            yield from pieces(offset, length, self.block)

    def encode(self) -> bytes:
        head = _HEAD.pack(self.disk, 0, self.block, len(self.ranges))
        return head + b"".join(_RANGE.pack(*part) for part in self.ranges) + self.digests

    @classmethod
    def decode(cls, payload: bytes | memoryview, sizes: Sequence[int]) -> Offer:
        """Read an offer about one of the disks of those `sizes` in bytes.

        Raises:
            FrameError: this is none.
        """
        view = memoryview(payload)
        if len(view) < _HEAD.size:
            raise FrameError("an offer too short for its head")
        disk, zero, block, count = _HEAD.unpack_from(view)
        if disk >= len(sizes) or zero or not FINE <= block <= CHUNK:
            raise FrameError("an offer of no disk there is, or of blocks of no possible size")
        start = _HEAD.size + count * _RANGE.size
        if count > MAX_BLOCKS or start > len(view):
            raise FrameError("an offer too short for its ranges")
        ranges = tuple(_RANGE.unpack_from(view, at) for at in range(_HEAD.size, start, _RANGE.size))
        blocks = 0
        for offset, length in ranges:
            if not length or offset + length > sizes[disk]:
                raise FrameError("an offer of what is not on its disk")
            blocks += -(-length // block)
        if blocks > MAX_BLOCKS or len(view) != start + blocks * DIGEST:
            raise FrameError("an offer whose digests are not those of its ranges")
        return cls(disk, block, ranges, bytes(view[start:]))


def answer(offer: Offer, ours: Callable[[int, int, int], Iterable[bytes]]) -> bytes:
    """What to say to `offer`.

    Args:
        ours: digests of our copy of that disk, from offset, length and size of the blocks.
    """
    verdicts = bytearray()
    at = 0
    for offset, length in offer.ranges:
        blocks = pieces(offset, length, offer.block)
        for (_, size), mine in zip(blocks, ours(offset, length, offer.block), strict=True):
            if offer.digests[at : at + DIGEST] == mine:
                verdicts.append(Verdict.SAME)
            else:
                verdicts.append(Verdict.EMPTY if mine == zero_digest(size) else Verdict.DIFFERS)
            at += DIGEST
    return bytes(verdicts)


def decode_answer(offer: Offer, payload: bytes | memoryview) -> list[tuple[Range, Verdict]]:
    """What the backup says to `offer`: all blocks that it does not have.

    Raises:
        FrameError: it is no answer to that offer.
    """
    payload = bytes(payload)
    if len(payload) * DIGEST != len(offer.digests) or payload.strip(bytes(Verdict)):
        raise FrameError("an answer that does not fit its offer")
    return [
        (block, Verdict(verdict))
        for block, verdict in zip(offer.blocks(), payload, strict=True)
        if verdict != Verdict.SAME
    ]


def block_digests(
    offset: int,
    length: int,
    block: int,
    extents: Iterable[tuple[int, bool]],
    read_into: Callable[[memoryview, int], None],
) -> Iterator[bytes]:
    """Digests of the blocks of a range, reading no more of it than is not known to be zeroes.

    Args:
        extents: what the range consists of, in order: lengths in bytes, and whether that reads as zeroes.
        read_into: fills a buffer with what is at an offset.
    """
    parts = iter(
        (sum(size for size, _ in group), zero) for zero, group in groupby(extents, key=lambda part: part[1])
    )
    zero_until = data_until = offset
    at_once = max(CHUNK // block * block, block)
    buffer = memoryview(bytearray(min(at_once, length)))
    end = offset + length
    at = offset
    while at < end:
        # How far does it read as zeroes from here, or not?
        while zero_until <= at and data_until <= at:
            size, zero = next(parts)
            start = max(zero_until, data_until)
            zero_until, data_until = (start + size, data_until) if zero else (zero_until, start + size)
        size = min(block, end - at)
        if zero_until >= at + size and data_until <= at:
            yield zero_digest(size)
            at += size
            continue
        # Whole blocks, from here to where the data end.
        stop = max(data_until, at + size)
        stop = min(at + -(-(stop - at) // block) * block, at + at_once, end)
        read_into(buffer[: stop - at], at)
        for start in range(0, stop - at, block):
            yield digest(buffer[start : min(start + block, stop - at)])
        at = stop
