"""The endpoint of a disk, over a socket pair, and our client with it."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.disk.endpoint import DiskEndpoint, DiskReader, Ending
from curling_fd.disk.intake import Intake, Payload
from curling_fd.disk.nbd_client import Change, NbdClient
from curling_fd.errors import NbdError, NbdRequestFailed
from curling_fd.nbd import server
from curling_fd.nbd.protocol import Command, CommandFlag, Errno, Extent, Request
from curling_fd.nbd.server import Export, Session
from tests.unit.nbd_streams import all_of, conversation

SIZE = 200_000
DISK = Export("disk", SIZE)
AGREED = Session("disk", structured=True, allocation=True)
HANDSHAKE_ALONE = b"\0\0\0\3"


@define
class Memory:
    """A disk in memory, written in one of three ways."""

    way: str = "read_into"
    content: bytearray = field(factory=lambda: bytearray(SIZE))
    calls: list[tuple[str, int, int]] = field(factory=list)
    fails: dict[str, OSError] = field(factory=dict)

    def write(self, offset: int, length: int, payload: Payload) -> None:
        assert payload.left == length
        self._called("write", offset, length)
        if self.way == "read_into":
            payload.read_into(memoryview(self.content)[offset : offset + length])
        elif self.way == "in two":
            half = length // 2
            view = memoryview(self.content)[offset : offset + length]
            payload.read_into(view[:half])
            payload.read_into(view[half:])
        else:
            fd = (
                os.memfd_create("disk") if self.way == "splice" else os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
            )
            try:
                payload.splice_to(fd, 3)
                self.content[offset : offset + length] = os.pread(fd, length + 10, 3)
            finally:
                os.close(fd)
        assert payload.left == 0

    def zero(self, offset: int, length: int) -> None:
        self._called("zero", offset, length)
        self.content[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int) -> None:
        self._called("trim", offset, length)

    def _called(self, name: str, offset: int, length: int) -> None:
        self.calls.append((name, offset, length))
        if name in self.fails:
            raise self.fails[name]

    def reader(self) -> DiskReader:
        return DiskReader(self.read, self.status)

    def read(self, offset: int, length: int) -> memoryview:
        if "read" in self.fails:
            raise self.fails["read"]
        return memoryview(self.content)[offset : offset + length]

    def status(self, offset: int, length: int) -> list[Extent]:
        """Blocks of 4096 bytes."""
        found = []
        while length:
            size = min(4096 - offset % 4096, length)
            empty = not any(self.content[offset : offset + size])
            found.append(Extent(size, hole=empty, zero=empty))
            offset, length = offset + size, length - size
        return found


def request(kind: int, offset: int = 0, length: int = 0, cookie: int = 1, flags: int = 0) -> bytes:
    return Request(kind, flags, cookie, offset, length).encode()


def served(
    data: bytes, memory: Memory, *, cuts: tuple[int, ...] = (), session: Session | None = AGREED
) -> tuple[Ending | NbdError, bytes]:
    """Serve a client that says `data` and closes; how it ended, and what the client was answered."""
    ours, theirs = conversation(data, cuts)
    endpoint = DiskEndpoint(ours, DISK, memory, session=session, reader=memory.reader())
    ending: Ending | NbdError
    # The answers are read beside it: they may be more than a socket holds.
    answers: list[bytes] = []
    reader = threading.Thread(target=lambda: answers.append(all_of(theirs)))
    reader.start()
    try:
        ending = endpoint.run()
    except NbdError as error:
        ending = error
    finally:
        endpoint.close()
        ours.close()
        reader.join()
        theirs.close()
    return ending, answers[0]


@contextmanager
def running(
    memory: Memory, *, client: bool = True, session: Session | None = None, reader: bool = True
) -> Iterator[tuple[DiskEndpoint, NbdClient, Callable[[], Ending | NbdError]]]:
    """An endpoint in a thread, a client of it, and what waits for the endpoint's end."""
    ours, theirs = socket.socketpair()
    endpoint = DiskEndpoint(ours, DISK, memory, session=session, reader=memory.reader() if reader else None)
    endings: list[Ending | NbdError] = []

    def run() -> None:
        try:
            endings.append(endpoint.run())
        except NbdError as error:
            endings.append(error)

    def ended() -> Ending | NbdError:
        thread.join(30)
        return endings[0]

    thread = threading.Thread(target=run)
    thread.start()
    with theirs:
        try:
            yield endpoint, NbdClient.over(theirs, "disk"), ended
        finally:
            endpoint.abort()
            thread.join()
            endpoint.close()
            ours.close()


