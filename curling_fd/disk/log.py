"""The disk log: what a guest wrote to its disks in one epoch, as records one after the other.

    record   16 bytes   kind u8, zero u8, disk u16, length u32, offset u64 (big endian)
    data     `length` bytes, after a WRITE only

`disk` counts the VM's replicated disks in the order in which both hosts list them; `offset` and `length` are
bytes of the disk as the guest sees it. Records stand in the order in which the writes were finished, and are
applied in it: then a later write to the same place wins, as it did for the guest. Applying a log twice is the
same as applying it once.

What arrives from the other host is believed only after `check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from struct import Struct

from attrs import frozen

from curling_fd.errors import FrameError

_RECORD = Struct(">BBHIQ")

RECORD_SIZE = _RECORD.size

#: Bytes that one record can be about. Longer requests are several records.
MAX_LENGTH = 0xFFFFFFFF

#: Disks that a log can tell apart.
MAX_DISKS = 1 << 16


class RecordKind(IntEnum):
    """What was done. After ZERO and TRIM alike the backup's copy reads as zeroes."""

    WRITE = 1
    ZERO = 2
    TRIM = 3


# Plain ints: comparing with members of an IntEnum is several times as slow.
WRITE = int(RecordKind.WRITE)
ZERO = int(RecordKind.ZERO)
TRIM = int(RecordKind.TRIM)


@frozen
class Record:
    """One write, found in a log.

    Attributes:
        kind: a `RecordKind`, as a plain number.
        disk: which one.
        offset: first byte on the disk.
        length: bytes on the disk.
        data: where in the scanned buffer the data of a WRITE begins; else where the record ends.
    """

    kind: int
    disk: int
    offset: int
    length: int
    data: int


def encode(kind: int, disk: int, offset: int, length: int) -> bytes:
    """The 16 bytes of a record; a WRITE's data follow them."""
    return _RECORD.pack(kind, 0, disk, length, offset)


def encode_into(buffer: memoryview, at: int, kind: int, disk: int, offset: int, length: int) -> None:
    """Write the record's 16 bytes to `buffer[at:]`."""
    _RECORD.pack_into(buffer, at, kind, 0, disk, length, offset)


def scan(view: memoryview, start: int, end: int, sizes: Sequence[int]) -> Iterator[Record]:
    """The records in `view[start:end]`, one at a time: a list of them all could be many times the log.

    Args:
        sizes: of all disks, in bytes; no record reaches past the end of its disk.

    Raises:
        FrameError: while iterating: this is not a whole log. The records before it were good.
    """
    read = _RECORD.unpack_from
    disks = len(sizes)
    pos = start
    while pos < end:
        data = pos + RECORD_SIZE
        if data > end:
            raise FrameError("a disk log that ends inside a record")
        kind, zero, disk, length, offset = read(view, pos)
        if not WRITE <= kind <= TRIM or zero:
            raise FrameError(f"a disk log with a record of unknown kind {kind}")
        if disk >= disks:
            raise FrameError(f"a disk log that writes to disk {disk} of {disks}")
        if not length or offset + length > sizes[disk]:
            raise FrameError(f"a disk log with {length} bytes at {offset} of a disk of {sizes[disk]} bytes")
        pos = data
        if kind == WRITE:
            pos += length
            if pos > end:
                raise FrameError("a disk log that ends inside the data of a record")
        yield Record(kind, disk, offset, length, data)


def check(view: memoryview, start: int, end: int, sizes: Sequence[int]) -> int:
    """Scan `view[start:end]` to its end.

    Returns:
        How many records there are.

    Raises:
        FrameError: this is not a whole log of disks of those `sizes`.
    """
    return sum(1 for _ in scan(view, start, end, sizes))
