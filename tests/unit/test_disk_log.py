"""The disk log's format: what was written comes back, and damage is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.disk.log import (
    MAX_LENGTH,
    RECORD_SIZE,
    TRIM,
    WRITE,
    ZERO,
    Record,
    check,
    encode,
    encode_into,
    scan,
)
from curling_fd.errors import FrameError

SIZES = (4096, 513, 1 << 40)


@st.composite
def writes(draw: st.DrawFn) -> list[tuple[int, int, int, bytes | int]]:
    """(kind, disk, offset, data of a WRITE or length of another) that fit their disks."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from((WRITE, ZERO, TRIM)))
        disk = draw(st.integers(0, len(SIZES) - 1))
        longest = 64 if kind == WRITE else MAX_LENGTH
        offset = draw(st.integers(0, SIZES[disk] - 1))
        length = draw(st.integers(1, min(longest, SIZES[disk] - offset)))
        found.append((kind, disk, offset, bytes([offset % 251]) * length if kind == WRITE else length))
    return found


def log_of(content: list[tuple[int, int, int, bytes | int]]) -> bytes:
    log = b""
    for kind, disk, offset, what in content:
        data = what if isinstance(what, bytes) else b""
        length = len(what) if isinstance(what, bytes) else what
        log += encode(kind, disk, offset, length) + data
    return log


def told(log: bytes, records: list[Record]) -> list[tuple[int, int, int, bytes | int]]:
    return [
        (
            record.kind,
            record.disk,
            record.offset,
            log[record.data : record.data + record.length] if record.kind == WRITE else record.length,
        )
        for record in records
    ]


@given(writes(), st.binary(max_size=9), st.binary(max_size=20))
def test_what_was_encoded_is_found_wherever_in_a_buffer_it_lies(
    content: list[tuple[int, int, int, bytes | int]], before: bytes, after: bytes
) -> None:
    log = log_of(content)
    buffer = before + log + after
    records = list(scan(memoryview(buffer), len(before), len(before) + len(log), SIZES))
    assert told(buffer, records) == content
    assert check(memoryview(buffer), len(before), len(before) + len(log), SIZES) == len(content)


@given(writes().filter(bool), st.data())
def test_a_log_that_is_cut_short_is_refused_or_ends_between_two_records(
    content: list[tuple[int, int, int, bytes | int]], data: st.DataObject
) -> None:
    log = log_of(content)
    cut = data.draw(st.integers(0, len(log)))
    try:
        records = list(scan(memoryview(log), 0, cut, SIZES))
    except FrameError:
        return
    assert told(log, records) == content[: len(records)]
    assert cut == len(log_of(content[: len(records)]))


@given(writes().filter(bool), st.data())
def test_a_damaged_log_never_reaches_outside_its_disks_or_its_buffer(
    content: list[tuple[int, int, int, bytes | int]], data: st.DataObject
) -> None:
    log = bytearray(log_of(content))
    for _ in range(data.draw(st.integers(1, 4))):
        log[data.draw(st.integers(0, len(log) - 1))] = data.draw(st.integers(0, 255))
    assert_harmless(bytes(log))


@given(st.binary(max_size=200))
def test_anything_at_all_is_refused_or_harmless(wild: bytes) -> None:
    assert_harmless(wild)


def assert_harmless(log: bytes) -> None:
    # What lies beyond the log must never be taken for a part of it.
    end = len(log)
    view = memoryview(log + b"\x01\x00\x00\x00\x00\x00\x00\x01" * 8)
    try:
        for record in scan(view, 0, end, SIZES):
            assert record.kind in (WRITE, ZERO, TRIM)
            assert record.length > 0 and record.offset + record.length <= SIZES[record.disk]
            assert record.data + (record.length if record.kind == WRITE else 0) <= end
    except FrameError:
        pass


@pytest.mark.parametrize(
    "log",
    [
        encode(0, 0, 0, 1),
        encode(4, 0, 0, 1),
        encode(ZERO, len(SIZES), 0, 1),
        encode(ZERO, 0, 0, 0),
        encode(ZERO, 0, 4096, 1),
        encode(ZERO, 0, 1, 4096),
        encode(TRIM, 2, (1 << 64) - 1, MAX_LENGTH),
        encode(WRITE, 0, 0, 2) + b"a",
        encode(ZERO, 0, 0, 1)[:-1],
        b"\x02\x01" + encode(ZERO, 0, 0, 1)[2:],
    ],
)
def test_a_record_that_cannot_be_is_refused(log: bytes) -> None:
    with pytest.raises(FrameError):
        check(memoryview(log), 0, len(log), SIZES)


def test_a_record_is_sixteen_bytes_big_endian() -> None:
    assert RECORD_SIZE == 16
    assert encode(TRIM, 0x0102, 0x0A0B0C0D0E0F1011, 0x03040506) == bytes.fromhex(
        "03 00 0102 03040506 0a0b0c0d0e0f1011"
    )
    buffer = bytearray(20)
    encode_into(memoryview(buffer), 2, ZERO, 1, 2, 3)
    assert buffer == bytes(2) + encode(ZERO, 1, 2, 3) + bytes(2)
