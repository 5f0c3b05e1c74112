"""Frames over real loopback TCP: whole or not at all, however the link, its users or the network behave."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from curling_fd.errors import FrameError, LinkLost, PeerUnreachable
from curling_fd.link.frames import (
    HEADER_SIZE,
    TRAILER_SIZE,
    Header,
    Kind,
    digest,
    encode_json,
    encode_trailer,
)
from curling_fd.link.pulse import Pulse
from curling_fd.link.transport import PIPE_SIZE, STALL, FrameLink, Received, connect
from curling_fd.system.buffers import Buffer, BufferPool

MIB = 1 << 20
LONG = 8 * MIB


async def tcp_pair() -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = trio.socket.socket()
        await ours.connect(listener.getsockname())
        theirs, _ = await listener.accept()
    return ours, theirs


class Receiver:
    """A link that takes checkpoints into a pool of its own."""

    def __init__(self, sock: trio.socket.SocketType, *, buffers: int = 2, max_raw: int = LONG) -> None:
        self.pool = BufferPool("test-staging", buffers, max_raw)
        self.link = FrameLink(sock, max_raw=max_raw, acquire=self.pool.acquire, release=self.pool.release)

    async def payload(self) -> tuple[Header, bytes]:
        """Receive one frame with a raw payload, and let go of its buffer."""
        received = await self.link.receive()
        assert received.buffer is not None
        data = bytes(received.buffer.view[: received.header.length])
        self.pool.release(received.buffer)
        return received.header, data

    def free_again(self) -> bool:
        statistics = self.pool.statistics()
        return statistics.free == statistics.buffers

    def close(self) -> None:
        self.link.close()
        self.pool.close()


@asynccontextmanager
async def linked(**options: Any) -> AsyncIterator[tuple[FrameLink, Receiver]]:
    ours, theirs = await tcp_pair()
    link, receiver = FrameLink(ours), Receiver(theirs, **options)
    try:
        yield link, receiver
    finally:
        link.close()
        receiver.close()


@asynccontextmanager
async def raw_peer(**options: Any) -> AsyncIterator[tuple[trio.socket.SocketType, Receiver]]:
    """A receiver and the bare socket at the other end."""
    ours, theirs = await tcp_pair()
    receiver = Receiver(theirs, **options)
    try:
        with ours:
            yield ours, receiver
    finally:
        receiver.close()


def filled(length: int) -> Buffer:
    buffer = Buffer("test-capture", max(length, 1), prefault=0)
    pattern = os.urandom(65521)  # a prime: no page is like another
    buffer.view[:length] = (pattern * (length // len(pattern) + 1))[:length]
    return buffer


def checkpoint(payload: bytes, sequence: int = 1) -> bytes:
    header = Header(Kind.CHECKPOINT, 1, sequence, len(payload))
    head = header.encode()
    return head + payload + encode_trailer(sequence, digest(head, payload))


async def send_all(sock: trio.socket.SocketType, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]


def close(sock: trio.socket.SocketType) -> None:
    sock.close()


def reset(sock: trio.socket.SocketType) -> None:
    """Close so that the other side gets RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# Whole frames


async def test_frames_with_json_go_both_ways() -> None:
    async with linked() as (link, receiver):
        await link.send(Kind.HELLO, 3, content={"vm": "web"})
        received = await receiver.link.receive()
        assert received == Received(Header(Kind.HELLO, 3, 0, 12), {"vm": "web"})
        await receiver.link.send(Kind.WELCOME, 4, 7)
        assert (await link.receive()).header == Header(Kind.WELCOME, 4, 7, 0)


@pytest.mark.parametrize(
    "length", [0, 1, 4095, 65536, PIPE_SIZE - 1, PIPE_SIZE, PIPE_SIZE + 1, 3 * MIB + 17, LONG]
)
async def test_a_payload_of_any_length_arrives_as_it_was(nursery: trio.Nursery, length: int) -> None:
    async with linked() as (link, receiver):
        buffer = filled(length)
        header = Header(Kind.BULK, 1, 1, length)
        nursery.start_soon(link.send_raw, header, b"", (buffer, length))
        assert await receiver.payload() == (header, bytes(buffer.view[:length]))
        buffer.close()


