"""Requests as an NBD server checks them, and its replies as an NBD client holds them against its requests."""

from __future__ import annotations

import errno
import struct

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.errors import NbdError
from curling_fd.nbd import server
from curling_fd.nbd.client import Data, Event, Finished, Remote, Replies, Status, Zeroes
from curling_fd.nbd.protocol import (
    BlockSizes,
    Command,
    CommandFlag,
    Errno,
    Extent,
    Flag,
    Request,
    host_errno,
    wire_errno,
)
from curling_fd.nbd.server import Export, Session
from tests.unit.nbd_streams import talk

MIB = 1 << 20
DISK = Export("disk", 64 * MIB, allocation=True)
SIMPLE = Session("disk")
FULL = Session("disk", structured=True, allocation=True)
REMOTE = Remote(64 * MIB, Flag(0x6D), structured=True, allocation=1)
PLAIN = Remote(64 * MIB, Flag(0x6D))


def request(kind: int, offset: int = 0, length: int = 4096, flags: int = 0, cookie: int = 7) -> Request:
    return Request(kind, flags, cookie, offset, length)


def test_a_request_is_read_as_it_was_written() -> None:
    asked = request(Command.WRITE, 1 << 40, 512, CommandFlag.FUA, 0xFEDCBA9876543210)
    expected = struct.pack(">IHHQQI", 0x25609513, 1, 1, 0xFEDCBA9876543210, 1 << 40, 512)
    assert asked.encode() == expected
    assert server.parse_request(b"xx" + expected, 2) == asked


def test_what_is_not_a_request_is_refused() -> None:
    with pytest.raises(NbdError, match="begins with 0x00000000"):
        server.parse_request(bytes(28))


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(Command.READ), None),
        (request(Command.READ, flags=CommandFlag.DF), None),
        (request(Command.WRITE, flags=CommandFlag.FUA), None),
        (request(Command.WRITE, 64 * MIB - 1, 1), None),
        (request(Command.WRITE, 64 * MIB, 0), None),
        (request(Command.FLUSH, 0, 0), None),
        (request(Command.TRIM, 0, 64 * MIB), None),
        (request(Command.WRITE_ZEROES, 0, 64 * MIB, CommandFlag.NO_HOLE | CommandFlag.FUA), None),
        (request(Command.BLOCK_STATUS, 0, 64 * MIB, CommandFlag.REQ_ONE), None),
        (request(Command.WRITE, 64 * MIB - 1, 2), Errno.ENOSPC),
        (request(Command.WRITE_ZEROES, 64 * MIB, 1), Errno.ENOSPC),
        (request(Command.WRITE, 2**64 - 1, 2), Errno.ENOSPC),
        (request(Command.TRIM, 64 * MIB, 1), Errno.EINVAL),
        (request(Command.READ, 64 * MIB, 1), Errno.EINVAL),
        (request(Command.BLOCK_STATUS, 1, 64 * MIB), Errno.EINVAL),
        (request(Command.BLOCK_STATUS, 0, 0), Errno.EINVAL),
        (request(Command.READ, 0, 33 * MIB), Errno.EINVAL),
        (request(Command.WRITE_ZEROES, flags=CommandFlag.FAST_ZERO), Errno.EINVAL),
        (request(Command.WRITE, flags=CommandFlag.NO_HOLE), Errno.EINVAL),
        (request(Command.WRITE, flags=0x8000), Errno.EINVAL),
        (request(Command.FLUSH, 0, 0, flags=CommandFlag.DF), Errno.EINVAL),
        (request(Command.CACHE), Errno.EINVAL),
        (request(8), Errno.EINVAL),
        (request(0xFFFF), Errno.EINVAL),
    ],
)
def test_requests_are_held_to_the_disk(asked: Request, error: Errno | None) -> None:
    assert server.check_request(asked, DISK, FULL) == error


def test_more_data_than_was_allowed_ends_the_connection() -> None:
    with pytest.raises(NbdError, match="a write of 33554433 bytes"):
        server.check_request(request(Command.WRITE, 0, 32 * MIB + 1), DISK, FULL)