def test_our_client_reads_what_it_wrote() -> None:
    memory = Memory()
    with running(memory) as (endpoint, client, ended):
        content = os.urandom(150_000)
        client.write(1234, memoryview(content))
        client.zero(2000, 10)
        client.trim(0, 100)
        client.flush()
        back = bytearray(150_000)
        client.read_into(memoryview(back), 1234)
        assert back[: 2000 - 1234] + back[2010 - 1234 :] == content[: 2000 - 1234] + content[2010 - 1234 :]
        assert back[2000 - 1234 : 2010 - 1234] == bytes(10)
        client.close()
        assert ended() == Ending.LEFT
        statistics = endpoint.statistics()
    assert statistics.requests == {"READ": 1, "WRITE": 1, "FLUSH": 1, "TRIM": 1, "WRITE_ZEROES": 1}
    assert (statistics.written, statistics.zeroed) == (150_000, 10)


def test_our_client_sees_where_there_is_nothing() -> None:
    memory = Memory()
    memory.content[50_000] = 1
    with running(memory) as (_, client, _ended):
        assert client.status(100, SIZE - 200) == [
            Extent(49_152 - 100, hole=True, zero=True),
            Extent(4096, hole=False, zero=False),
            Extent(SIZE - 100 - 49_152 - 4096, hole=True, zero=True),
        ]


def test_many_reads_at_once_find_their_places() -> None:
    memory = Memory(content=bytearray(os.urandom(SIZE)))
    with running(memory) as (_, client, _ended):
        views = [bytearray(3000) for _ in range(60)]
        client.read_many((memoryview(view), 3000 * index) for index, view in enumerate(views))
        assert b"".join(views) == memory.content[: 60 * 3000]


def test_changes_have_the_effect_of_one_after_the_other() -> None:
    memory = Memory()
    with running(memory) as (_, client, _ended):
        client.change(
            [
                Change.write(0, memoryview(b"a" * 1000)),
                Change.zero(100, 300, thin=False),
                Change.trim(1000, 100),
                Change.write(200, memoryview(b"b" * 10)),
            ]
        )
    assert memory.content[:1000] == b"a" * 100 + bytes(100) + b"b" * 10 + bytes(190) + b"a" * 600


def test_a_failure_is_told_and_the_connection_goes_on() -> None:
    memory = Memory(fails={"read": OSError(errno.EIO, ""), "zero": OSError(errno.ENOSPC, "")})
    with running(memory) as (_, client, _ended):
        with pytest.raises(NbdRequestFailed) as failure:
            client.read_into(memoryview(bytearray(10)), 5)
        assert (failure.value.command, failure.value.offset, failure.value.errno) == ("READ", 5, errno.EIO)
        with pytest.raises(NbdRequestFailed, match="WRITE_ZEROES"):
            client.zero(0, 10)
        with pytest.raises(NbdRequestFailed, match="READ"):
            client.read_into(memoryview(bytearray(10)), SIZE - 9)
        client.write(0, memoryview(b"all right"))
        assert memory.content[:9] == b"all right"


def test_a_disk_that_is_only_written_is_not_read() -> None:
    with running(Memory(), reader=False) as (_, client, _ended):
        assert client.remote.allocation is None
        with pytest.raises(NbdRequestFailed) as failure:
            client.read_into(memoryview(bytearray(10)), 5)
        assert failure.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("way", ["read_into", "in two", "splice", "splice to a file"])
def test_a_payload_reaches_its_place_by_every_way(way: str) -> None:
    content = os.urandom(170_000)
    memory = Memory(way)
    data = request(Command.WRITE, 11, len(content)) + content
    data += request(Command.WRITE, 3, 5, 2) + b"small" + request(Command.FLUSH, cookie=3)
    ending, answers = served(data, memory, cuts=(1, 5000, 40, 28))
    assert ending == Ending.LEFT
    assert answers == server.done(1) + server.done(2) + server.done(3)
    assert memory.content[11 : 11 + len(content)] == content
    assert memory.content[3:8] == b"small"


def test_a_payload_is_copied_where_the_kernel_cannot_splice() -> None:
    content = os.urandom(100_000)
    ours, _theirs = conversation(content)
    intake = Intake(ours)
    # A file opened to append to is one that splice refuses.
    path_fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_APPEND)
    Payload(intake, memoryview(b""), len(content)).splice_to(fd, 0)
    assert os.pread(fd, len(content) + 1, 0) == content
    for number in (fd, path_fd):
        os.close(number)
    intake.close()
    ours.close()
    _theirs.close()