async def test_a_preface_and_a_part_of_a_buffer_make_one_payload(nursery: trio.Nursery) -> None:
    async with linked() as (link, receiver):
        buffer = filled(100_000)
        nursery.start_soon(link.send_raw, Header(Kind.CHECKPOINT, 1, 1, 50_007), b"preface", (buffer, 50_000))
        assert (await receiver.payload())[1] == b"preface" + bytes(buffer.view[:50_000])
        buffer.close()


async def test_frames_of_many_tasks_do_not_mix(nursery: trio.Nursery) -> None:
    async with linked() as (link, receiver):
        buffer = filled(300_000)
        expected = bytes(buffer.view)
        for n in range(10):
            nursery.start_soon(link.send_raw, Header(Kind.CHECKPOINT, 1, n, 300_000), b"", (buffer, 300_000))
            nursery.start_soon(partial(link.send, Kind.NOTE, 1, n, {"paused": True}))
        seen: dict[Kind, set[int]] = {Kind.CHECKPOINT: set(), Kind.NOTE: set()}
        for _ in range(20):
            received = await receiver.link.receive()
            seen[received.header.kind].add(received.header.sequence)
            if received.buffer is not None:
                assert bytes(received.buffer.view[:300_000]) == expected
                receiver.pool.release(received.buffer)
        assert seen == {Kind.CHECKPOINT: set(range(10)), Kind.NOTE: set(range(10))}
        buffer.close()


async def test_what_went_over_the_link_is_counted(nursery: trio.Nursery) -> None:
    async with linked() as (link, receiver):
        buffer = filled(5000)
        await link.send(Kind.HEARTBEAT, 1)
        nursery.start_soon(link.send_raw, Header(Kind.BULK, 1, 1, 5000), b"", (buffer, 5000))
        await receiver.link.receive()
        await receiver.payload()
        await trio.testing.wait_all_tasks_blocked()
        total = 5000 + 2 * (HEADER_SIZE + TRAILER_SIZE)
        assert (link.statistics.sent, link.statistics.frames_sent) == (total, 2)
        assert (receiver.link.statistics.received, receiver.link.statistics.frames_received) == (total, 2)
        buffer.close()


async def test_small_frames_are_not_held_back_by_the_kernel() -> None:
    async with linked() as (link, receiver):
        for end in (link, receiver.link):
            assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


# Torn frames

CUT = checkpoint(os.urandom(10_000))
OFFSETS = {
    "before the first byte": 0,
    "after the first byte": 1,
    "inside the header": 20,
    "before the header's last byte": HEADER_SIZE - 1,
    "at the header's end": HEADER_SIZE,
    "after the payload's first byte": HEADER_SIZE + 1,
    "inside the payload": HEADER_SIZE + 5000,
    "before the payload's last byte": HEADER_SIZE + 9999,
    "at the payload's end": HEADER_SIZE + 10_000,
    "inside the trailer": HEADER_SIZE + 10_010,
    "before the last byte": len(CUT) - 1,
}