@pytest.mark.parametrize("kind", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
def test_a_disk_to_be_read_only_is_only_read(kind: Command) -> None:
    assert server.check_request(request(kind), evolve(DISK, read_only=True), FULL) == Errno.EPERM


@pytest.mark.parametrize(("offset", "length"), [(512, 4096), (4096, 512), (1, 1)])
def test_requests_are_multiples_of_the_smallest_block(offset: int, length: int) -> None:
    coarse = evolve(DISK, blocks=BlockSizes(minimum=4096))
    assert server.check_request(request(Command.WRITE, offset, length), coarse, FULL) == Errno.EINVAL
    assert server.check_request(request(Command.WRITE, 4096, 8192), coarse, FULL) is None


def test_what_was_not_negotiated_is_invalid() -> None:
    assert server.check_request(request(Command.BLOCK_STATUS), DISK, SIMPLE) == Errno.EINVAL
    assert server.check_request(request(Command.READ, flags=CommandFlag.DF), DISK, SIMPLE) == Errno.EINVAL


def test_several_connections_are_never_offered() -> None:
    for session in (SIMPLE, FULL):
        assert not server.transmission_flags(DISK, session) & Flag.CAN_MULTI_CONN
        assert not server.transmission_flags(DISK, session) & Flag.SEND_FAST_ZERO


def test_errors_cross_the_wire() -> None:
    for number in (errno.EPERM, errno.EIO, errno.ENOSPC, errno.EINVAL, errno.EOPNOTSUPP):
        assert host_errno(wire_errno(number)) == number
    assert wire_errno(errno.EHOSTDOWN) == wire_errno(None) == Errno.EIO
    assert host_errno(4711) == errno.EINVAL


def read_all(remote: Remote, asked: list[Request], data: bytes) -> tuple[list[Event], dict[int, bytes]]:
    """What a client makes of `data` as the answer to `asked`, and what it read for each."""
    replies = Replies(remote)
    contents = {}
    for item in asked:
        replies.expect(item)
        if item.kind == Command.READ:
            contents[item.cookie] = bytearray(item.length)
    by_cookie = {item.cookie: item for item in asked}
    events: list[Event] = []
    while True:
        outcome = talk(replies.read(), data)
        if outcome.error is not None:
            raise outcome.error
        if not outcome.over:
            return events, {cookie: bytes(content) for cookie, content in contents.items()}
        data = data[outcome.consumed :]
        event = outcome.result
        assert event is not None
        events.append(event)
        if isinstance(event, Data | Zeroes):
            start = event.offset - by_cookie[event.cookie].offset
            assert 0 <= start <= start + event.length <= by_cookie[event.cookie].length
            if isinstance(event, Data):
                piece = data[: event.length]
                contents[event.cookie][start : start + len(piece)] = piece
                data = data[event.length :]


def structured(kind: int, payload: bytes, cookie: int = 7, *, done: bool = False) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(payload)) + payload


@pytest.mark.parametrize(("remote", "session"), [(PLAIN, SIMPLE), (REMOTE, FULL)])
def test_our_client_understands_our_server(remote: Remote, session: Session) -> None:
    reading = request(Command.READ, 512, 1024)
    writing = request(Command.WRITE, 512, 1024, cookie=8)
    failing = request(Command.TRIM, 512, 1024, cookie=9)
    nothing = request(Command.READ, 512, 0, cookie=10)
    content = bytes(range(256)) * 4
    data = (
        server.done(8)
        + server.data_head(reading, session)
        + content
        + server.failed(failing, session, Errno.EPERM, "not this")
        + server.data_head(nothing, session)
    )
    events, contents = read_all(remote, [reading, writing, failing, nothing], data)
    words = "not this" if session.structured else ""
    assert events == [
        Finished(8, 0),
        Data(7, 512, 1024),
        Finished(7, 0),
        Finished(9, errno.EPERM, words),
        Finished(10, 0),
    ]
    assert contents[7] == content