def test_what_the_sink_does_not_take_is_read_and_forgotten() -> None:
    memory = Memory(fails={"write": OSError(errno.ENOSPC, "full")})
    data = request(Command.WRITE, 0, 100_000) + bytes(100_000) + request(Command.FLUSH, cookie=2)
    ending, answers = served(data, memory, session=Session("disk"))
    assert ending == Ending.LEFT
    assert answers == struct.pack(">IIQ", 0x67446698, Errno.ENOSPC, 1) + server.done(2)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(Command.WRITE, SIZE - 1, 2) + b"ab", Errno.ENOSPC),
        (request(Command.WRITE, 2**64 - 1, 2) + b"ab", Errno.ENOSPC),
        (request(Command.READ, SIZE, 1), Errno.EINVAL),
        (request(Command.TRIM, SIZE, 1), Errno.EINVAL),
        (request(Command.WRITE_ZEROES, 0, 1, flags=CommandFlag.FAST_ZERO), Errno.EINVAL),
        (request(0x1234, 1, 2), Errno.EINVAL),
    ],
)
def test_a_lie_about_a_place_is_an_error_and_no_more(asked: bytes, error: Errno) -> None:
    memory = Memory()
    ending, answers = served(asked + request(Command.FLUSH, cookie=2), memory, session=Session("disk"))
    assert ending == Ending.LEFT
    assert answers == struct.pack(">IIQ", 0x67446698, error, 1) + server.done(2)
    assert not memory.calls and not any(memory.content)


@pytest.mark.parametrize(
    "data",
    [
        request(Command.WRITE, 0, 100) + bytes(99),
        request(Command.WRITE, 0, 33 << 20),
        request(Command.FLUSH)[:-1],
        request(Command.FLUSH) + b"HTTP/1.1 200 OK and so on and on",
        request(Command.WRITE, 0, 100_000) + bytes(70_000),
    ],
)
@pytest.mark.parametrize("way", ["read_into", "splice"])
def test_where_the_thread_is_lost_the_connection_ends(data: bytes, way: str) -> None:
    ending, _ = served(data, Memory(way))
    assert isinstance(ending, NbdError)


def test_a_goodbye_is_after_all_answers() -> None:
    ending, answers = served(request(Command.FLUSH) + request(Command.DISC, cookie=2), Memory())
    assert (ending, answers) == (Ending.LEFT, server.done(1))


def test_several_requests_are_read_and_answered_at_once() -> None:
    data = b"".join(request(Command.WRITE, 0, 512, index) + bytes(512) for index in range(50))
    ours, theirs = conversation(data)
    endpoint = DiskEndpoint(ours, DISK, Memory(), session=AGREED)
    endpoint.run()
    assert endpoint.statistics().batches == 2, "the last found the end"
    endpoint.close()
    ours.close()
    assert all_of(theirs) == b"".join(map(server.done, range(50)))
    theirs.close()


def test_a_stop_hands_the_connection_on() -> None:
    memory = Memory()
    ours, theirs = socket.socketpair()
    first = DiskEndpoint(ours, DISK, memory, reader=memory.reader())
    endings: list[Ending] = []
    thread = threading.Thread(target=lambda: endings.append(first.run()))
    thread.start()
    client = NbdClient.over(theirs, "disk")
    client.write(0, memoryview(b"before"))
    first.stop()
    thread.join()
    first.close()
    assert endings == [Ending.STOPPED]
    assert first.session == Session("disk", structured=True, allocation=True)

    # What the client says meanwhile waits in the socket.
    later = threading.Thread(target=lambda: client.write(6, memoryview(b" and after")))
    later.start()
    second = DiskEndpoint(ours, DISK, memory, session=first.session, reader=memory.reader())
    thread = threading.Thread(target=lambda: endings.append(second.run()))
    thread.start()
    later.join()
    second.stop()
    thread.join()
    second.close()
    assert endings == [Ending.STOPPED] * 2
    assert memory.content[:16] == b"before and after"
    client.close()
    ours.close()


def test_a_stop_waits_for_the_end_of_what_was_begun() -> None:
    """The stop comes while a payload is on its way, with more requests behind it."""
    memory = Memory()
    ours, theirs = socket.socketpair()
    endpoint = DiskEndpoint(ours, DISK, memory, session=AGREED)
    started = threading.Event()
    write = memory.write

    class Sink(Memory):
        def write(self, offset: int, length: int, payload: Payload) -> None:
            started.set()
            write(offset, length, payload)

    endpoint = DiskEndpoint(ours, DISK, Sink(), session=AGREED)
    endings: list[Ending] = []
    thread = threading.Thread(target=lambda: endings.append(endpoint.run()))
    thread.start()
    theirs.sendall(request(Command.WRITE, 0, 1000) + bytes(500))
    started.wait()
    endpoint.stop()
    theirs.sendall(b"x" * 500 + request(Command.FLUSH, cookie=2))
    thread.join()
    assert endings == [Ending.STOPPED]
    assert bytes(memory.content[:1000]) == bytes(500) + b"x" * 500
    assert theirs.recv(16, socket.MSG_WAITALL) == server.done(1)
    # The next request stayed where it was.
    assert ours.recv(100) == request(Command.FLUSH, cookie=2)
    endpoint.close()
    ours.close()
    theirs.close()