@pytest.mark.parametrize("end", [close, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
async def test_a_frame_that_is_cut_does_not_count(offset: int, end: Callable[[Any], None]) -> None:
    async with raw_peer() as (peer, receiver):
        await send_all(peer, checkpoint(b"the one before", 7))
        await send_all(peer, CUT[:offset])
        assert (await receiver.payload())[1] == b"the one before"
        end(peer)
        with pytest.raises(LinkLost) as caught:
            await receiver.link.receive()
        assert caught.value.why.startswith("the peer closed the link")
        assert receiver.free_again()


@pytest.mark.parametrize("offset", [*list(OFFSETS.values())[1:], 4, 33, 38])
async def test_a_damaged_byte_anywhere_is_a_frame_error(offset: int) -> None:
    damaged = bytearray(CUT)
    damaged[offset - 1] ^= 0x40
    async with raw_peer() as (peer, receiver):
        await send_all(peer, damaged)
        with pytest.raises(FrameError):
            await receiver.link.receive()
        assert receiver.free_again()


async def test_a_frame_that_comes_byte_by_byte_is_whole_with_its_last(nursery: trio.Nursery) -> None:
    data = checkpoint(b"x" * 100)
    got: list[bytes] = []
    async with raw_peer() as (peer, receiver):

        async def take() -> None:
            got.append((await receiver.payload())[1])

        nursery.start_soon(take)
        for position in range(len(data)):
            assert got == []
            await peer.send(data[position : position + 1])
            await trio.testing.wait_all_tasks_blocked()
        assert got == [b"x" * 100]


async def test_garbage_is_told_from_a_broken_link() -> None:
    async with raw_peer() as (peer, receiver):
        await send_all(peer, b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" + bytes(10))
        with pytest.raises(FrameError, match="not a Curling link"):
            await receiver.link.receive()


async def test_a_payload_longer_than_agreed_is_refused_before_any_memory_is_used() -> None:
    async with raw_peer(max_raw=1000) as (peer, receiver):
        await send_all(peer, Header(Kind.CHECKPOINT, 1, 1, 1001).encode())
        with pytest.raises(FrameError, match="1001 bytes"):
            await receiver.link.receive()
        assert receiver.pool.statistics().free == 2


async def test_a_payload_before_anything_was_agreed_is_refused() -> None:
    ours, theirs = await tcp_pair()
    link = FrameLink(theirs)
    with ours:
        await send_all(ours, checkpoint(b""))
        with pytest.raises(FrameError, match="before it was agreed"):
            await link.receive()
    link.close()


# Cancelling


def narrow(link: FrameLink) -> None:
    """Let less than a frame lie in the kernel, so that senders wait for receivers."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        link._socket.setsockopt(socket.SOL_SOCKET, option, MIB // 2)


async def test_a_frame_whose_sender_is_cancelled_is_finished_and_the_link_stays_of_use(
    nursery: trio.Nursery,
) -> None:
    async with linked() as (link, receiver):
        narrow(link)
        narrow(receiver.link)
        buffer, scope, ended = filled(LONG), trio.CancelScope(), trio.Event()

        async def send() -> None:
            with scope:
                await link.send_raw(Header(Kind.CHECKPOINT, 1, 1, LONG), b"", (buffer, LONG))
                await trio.sleep_forever()
            ended.set()

        nursery.start_soon(send)
        await until(lambda: link.statistics.sent > HEADER_SIZE)
        assert link.statistics.sent < LONG
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set(), "it is not let go in the middle of its frame"
        assert (await receiver.payload())[1] == bytes(buffer.view)
        await ended.wait()
        await link.send(Kind.END, 1, content={"reason": "goodbye"})
        assert (await receiver.link.receive()).content == {"reason": "goodbye"}
        buffer.close()


async def test_a_sender_that_is_cancelled_before_its_turn_sends_nothing(nursery: trio.Nursery) -> None:
    async with linked() as (link, receiver):
        narrow(link)
        narrow(receiver.link)
        buffer, scope = filled(LONG), trio.CancelScope()

        async def give_up() -> None:
            with scope:
                await link.send(Kind.NOTE, 1, content={"never": "sent"})

        nursery.start_soon(link.send_raw, Header(Kind.CHECKPOINT, 1, 1, LONG), b"", (buffer, LONG))
        await until(lambda: link.statistics.sent > HEADER_SIZE)
        nursery.start_soon(give_up)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(link.send, Kind.HEARTBEAT, 1)
        await receiver.payload()
        assert (await receiver.link.receive()).header.kind is Kind.HEARTBEAT
        buffer.close()


async def test_waiting_for_a_frame_can_be_cancelled_and_taken_up_again() -> None:
    async with linked() as (link, receiver):
        with trio.move_on_after(0):
            await receiver.link.receive()
        await link.send(Kind.HEARTBEAT, 9)
        assert (await receiver.link.receive()).header.generation == 9


async def test_a_short_frame_that_has_begun_is_read_to_its_end_though_its_receiver_is_cancelled(
    nursery: trio.Nursery,
) -> None:
    frame, got, scope = encode_json(Kind.NOTE, 1, content={"paused": True}), [], trio.CancelScope()
    async with raw_peer() as (peer, receiver):

        async def take() -> None:
            with scope:
                got.append(await receiver.link.receive())

        nursery.start_soon(take)
        await peer.send(frame[:45])
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await peer.send(frame[45:] + encode_json(Kind.HEARTBEAT, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert [received.content for received in got] == [{"paused": True}]
        assert (await receiver.link.receive()).header.kind is Kind.HEARTBEAT


async def test_a_receiver_cancelled_inside_a_payload_gives_its_buffer_back(nursery: trio.Nursery) -> None:
    scope = trio.CancelScope()
    async with raw_peer() as (peer, receiver):

        async def take() -> None:
            with scope:
                await receiver.link.receive()

        nursery.start_soon(take)
        await send_all(peer, CUT[:5000])
        await trio.testing.wait_all_tasks_blocked()
        assert not receiver.free_again()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert receiver.free_again()


async def test_a_frame_in_which_nothing_moves_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as (link, receiver):
        narrow(link)
        narrow(receiver.link)
        buffer = filled(LONG)
        started = trio.current_time()
        with pytest.raises(LinkLost, match="nothing moved"):
            await link.send_raw(Header(Kind.CHECKPOINT, 1, 1, LONG), b"", (buffer, LONG))
        assert trio.current_time() - started >= STALL
        buffer.close()


async def test_a_header_that_never_ends_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (peer, receiver):
        await peer.send(CUT[:10])
        with pytest.raises(LinkLost, match="nothing moved"):
            await receiver.link.receive()


# Backpressure (I6)


async def test_without_a_free_buffer_the_sender_waits_and_memory_stays_bounded(nursery: trio.Nursery) -> None:
    async with linked(buffers=2) as (link, receiver):
        narrow(link)
        narrow(receiver.link)
        buffer, held = filled(LONG), []
        for sequence in range(5):
            nursery.start_soon(link.send_raw, Header(Kind.BULK, 1, sequence, LONG), b"", (buffer, LONG))

        async def take() -> None:
            while True:
                held.append(await receiver.link.receive())

        nursery.start_soon(take)
        await until(lambda: len(held) == 2)
        await trio.testing.wait_all_tasks_blocked()
        # The third frame's header has come, and then the reading stopped.
        assert link.statistics.frames_sent == 2
        assert link.statistics.sent < 2.5 * LONG
        statistics = receiver.pool.statistics()
        assert statistics.buffers == 2
        assert statistics.allocated <= statistics.limit == 2 * LONG
        for taken in range(5):
            await until(lambda taken=taken: len(held) > taken)  # type: ignore[misc]
            arrived = held[taken].buffer
            assert arrived is not None
            assert arrived.view == buffer.view
            receiver.pool.release(arrived)
        assert receiver.pool.statistics().buffers == 2
        nursery.cancel_scope.cancel()


async def test_every_buffer_comes_back_however_frames_end() -> None:
    """A hundred frames, half of them broken, over as many links: never more than the pool's two buffers."""
    pool = BufferPool("test", 2, MIB)
    for number in range(100):
        ours, theirs = await tcp_pair()
        link = FrameLink(theirs, max_raw=MIB, acquire=pool.acquire, release=pool.release)
        with ours:
            await send_all(ours, CUT[: len(CUT) - number % 2])
            ours.shutdown(socket.SHUT_WR)
            try:
                received = await link.receive()
            except LinkLost:
                assert number % 2
            else:
                assert received.buffer is not None
                pool.release(received.buffer)
        link.close()
    assert pool.statistics().free == 2
    pool.close()


# Closing


async def closed_while(nursery: trio.Nursery, link: FrameLink, wait: Callable[[], Awaitable[object]]) -> str:
    """Close `link` while a task waits in `wait`; returns what that task was told."""
    told: list[str] = []

    async def waits() -> None:
        with pytest.raises(LinkLost) as caught:
            await wait()
        told.append(caught.value.why)

    nursery.start_soon(waits)
    await trio.testing.wait_all_tasks_blocked()
    assert told == []
    link.close()
    link.close()
    await trio.testing.wait_all_tasks_blocked()
    return told[0]


async def test_closing_wakes_whoever_waits_for_a_frame(nursery: trio.Nursery) -> None:
    async with linked() as (link, receiver):
        assert await closed_while(nursery, receiver.link, receiver.link.receive) == "the link was closed here"
        with pytest.raises(LinkLost):
            await link.receive()


async def test_closing_wakes_whoever_is_inside_a_payload(nursery: trio.Nursery) -> None:
    async with raw_peer() as (peer, receiver):
        await send_all(peer, CUT[:5000])
        assert await closed_while(nursery, receiver.link, receiver.link.receive) == "the link was closed here"
        assert receiver.free_again()


async def test_closing_wakes_whoever_is_inside_a_frame_to_send(nursery: trio.Nursery) -> None:
    async with linked() as (link, receiver):
        narrow(link)
        narrow(receiver.link)
        buffer, told = filled(LONG), []

        async def send() -> None:
            with pytest.raises(LinkLost) as caught:
                await link.send_raw(Header(Kind.CHECKPOINT, 1, 1, LONG), b"", (buffer, LONG))
            told.append(caught.value.why)

        async def send_later() -> None:
            with pytest.raises(LinkLost) as caught:
                await link.send(Kind.HEARTBEAT, 1)
            told.append(caught.value.why)

        nursery.start_soon(send)
        await until(lambda: link.statistics.sent > HEADER_SIZE)
        nursery.start_soon(send_later)
        await trio.testing.wait_all_tasks_blocked()
        link.close()
        await until(lambda: len(told) == 2)
        assert told == ["the link was closed here"] * 2
        buffer.close()


async def test_a_link_closed_while_no_buffer_was_free_touches_no_other_file(nursery: trio.Nursery) -> None:
    """Its numbers may be other files' by the time the buffer comes."""
    async with raw_peer(buffers=1) as (peer, receiver):
        buffer = await receiver.pool.acquire()
        await send_all(peer, CUT)
        told: list[str] = []

        async def waits() -> None:
            with pytest.raises(LinkLost) as caught:
                await receiver.link.receive()
            told.append(caught.value.why)

        nursery.start_soon(waits)
        await trio.testing.wait_all_tasks_blocked()
        receiver.link.close()
        others = [tuple(socket.socketpair()) for _ in range(4)]
        for one, two in others:
            one.send(b"somebody else's")
            two.send(b"somebody else's")
        receiver.pool.release(buffer)
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["the link was closed here"]
        for one, two in others:
            assert one.recv(100) == two.recv(100) == b"somebody else's"
            one.close()
            two.close()


async def test_a_sender_whose_link_is_closed_between_two_slices_touches_no_other_file(
    nursery: trio.Nursery,
) -> None:
    async with linked() as (link, _):
        buffer, told = filled(LONG), []
        strangers: list[socket.socket] = []

        async def send() -> None:
            with pytest.raises(LinkLost) as caught:
                await link.send_raw(Header(Kind.CHECKPOINT, 1, 1, LONG), b"", (buffer, LONG))
            told.append(caught.value.why)

        async def close() -> None:
            while not link.statistics.sent:
                await trio.lowlevel.checkpoint()
            link.close()
            strangers.extend(socket.socketpair())  # which get the numbers that became free

        async with trio.open_nursery() as both:
            both.start_soon(close)
            both.start_soon(send)
        assert told == ["the link was closed here"]
        for stranger in strangers:
            stranger.setblocking(False)
            with pytest.raises(BlockingIOError):
                stranger.recv(1)
        for stranger in strangers:
            stranger.close()
        buffer.close()


async def test_a_closed_link_says_so_and_holds_no_descriptor() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    async with linked() as (link, receiver):
        link.close()
        buffer = filled(1)
        for attempt in (
            partial(link.send, Kind.HEARTBEAT, 1),
            partial(link.send_raw, Header(Kind.BULK, 1, 1, 1), b"", (buffer, 1)),
            link.receive,
        ):
            with pytest.raises(LinkLost, match="closed"):
                await attempt()
        buffer.close()
        with pytest.raises(LinkLost):
            await receiver.link.receive()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_sending_to_a_peer_that_has_gone_is_a_lost_link() -> None:
    ours, theirs = await tcp_pair()
    link = FrameLink(ours)
    reset(theirs)
    with pytest.raises(LinkLost, match="the peer closed the link"):
        await Pulse(link, 1, 0, 1).keep()
    link.close()


# Connecting


async def test_where_nobody_listens_the_peer_is_unreachable() -> None:
    with trio.socket.socket() as free:
        await free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    with pytest.raises(PeerUnreachable) as caught:
        await connect(address)
    assert caught.value.address == f"127.0.0.1:{address[1]}"
    assert "refused" in caught.value.problem


async def test_a_peer_that_does_not_answer_is_unreachable(autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)  # one place, which `first` takes; what comes then is not answered
        first.connect(listener.getsockname())
        second.setblocking(False)
        second.connect_ex(listener.getsockname())
        with pytest.raises(PeerUnreachable, match=r"."):
            await connect(listener.getsockname())


# The pulse


@asynccontextmanager
async def watched(
    link: FrameLink, timeout: float, *tasks: Callable[[], Awaitable[object]]
) -> AsyncIterator[list[LinkLost]]:
    """The watching of `link` and `tasks` beside the block; what they raised."""
    errors: list[LinkLost] = []

    async def noting(task: Callable[[], Awaitable[object]]) -> None:
        try:
            await task()
        except LinkLost as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for task in (Pulse(link, 1, 0.3, timeout).watch, *tasks):
            nursery.start_soon(noting, task)
        await trio.testing.wait_all_tasks_blocked()
        yield errors
        nursery.cancel_scope.cancel()


async def step(clock: trio.testing.MockClock, seconds: float) -> None:
    """Let `seconds` pass, in steps small enough that nobody seems to have overslept."""
    for _ in range(round(seconds / 0.1)):
        clock.jump(0.1)
        await trio.testing.wait_all_tasks_blocked()


async def receive_for_ever(link: FrameLink) -> None:
    while True:
        await link.receive()


async def test_a_peer_with_a_pulse_is_not_lost(mock_clock: trio.testing.MockClock) -> None:
    async with linked() as (link, receiver):
        beat, listen = Pulse(link, 1, 0.3, 1).keep, partial(receive_for_ever, receiver.link)
        async with watched(receiver.link, 1.0, beat, listen) as errors:
            await step(mock_clock, 30)
            assert errors == []
            assert receiver.link.statistics.frames_received >= 90


async def test_a_silent_peer_is_lost_after_the_timeout_and_whoever_listens_is_told(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with linked() as (_, receiver), watched(receiver.link, 1.0, receiver.link.receive) as errors:
        await step(mock_clock, 0.9)
        assert errors == []
        await step(mock_clock, 0.2)
        assert sorted(error.why[:24] for error in errors) == [
            "the link was closed here",
            "the peer has been silent",
        ]


async def test_any_byte_is_a_sign_of_life(mock_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (peer, receiver), watched(receiver.link, 1.0, receiver.link.receive) as errors:
        await peer.send(CUT[:HEADER_SIZE])
        for position in range(HEADER_SIZE, HEADER_SIZE + 40):
            await peer.send(CUT[position : position + 1])
            await trio.testing.wait_all_tasks_blocked()
            await step(mock_clock, 0.9)
        assert errors == []


async def test_a_host_that_was_frozen_itself_gives_its_peer_the_time_again(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with (
        linked() as (link, receiver),
        watched(receiver.link, 1.0, partial(receive_for_ever, receiver.link)) as errors,
    ):
        mock_clock.jump(3600)
        await trio.testing.wait_all_tasks_blocked()
        assert errors == []
        await step(mock_clock, 0.8)
        await link.send(Kind.HEARTBEAT, 1)
        await step(mock_clock, 0.8)
        assert errors == []
        await step(mock_clock, 0.4)
        assert len(errors) == 2, "but not for ever"


async def test_a_peer_is_not_silent_while_we_have_no_buffer_for_what_it_sent(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with raw_peer(buffers=1) as (peer, receiver):
        buffer = await receiver.pool.acquire()
        got: list[Received] = []

        async def take() -> None:
            got.append(await receiver.link.receive())
            await receiver.link.receive()

        async with watched(receiver.link, 1.0, take) as errors:
            await send_all(peer, CUT)
            await trio.testing.wait_all_tasks_blocked()
            await step(mock_clock, 10)
            assert errors == []
            receiver.pool.release(buffer)
            await trio.testing.wait_all_tasks_blocked()
            assert len(got) == 1
            await step(mock_clock, 0.9)
            assert errors == []
            await step(mock_clock, 0.2)
            assert len(errors) == 2, "now we listen, and it is silent"


async def test_a_peer_is_not_silent_while_we_are_busy_with_its_last_frame(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with linked() as (link, receiver):
        await link.send(Kind.NOTE, 1)
        busy = trio.Event()

        async def take() -> None:
            await receiver.link.receive()
            await busy.wait()
            await receive_for_ever(receiver.link)

        async with watched(receiver.link, 1.0, take) as errors:
            await step(mock_clock, 10)
            assert errors == []
            busy.set()
            await trio.testing.wait_all_tasks_blocked()
            await step(mock_clock, 0.9)
            assert errors == []
            await step(mock_clock, 0.3)
            assert len(errors) == 2


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until `condition` holds."""
    with trio.fail_after(20):
        while not condition():
            await trio.lowlevel.checkpoint()


async def test_in_a_rest_no_heartbeat_is_sent_and_silence_does_not_count(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with linked() as (link, receiver):
        pulse = Pulse(link, 1, 0.3, 1.0)
        async with watched(link, 100, pulse.keep, pulse.watch, partial(receive_for_ever, link)) as errors:
            await pulse.rest(20)
            while receiver.link.statistics.frames_received < link.statistics.frames_sent:
                await receiver.link.receive()
            before = link.statistics.frames_sent
            await step(mock_clock, 19.8)
            assert errors == []
            assert link.statistics.frames_sent == before
            await step(mock_clock, 1.4)
            assert "silent" in errors[0].why


async def test_after_a_rest_the_pulse_goes_on_and_silence_counts_at_once(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with linked() as (link, _):
        pulse = Pulse(link, 1, 0.3, 1.0)
        async with watched(link, 100, pulse.keep, pulse.watch, partial(receive_for_ever, link)) as errors:
            await pulse.rest(20)
            await step(mock_clock, 5)
            before = link.statistics.frames_sent
            pulse.wake()
            await step(mock_clock, 0.8)
            assert errors == []
            assert link.statistics.frames_sent > before
            await step(mock_clock, 0.4)
            assert "silent" in errors[0].why