@pytest.mark.parametrize("session", [SIMPLE, FULL])
def test_a_read_may_fail(session: Session) -> None:
    reading = request(Command.READ, 512, 1024)
    remote = REMOTE if session.structured else PLAIN
    events, _ = read_all(remote, [reading], server.failed(reading, session, Errno.EIO))
    assert events == [Finished(7, errno.EIO)]


def test_block_status_is_cut_to_what_was_asked_for() -> None:
    asking = request(Command.BLOCK_STATUS, 0, 10000)
    extents = [Extent(4096, hole=True, zero=True), Extent(1 << 40, hole=False, zero=False)]
    events, _ = read_all(REMOTE, [asking], server.block_status(asking, extents))
    assert events == [Status(7, (extents[0], Extent(5904, hole=False, zero=False))), Finished(7, 0)]
    one = request(Command.BLOCK_STATUS, 0, 10000, CommandFlag.REQ_ONE)
    events, _ = read_all(REMOTE, [one], server.block_status(one, extents))
    assert events == [Status(7, (extents[0],)), Finished(7, 0)]


def test_a_read_comes_in_pieces_in_any_order_mixed_with_others() -> None:
    first = request(Command.READ, 0, 8192)
    second = request(Command.READ, 4096, 4096, cookie=8)
    data = (
        structured(1, struct.pack(">Q", 6000) + b"c" * 2192)
        + structured(1, struct.pack(">Q", 4096) + b"x" * 4096, 8)
        + structured(2, struct.pack(">QI", 0, 4096))
        + structured(0, b"", 8, done=True)
        + structured(1, struct.pack(">Q", 4096) + b"b" * 1904, done=True)
    )
    events, contents = read_all(REMOTE, [first, second], data)
    assert contents[7] == bytes(4096) + b"b" * 1904 + b"c" * 2192
    assert contents[8] == b"x" * 4096
    assert [event.cookie for event in events if isinstance(event, Finished)] == [8, 7]


def test_a_read_that_fails_in_a_place_has_failed() -> None:
    asked = request(Command.READ, 0, 8192)
    data = (
        structured(1, struct.pack(">Q", 0) + b"a" * 4096)
        + structured(0x8002, struct.pack(">IH", 5, 4) + b"dust" + struct.pack(">Q", 4096))
        + structured(0x8001, struct.pack(">IH", 28, 0), done=True)
    )
    events, _ = read_all(REMOTE, [asked], data)
    assert events == [Data(7, 0, 4096), Finished(7, errno.EIO, "dust")]


def test_an_error_of_a_kind_nobody_knows_is_an_error() -> None:
    data = structured(0xFFFF, struct.pack(">IH", 1, 0) + b"more", done=True)
    assert read_all(REMOTE, [request(Command.TRIM)], data)[0] == [Finished(7, errno.EPERM)]