def test_a_connection_that_is_not_yet_negotiated_is_broken_by_a_stop() -> None:
    ours, theirs = socket.socketpair()
    endpoint = DiskEndpoint(ours, DISK, Memory())
    endings: list[NbdError] = []

    def run() -> None:
        with pytest.raises(NbdError) as broken:
            endpoint.run()
        endings.append(broken.value)

    thread = threading.Thread(target=run)
    thread.start()
    assert theirs.recv(100) == b"NBDMAGICIHAVEOPT\0\3"
    endpoint.stop()
    thread.join()
    assert len(endings) == 1
    endpoint.close()
    ours.close()
    theirs.close()


async def test_a_task_that_is_cancelled_ends_its_thread() -> None:
    ours, theirs = socket.socketpair()
    endpoint = DiskEndpoint(ours, DISK, Memory(), session=AGREED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert theirs.recv(1) == b""
    endpoint.close()
    ours.close()
    theirs.close()


async def test_a_task_that_serves_says_how_it_ended() -> None:
    ours, theirs = socket.socketpair()
    endpoint = DiskEndpoint(ours, DISK, Memory(), session=AGREED)
    theirs.close()
    assert await endpoint.serve() == Ending.LEFT
    endpoint.close()
    ours.close()

    ours, theirs = socket.socketpair()
    endpoint = DiskEndpoint(ours, DISK, Memory(), session=AGREED)
    theirs.sendall(b"nonsense that is longer than a header")
    with pytest.raises(NbdError):
        await endpoint.serve()
    endpoint.close()
    ours.close()
    theirs.close()


@define
class Asked:
    kind: int
    offset: int
    length: int
    flags: int

    def encode(self, cookie: int) -> bytes:
        data = bytes((cookie % 255 + 1,)) * self.length if self.kind == Command.WRITE else b""
        return request(self.kind, self.offset, self.length, cookie, self.flags) + data


PLACES = st.one_of(st.integers(0, SIZE - 3000), st.sampled_from((0, SIZE - 3000, SIZE - 2, SIZE, 2**64 - 1)))
REQUESTS = st.builds(
    Asked,
    st.sampled_from((0, 1, 1, 1, 3, 4, 6, 7)),
    PLACES,
    st.one_of(st.integers(0, 3000), st.just(70_000)),
    st.sampled_from((0, 0, 0, 1, 2, 8, 16)),
)
CUTS = st.lists(st.integers(1, 100), max_size=60).map(tuple)


@settings(max_examples=100)
@given(
    st.lists(REQUESTS, max_size=12), CUTS, st.sampled_from(("read_into", "in two", "splice")), st.booleans()
)
def test_every_request_is_answered_in_order_and_does_what_it_says(
    asked: list[Asked], cuts: tuple[int, ...], way: str, structured: bool
) -> None:
    memory, expected = Memory(way), bytearray(SIZE)
    session = Session("disk", structured=structured, allocation=structured)
    answers = b""
    for cookie, item in enumerate(asked):
        parsed = server.parse_request(item.encode(cookie))
        error = server.check_request(parsed, Export("disk", SIZE, allocation=True), session)
        place = slice(item.offset, item.offset + item.length)
        if error is not None:
            answers += server.failed(parsed, session, error)
        elif item.kind == Command.READ:
            answers += server.data_head(parsed, session) + bytes(expected[place])
        elif item.kind == Command.BLOCK_STATUS:
            answers += server.block_status(parsed, Memory(content=expected).status(item.offset, item.length))
        else:
            if item.kind == Command.WRITE:
                expected[place] = item.encode(cookie)[28:]
            elif item.kind == Command.WRITE_ZEROES:
                expected[place] = bytes(item.length)
            answers += server.done(cookie)
    data = b"".join(item.encode(cookie) for cookie, item in enumerate(asked))
    assert served(data, memory, cuts=cuts, session=session) == (Ending.LEFT, answers)
    assert memory.content == expected


@settings(max_examples=200)
@given(st.lists(REQUESTS, max_size=6), st.binary(max_size=60), st.data(), CUTS, st.booleans())
def test_nonsense_is_served_refused_or_the_end(
    asked: list[Asked], tail: bytes, data: st.DataObject, cuts: tuple[int, ...], negotiated: bool
) -> None:
    stream = bytearray(b"".join(item.encode(cookie) for cookie, item in enumerate(asked)) + tail)
    for _ in range(data.draw(st.integers(0, 3)) if stream else 0):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] ^= data.draw(st.integers(1, 255))
    if stream and data.draw(st.booleans()):
        del stream[data.draw(st.integers(0, len(stream) - 1)) :]
    if not negotiated:
        stream[:0] = HANDSHAKE_ALONE
    ending, _ = served(bytes(stream), Memory(), cuts=cuts, session=AGREED if negotiated else None)
    assert isinstance(ending, Ending | NbdError)
