"""Frames of the link: what they look like byte for byte, and that no damage goes unnoticed."""

from __future__ import annotations

import struct
import zlib

import pytest
import xxhash
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.errors import FrameError
from curling_fd.link.frames import (
    HEAD_SIZE,
    HEADER_SIZE,
    MAX_JSON,
    RAW,
    TRAILER_SIZE,
    CheckpointHead,
    Header,
    Kind,
    check_trailer,
    decode_json,
    digest,
    encode_json,
    encode_trailer,
)

thorough = settings(max_examples=100, deadline=None, derandomize=True)

ROOM = 1 << 40
u64 = st.integers(0, (1 << 64) - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
contents = st.dictionaries(st.text(max_size=6), json_values, max_size=4)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kind = draw(st.sampled_from(Kind))
    longest = ROOM if kind in RAW else MAX_JSON
    return Header(kind, draw(u64), draw(u64), draw(st.integers(0, longest)))


def frame_of(header: Header, payload: bytes) -> bytes:
    head = header.encode()
    return head + payload + encode_trailer(header.sequence, digest(head, payload))


def accept(frame: bytes | bytearray) -> tuple[Header, bytes]:
    """Read one frame as the transport does."""
    view = memoryview(frame)
    header = Header.decode(view[:HEADER_SIZE], max_raw=ROOM)
    end = HEADER_SIZE + header.length
    if len(frame) != end + TRAILER_SIZE:
        raise FrameError("of another length")
    check_trailer(view[end:], header.sequence, digest(bytes(view[:HEADER_SIZE]), view[HEADER_SIZE:end]))
    return header, bytes(view[HEADER_SIZE:end])


def test_the_bytes_of_a_header_are_these() -> None:
    header = Header(Kind.CHECKPOINT, generation=3, sequence=0x0102030405060708, length=4096)
    body = b"CRLG\x08\x00\x00\x00" + bytes.fromhex("000000000000000301020304050607080000000000001000")
    assert header.encode() == body + struct.pack(">I", zlib.crc32(body)) + bytes(4)
    assert header.encode().hex() == (
        "43524c47080000000000000000000003010203040506070800000000000010008be91b8600000000"
    )
    assert (HEADER_SIZE, HEAD_SIZE, TRAILER_SIZE) == (40, 32, 28)


def test_the_bytes_of_a_whole_frame_are_these() -> None:
    frame = encode_json(Kind.ACK, 2, 7)
    head = frame[:40]
    assert head == Header(Kind.ACK, 2, 7, 0).encode()
    assert frame[40:] == b"CMIT" + bytes(7) + b"\x07" + xxhash.xxh3_128(head).digest()
    assert frame.hex() == (
        "43524c4709000000000000000000000200000000000000070000000000000000b07d393f00000000"
        "434d49540000000000000007e2eac9057166f2fc7f1178832cfd821c"
    )
    assert encode_json(Kind.NOTE, 1, content={"paused": True})[40:-28] == b'{"paused":true}'


def test_the_kinds_have_the_numbers_of_protocol_3() -> None:
    assert {kind.name: int(kind) for kind in Kind} == {
        "HELLO": 1,
        "WELCOME": 2,
        "REFUSE": 3,
        "DEFINE": 4,
        "PREPARED": 5,
        "BULK": 6,
        "BULK_ACK": 7,
        "CHECKPOINT": 8,
        "ACK": 9,
        "HEARTBEAT": 10,
        "NOTE": 11,
        "END": 12,
        "HANDOVER": 13,
        "TAKEN": 14,
        "REST": 15,
        "RESTING": 16,
        "PROBE": 17,
        "FACTS": 18,
        "DISK": 19,
        "DISK_ACK": 20,
        "OFFER": 21,
        "WANT": 22,
    }


@thorough
@given(headers())
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    data = header.encode()
    assert len(data) == HEADER_SIZE
    assert Header.decode(data, max_raw=ROOM) == header
    assert Header.decode(memoryview(data), max_raw=ROOM) == header


@thorough
@given(st.sampled_from(sorted(set(Kind) - RAW)), u64, u64, st.none() | contents)
def test_a_frame_is_read_as_it_was_written(
    kind: Kind, generation: int, sequence: int, content: dict[str, object] | None
) -> None:
    header, payload = accept(encode_json(kind, generation, sequence, content))
    assert (header.kind, header.generation, header.sequence) == (kind, generation, sequence)
    assert decode_json(payload) == (content or {})


@pytest.mark.parametrize("payload", [b"", b"x", bytes(64), b'{"paused":true}'], ids=len)
@pytest.mark.parametrize("kind", [Kind.CHECKPOINT, Kind.NOTE])
def test_every_flipped_bit_is_noticed(kind: Kind, payload: bytes) -> None:
    frame = bytearray(frame_of(Header(kind, 5, 9, len(payload)), payload))
    accept(frame)
    for bit in range(len(frame) * 8):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            accept(frame)
        frame[bit // 8] ^= 1 << bit % 8
    accept(frame)


@thorough
@given(st.binary(min_size=1, max_size=300), st.data())
def test_bytes_that_were_changed_moved_or_lost_are_noticed(payload: bytes, data: st.DataObject) -> None:
    frame = frame_of(Header(Kind.CHECKPOINT, 1, 1, len(payload)), payload)
    start = data.draw(st.integers(0, len(frame)))
    end = data.draw(st.integers(start, len(frame)))
    damaged = frame[:start] + data.draw(st.binary(max_size=60)) + frame[end:]
    if damaged != frame:
        with pytest.raises((FrameError, struct.error)):
            accept(damaged)


@thorough
@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE))
def test_any_40_bytes_are_a_header_or_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        Header.decode(data, max_raw=ROOM)