def piece(offset: int, length: int) -> bytes:
    return structured(1, struct.pack(">Q", offset) + bytes(length))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Command.READ, server.done(7)),
        (Command.READ, structured(0, b"", done=True)),
        (Command.READ, piece(0, 100) + structured(0, b"", done=True)),
        (Command.READ, piece(0, 100) + piece(99, 10)),
        (Command.READ, piece(4000, 100)),
        (Command.READ, structured(2, struct.pack(">QI", 0, 4097))),
        (Command.READ, structured(2, struct.pack(">QI", 0, 0))),
        (Command.READ, structured(1, struct.pack(">Q", 0))),
        (Command.READ, structured(2, b"short")),
        (Command.READ, b"".join(piece(at, 1) for at in range(0, 4096, 2))),
        (Command.WRITE, piece(0, 4096)),
        (Command.WRITE, structured(2, struct.pack(">QI", 0, 4096))),
        (Command.WRITE, server.done(8)),
        (Command.WRITE, server.done(7) * 2),
        (Command.WRITE, structured(0, b"")),
        (Command.WRITE, structured(3, b"")),
        (Command.WRITE, structured(0x8001, struct.pack(">IH", 0, 0))),
        (Command.WRITE, structured(0x8001, struct.pack(">IH", 5, 9) + b"short")),
        (Command.WRITE, struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, 7, 1 << 30)),
        (Command.WRITE, structured(5, struct.pack(">III", 1, 4096, 0))),
        (Command.BLOCK_STATUS, server.done(7)),
        (Command.BLOCK_STATUS, structured(0, b"", done=True)),
        (Command.BLOCK_STATUS, structured(5, struct.pack(">III", 2, 4096, 0))),
        (Command.BLOCK_STATUS, structured(5, struct.pack(">III", 1, 0, 0))),
        (Command.BLOCK_STATUS, structured(5, struct.pack(">II", 1, 4096))),
        (Command.BLOCK_STATUS, structured(5, struct.pack(">III", 1, 4096, 0)) * 2),
        (Command.FLUSH, b"HTTP"),
    ],
)
def test_an_answer_that_cannot_be_believed_is_not(kind: Command, data: bytes) -> None:
    with pytest.raises(NbdError):
        read_all(REMOTE, [request(kind)], data)


def test_a_server_without_structured_replies_has_none() -> None:
    with pytest.raises(NbdError):
        read_all(PLAIN, [request(Command.WRITE)], structured(0, b"", done=True))


def test_two_requests_have_two_cookies() -> None:
    replies = Replies(REMOTE)
    replies.expect(request(Command.READ))
    with pytest.raises(ValueError, match="cookie 7"):
        replies.expect(request(Command.WRITE))


CHUNKS = st.builds(
    structured,
    st.sampled_from((0, 1, 2, 5, 5, 0x8001, 0x8002, 3)),
    st.one_of(
        st.binary(max_size=30),
        st.builds(
            lambda offset, data: struct.pack(">Q", offset) + data, st.integers(0, 40), st.binary(max_size=40)
        ),
        st.builds(
            lambda offset, size: struct.pack(">QI", offset, size), st.integers(0, 40), st.integers(0, 40)
        ),
        st.builds(
            lambda sizes: struct.pack(f">I{2 * len(sizes)}I", 1, *(n for size in sizes for n in (size, 3))),
            st.lists(st.integers(0, 50), max_size=3),
        ),
        st.builds(lambda number: struct.pack(">IH", number, 0), st.integers(0, 200)),
    ),
    st.integers(1, 4),
    done=st.booleans(),
)
SIMPLES = st.builds(
    lambda error, cookie: struct.pack(">IIQ", 0x67446698, error, cookie),
    st.sampled_from((0, 0, 5, 4711)),
    st.integers(1, 4),
)
ASKED = [
    request(Command.READ, 0, 40, cookie=1),
    request(Command.READ, 10, 20, cookie=2),
    request(Command.BLOCK_STATUS, 0, 40, cookie=3),
    request(Command.WRITE, 0, 40, cookie=4),
]


@settings(max_examples=500)
@given(st.lists(st.one_of(CHUNKS, SIMPLES), max_size=8), st.binary(max_size=20), st.booleans())
def test_whatever_a_server_answers_is_believed_or_refused(
    parts: list[bytes], tail: bytes, with_chunks: bool
) -> None:
    try:
        events, _ = read_all(REMOTE if with_chunks else PLAIN, ASKED, b"".join(parts) + tail)
    except NbdError:
        return
    finished = [event.cookie for event in events if isinstance(event, Finished)]
    assert len(finished) == len(set(finished))
    for event in events:
        if isinstance(event, Finished) and event.cookie < 3 and not event.error:
            came = [e for e in events if isinstance(e, Data | Zeroes) and e.cookie == event.cookie]
            assert sum(e.length for e in came) == ASKED[event.cookie - 1].length
        if isinstance(event, Status):
            assert 0 < sum(extent.length for extent in event.extents) <= 40
