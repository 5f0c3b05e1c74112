"""A link on a TCP socket: frames out with sendfile, frames in with splice, no copy through Python.

`FrameLink` sends from any task, one frame at a time, and is received from by one task. Big payloads go
memfd -> socket by sendfile and socket -> pipe -> memfd by splice.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import trio
from attrs import define, field, frozen

from curling_fd.errors import FrameError, LinkClosed, LinkLost, PeerUnreachable
from curling_fd.link.frames import (
    BYTES,
    HEADER_SIZE,
    RAW,
    TRAILER_SIZE,
    Header,
    Kind,
    check_trailer,
    decode_json,
    digest,
    encode_bytes,
    encode_json,
    encode_trailer,
)
from curling_fd.system.buffers import Buffer
from curling_fd.system.threads import work

#: Bytes of the pipe between socket and memfd; more needs CAP_SYS_RESOURCE.
PIPE_SIZE = 1 << 20

#: Bytes offered to one sendfile or splice call: enough to amortise it, little enough that other tasks
#: get their turn about every millisecond.
_SLICE = 1 << 20

_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

#: Seconds without a byte moving after which a frame that was begun is given up.
STALL = 10.0

_CONNECT_TIMEOUT = 5.0


@frozen
class Received:
    """A whole frame whose digest was right.

    Attributes:
        content: the JSON object of all kinds but those of RAW and BYTES.
        payload: of a kind of BYTES.
        buffer: where the payload of those lies, from offset 0 on; the receiver's to give back.
    """

    header: Header
    content: dict[str, Any]
    buffer: Buffer | None = None
    payload: bytes = b""


@define
class LinkStatistics:
    """Bytes and frames of one link.

    Attributes:
        heard: when the peer was last heard, or we began to listen again (trio's clock, seconds).
    """

    sent: int = 0
    received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    heard: float = field(factory=trio.current_time)


class FrameLink:
    """One connection between two daemons. Owns its socket and its pipe until `close`.

    A frame that was begun is finished even if its task is cancelled (unless nothing moves for `STALL`
    seconds or the link is closed): so the link stays of use to say goodbye on. Only a frame of RAW that
    is being received can be cut short by cancelling.

    Args:
        sock: a connected TCP socket; ownership passes to the link.
        max_raw: longest payload of a kind of RAW that is taken, in bytes.
        acquire: gives the buffer for such a payload; waiting in it stops the sender (I6).
        release: takes a buffer back when its frame broke off.

    Attributes:
        listening: what the peer sends is noticed: not while its last frame is seen to, or waits for a buffer.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        *,
        max_raw: int = 0,
        acquire: Callable[[], Awaitable[Buffer]] | None = None,
        release: Callable[[Buffer], None] | None = None,
    ) -> None:
        self._socket = sock
        self._send_lock = trio.Lock()
        self._closed = False
        self.max_raw = max_raw
        self.acquire = acquire
        self.release = release
        self.listening = False
        self.statistics = LinkStatistics()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipe_out, self._pipe_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self._pipe_in, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except PermissionError:
            pass  # over the user's pipe quota: the default of 64 KiB serves, slower
        self._pipe_size = fcntl.fcntl(self._pipe_in, fcntl.F_GETPIPE_SZ)

    def fileno(self) -> int:
        """The connection's fd, borrowed: it stays the link's."""
        return self._fileno()

    async def send(
        self,
        kind: Kind,
        generation: int,
        sequence: int = 0,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """Send a frame with a JSON payload, or an empty one."""
        await self._send_whole(encode_json(kind, generation, sequence, content))

    async def send_payload(self, kind: Kind, generation: int, sequence: int, payload: bytes) -> None:
        """Send a frame of a kind of BYTES."""
        await self._send_whole(encode_bytes(kind, generation, sequence, payload))

    async def _send_whole(self, frame: bytes) -> None:
        async with self._send_lock:
            with self._whole_frame():
                await self._send_bytes(frame)
            self.statistics.frames_sent += 1

    async def send_raw(self, header: Header, preface: bytes, *parts: tuple[Buffer, int]) -> None:
        """Send a frame whose payload is `preface` and then of each of `parts` so many bytes of the buffer.

        The buffers are borrowed until the frame is acknowledged, not only until this returns: sendfile
        lets the socket refer to the very pages.
        """
        head = header.encode()
        frame_digest = await _digest(head, preface, parts)
        async with self._send_lock:
            with self._whole_frame() as scope:
                # MSG_MORE: header and payload share segments.
                await self._send_bytes(head + preface, socket.MSG_MORE)
                for buffer, length in parts:
                    await self._send_file(buffer.fd, length, scope)
                await self._send_bytes(encode_trailer(header.sequence, frame_digest))
            self.statistics.frames_sent += 1

    async def receive(self) -> Received:
        """The next whole frame.

        Raises:
            FrameError: what came is not a frame; the link is of no more use.
            LinkLost: the connection ended.
        """
        self._listen()
        try:
            await self._wait(trio.lowlevel.wait_readable)
            with self._whole_frame():
                head = await self._receive_bytes(HEADER_SIZE)
                header = Header.decode(head, max_raw=self.max_raw)
                if header.kind not in RAW:
                    payload = await self._receive_bytes(header.length)
                    trailer = await self._receive_bytes(TRAILER_SIZE)
                    check_trailer(trailer, header.sequence, digest(head, payload))
                    if header.kind in BYTES:
                        received = Received(header, {}, payload=payload)
                    else:
                        received = Received(header, decode_json(payload))
            if header.kind in RAW:
                received = await self._receive_raw(header, head)
        finally:
            self.listening = False
        self.statistics.frames_received += 1
        return received

    def close(self) -> None:
        """Close the connection; waiting calls fail with LinkLost."""
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        os.close(self._pipe_in)
        os.close(self._pipe_out)

    @contextmanager
    def _whole_frame(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + STALL) as scope:
            yield scope
        if scope.cancelled_caught:
            raise LinkLost(f"nothing moved for {STALL:g} s in the middle of a frame")

    async def _receive_raw(self, header: Header, head: bytes) -> Received:
        if self.acquire is None or self.release is None:
            raise FrameError(f"a {header.kind.name} frame before it was agreed")
        self.listening = False
        buffer = await self.acquire()
        self._listen()
        try:
            await self._splice(buffer.fd, header.length)
            trailer = await self._receive_bytes(TRAILER_SIZE)
            found = await work(header.length, digest, head, buffer.view[: header.length])
            check_trailer(trailer, header.sequence, found)
        except BaseException:
            self.release(buffer)
            raise
        return Received(header, {}, buffer)

    async def _splice(self, fd: int, length: int) -> None:
        """Move `length` bytes from the socket to the start of the file `fd` (borrowed)."""
        moved = turn = 0
        while moved < length:
            if moved - turn >= _SLICE:
                await trio.lowlevel.checkpoint()
                turn = moved
            sock, wanted = self._fileno(), min(length - moved, self._pipe_size)
            try:
                count = os.splice(sock, self._pipe_in, wanted, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                continue
            except OSError as error:
                raise _lost(error) from None
            if count == 0:
                raise LinkClosed("the peer closed the link in the middle of a frame")
            self._heard(count)
            while count:
                written = os.splice(self._pipe_out, fd, count, offset_dst=moved)
                count -= written
                moved += written

    async def _send_file(self, fd: int, length: int, scope: trio.CancelScope) -> None:
        """Send the first `length` bytes of the file `fd` (borrowed); moves the deadline of `scope` on."""
        sent = 0
        while sent < length:
            sock = self._fileno()
            try:
                count = os.sendfile(sock, fd, sent, min(_SLICE, length - sent))
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
                continue
            except OSError as error:
                raise _lost(error) from None
            sent += count
            self.statistics.sent += count
            scope.deadline = trio.current_time() + STALL
            await trio.lowlevel.checkpoint()

    async def _send_bytes(self, data: bytes, flags: int = 0) -> None:
        view = memoryview(data)
        while view:
            try:
                count = await self._socket.send(view, flags)
            except (OSError, trio.ClosedResourceError) as error:
                raise _lost(error) from None
            self.statistics.sent += count
            view = view[count:]

    async def _receive_bytes(self, length: int) -> bytes:
        data = bytearray(length)
        view, have = memoryview(data), 0
        while have < length:
            try:
                count = await self._socket.recv_into(view[have:])
            except (OSError, trio.ClosedResourceError) as error:
                raise _lost(error) from None
            if count == 0:
                raise LinkClosed("the peer closed the link")
            self._heard(count)
            have += count
        return bytes(data)

    async def _wait(self, ready: Callable[[int], Awaitable[None]]) -> None:
        try:
            await ready(self._fileno())
        except (OSError, trio.ClosedResourceError) as error:
            raise _lost(error) from None

    def _fileno(self) -> int:
        """The socket's fd. To be asked for after every wait: another task may have closed the link meanwhile,
        and the number be another file's now.
        """
        if self._closed:
            raise LinkLost("the link was closed here")
        return self._socket.fileno()

    def _listen(self) -> None:
        self.listening = True
        self.statistics.heard = trio.current_time()

    def _heard(self, count: int) -> None:
        self.statistics.received += count
        self.statistics.heard = trio.current_time()


async def _digest(head: bytes, preface: bytes, parts: Sequence[tuple[Buffer, int]]) -> bytes:
    # No view of a buffer may outlive this: sending can take long, and the buffer be closed meanwhile.
    views = [buffer.view[:length] for buffer, length in parts]
    return await work(sum(map(len, views)), digest, head, preface, *views)


async def connect(address: tuple[str, int]) -> trio.socket.SocketType:
    """A TCP connection to `address` (host, port).

    Raises:
        PeerUnreachable: it did not come about within 5 seconds.
    """
    host, port = address
    text = f"{host}:{port}"
    try:
        with trio.fail_after(_CONNECT_TIMEOUT):
            stream = await trio.open_tcp_stream(host, port, happy_eyeballs_delay=math.inf)
    except trio.TooSlowError:
        raise PeerUnreachable(text, f"no answer within {_CONNECT_TIMEOUT:g} s") from None
    except OSError as error:
        # One for each address that the name has.
        causes = error.__cause__.exceptions if isinstance(error.__cause__, ExceptionGroup) else (error,)
        problem = ", ".join(dict.fromkeys(_why(cause) for cause in causes))
        raise PeerUnreachable(text, problem) from None
    return stream.socket


def _lost(error: Exception) -> LinkLost:
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET):
        return LinkClosed("the peer closed the link")
    return LinkLost(_why(error))


def _why(error: Exception) -> str:
    if isinstance(error, trio.ClosedResourceError) or getattr(error, "errno", None) == errno.EBADF:
        return "the link was closed here"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        # Trio's own words repeat the address.
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)