@thorough
@given(st.integers(0, 255), st.integers(0, 255), u64, u64, u64)
def test_a_sound_checksum_excuses_nothing(
    kind: int, flags: int, generation: int, sequence: int, length: int
) -> None:
    body = struct.pack(">4sBB2xQQQ", b"CRLG", kind, flags, generation, sequence, length)
    data = body + struct.pack(">I4x", zlib.crc32(body))
    known = kind in Kind._value2member_map_
    fits = length <= (ROOM if kind in RAW else MAX_JSON)
    if known and fits and not flags:
        assert Header.decode(data, max_raw=ROOM) == Header(Kind(kind), generation, sequence, length)
    else:
        with pytest.raises(FrameError):
            Header.decode(data, max_raw=ROOM)


def test_what_is_not_a_link_is_told_from_a_damaged_one() -> None:
    with pytest.raises(FrameError, match="not a Curling link"):
        Header.decode(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n   ", max_raw=ROOM)
    damaged = bytearray(Header(Kind.HELLO, 0, 0, 0).encode())
    damaged[20] ^= 1
    with pytest.raises(FrameError, match="damaged"):
        Header.decode(bytes(damaged), max_raw=ROOM)


@pytest.mark.parametrize("kind", sorted(RAW))
def test_a_payload_is_as_long_as_was_agreed_at_most(kind: Kind) -> None:
    Header.decode(Header(kind, 0, 0, 1000).encode(), max_raw=1000)
    with pytest.raises(FrameError, match="1001 bytes"):
        Header.decode(Header(kind, 0, 0, 1001).encode(), max_raw=1000)
    with pytest.raises(FrameError):
        Header.decode(Header(kind, 0, 0, 1).encode(), max_raw=0)


def test_json_is_bounded_whatever_was_agreed_for_checkpoints() -> None:
    Header.decode(Header(Kind.DEFINE, 0, 0, MAX_JSON).encode(), max_raw=0)
    with pytest.raises(FrameError):
        Header.decode(Header(Kind.DEFINE, 0, 0, MAX_JSON + 1).encode(), max_raw=ROOM)


def test_a_trailer_belongs_to_one_frame() -> None:
    payload = b"state"
    one, two = (Header(Kind.CHECKPOINT, 1, sequence, len(payload)) for sequence in (1, 2))
    trailer = frame_of(one, payload)[-TRAILER_SIZE:]
    check_trailer(trailer, 1, digest(one.encode(), payload))
    with pytest.raises(FrameError):
        check_trailer(trailer, 2, digest(two.encode(), payload))
    with pytest.raises(FrameError):
        check_trailer(trailer, 1, digest(evolve(one, generation=2).encode(), payload))


@thorough
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_a_digest_does_not_depend_on_how_the_payload_is_divided(parts: list[bytes]) -> None:
    assert digest(b"head", *parts) == digest(b"head", b"".join(parts))
    assert (
        digest(b"head", *(memoryview(part) for part in parts))
        == xxhash.xxh3_128(b"head" + b"".join(parts)).digest()
    )


@pytest.mark.parametrize(
    "payload", [b"[]", b"7", b"null", b"{", b"\xff", b'{"a":1}x', b"[" * 100_000, b"1" * 5000]
)
def test_a_content_that_is_no_json_object_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError, match="no JSON object"):
        decode_json(payload)


@thorough
@given(u64, u64, u64, u64)
def test_a_checkpoint_says_how_it_divides(ram: int, device: int, disk: int, boundary_us: int) -> None:
    head = CheckpointHead(ram, device, disk, boundary_us)
    data = memoryview(head.encode())
    assert len(data) == HEAD_SIZE
    assert CheckpointHead.decode(data, head.payload_size) == head
    for wrong in (head.payload_size - 1, head.payload_size + 1, HEAD_SIZE - 1, 0):
        if wrong != head.payload_size:
            with pytest.raises(FrameError):
                CheckpointHead.decode(data, wrong)
