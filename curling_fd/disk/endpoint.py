"""The endpoint that QEMU mirrors a disk to: an NBD server for one connection, in a thread.

What the guest waits for goes through here, so each request costs as few system calls as can be: whatever is
in the socket is read at once, and answers leave together, before the next wait. The calls block; there is
no event loop and no other task between QEMU and its answer.

It does not say what a write means: that is up to the sink (`WriteSink`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import trio
from attrs import evolve, frozen

from curling_fd.disk.intake import Intake, Payload, broken, converse
from curling_fd.errors import NbdError
from curling_fd.nbd import server
from curling_fd.nbd.protocol import REQUEST, Command, Errno, Extent, Request, wire_errno
from curling_fd.nbd.server import Export, Session
from curling_fd.system.nursery import open_nursery

#: Bytes read ahead at most: sixteen writes of 4 KiB. The data of larger writes goes past it.
_AHEAD = 64 << 10

_HEADER = REQUEST.size


class WriteSink(Protocol):
    """Where writes go. Called in the endpoint's thread, in the order in which QEMU is answered.

    A call may block: QEMU, and in the end the guest, then waits, for this write and for the answers of
    those that came with it. An OSError becomes the answer to the request; after one in the middle of a
    payload the rest of it is read and forgotten.
    """

    def write(self, offset: int, length: int, payload: Payload) -> None:
        """`length` bytes at `offset` become `payload`, which is of no use after the call."""

    def zero(self, offset: int, length: int) -> None:
        """`length` bytes at `offset` become zeroes."""

    def trim(self, offset: int, length: int) -> None:
        """The guest does not need these bytes any more; they may read as anything."""


@frozen
class DiskReader:
    """How a client of an endpoint reads the disk. QEMU does not when it only mirrors new writes.

    Attributes:
        read: `length` bytes from `offset` on. OSError becomes the answer.
        status: what is known of the disk from there on; at least one extent, the first of one byte or more.
    """

    read: Callable[[int, int], bytes | bytearray | memoryview]
    status: Callable[[int, int], list[Extent]] | None = None


class Ending(Enum):
    """Why an endpoint serves no more."""

    LEFT = "the client closed the connection between two requests"
    STOPPED = "stop: the connection is as good as before, and between two requests"


@frozen
class EndpointStatistics:
    """Requests and bytes since the endpoint was made. `batches`: how often it had to read the socket."""

    requests: dict[str, int]
    written: int
    zeroed: int
    batches: int


class DiskEndpoint:
    """Serves `export` on the connected socket `sock` (borrowed, blocking; to be closed after `run`).

    Args:
        sink: where writes go.
        session: what another endpoint negotiated on this socket; None begins with the negotiation.
        reader: how to answer reads; without one they fail, and block status is not offered.
    """

    def __init__(
        self,
        sock: socket.socket,
        export: Export,
        sink: WriteSink,
        *,
        session: Session | None = None,
        reader: DiskReader | None = None,
    ) -> None:
        offered = reader is not None and reader.status is not None
        self.export = evolve(export, allocation=offered)
        self.session = session
        self._socket = sock
        self._sink = sink
        self._reader = reader
        self._intake = Intake(sock)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._stopping = False
        self._running = threading.Lock()
        self._ahead = bytearray(_AHEAD)
        self._view = memoryview(self._ahead)
        self._start = self._end = 0
        self._answers: list[bytes | bytearray | memoryview] = []
        self._counts = [0] * (max(Command) + 1)
        self._written = self._zeroed = self._batches = 0

    def run(self) -> Ending:
        """Serve until the client leaves, or `stop`. For a thread of its own.

        Raises:
            NbdError: the client broke the protocol, or the connection ended in the middle of a request.
        """
        with self._running:
            if self.session is None:
                self.session = converse(server.negotiate([self.export]), self._socket)
                if self.session is None:
                    return Ending.LEFT
            return self._serve(self.session)

    async def serve(self) -> Ending:
        """`run` in a thread. Cancelled, it breaks the connection."""
        over = False

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not over:
                    self.abort()

        async with open_nursery() as nursery:
            nursery.start_soon(watch)
            with trio.CancelScope(shield=True):
                try:
                    ending = await trio.to_thread.run_sync(self.run, limiter=trio.CapacityLimiter(1))
                finally:
                    over = True
            nursery.cancel_scope.cancel()
        return ending

    def stop(self) -> None:
        """Have `run` return once what was begun is answered. From any thread.

        Requests that are in the socket by then stay there, whole, for the next endpoint. A connection that
        is still being negotiated cannot be handed on, and is broken.
        """
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self.session is None:
            self.abort()

    def abort(self) -> None:
        """Break the connection: `run` ends, wherever it is but in the sink. From any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def statistics(self) -> EndpointStatistics:
        """What was done so far."""
        return EndpointStatistics(
            requests={command.name: self._counts[command] for command in Command if self._counts[command]},
            written=self._written,
            zeroed=self._zeroed,
            batches=self._batches,
        )

    def close(self) -> None:
        """Free what is not the socket, after `run` has returned."""
        if self._wake >= 0:
            wake, self._wake = self._wake, -1
            os.close(wake)
            self._intake.close()

    def _serve(self, session: Session) -> Ending:
        while True:
            while self._end - self._start >= _HEADER:
                if not self._handle(session):
                    return Ending.LEFT
            self._send_answers()
            if self._stopping and self._start == self._end:
                return Ending.STOPPED
            if not self._read_ahead():
                return Ending.STOPPED if self._stopping else Ending.LEFT

    def _read_ahead(self) -> bool:
        """Read what is there; False when nothing is begun and nothing is to be read any more."""
        begun = self._end - self._start
        if begun:
            self._view[:begun] = self._view[self._start : self._end]
        else:
            self._poll.poll()
            if self._stopping:
                return False
        self._start, self._end = 0, begun
        self._batches += 1
        try:
            # What is read is answered before a stop: then no more than what is begun.
            count = self._socket.recv_into(self._view[begun : _HEADER if self._stopping else _AHEAD])
        except OSError as error:
            if begun:
                raise broken(error) from None
            return False
        if not count and begun:
            raise NbdError(f"the connection ended {begun} bytes into a request")
        self._end += count
        return count > 0

    def _handle(self, session: Session) -> bool:
        """Do the request at the start of what was read; False when it says goodbye."""
        request = server.parse_request(self._ahead, self._start)
        self._start += _HEADER
        kind = request.kind
        if kind == Command.DISC:
            self._send_answers()
            return False
        error = server.check_request(request, self.export, session)
        if kind < len(self._counts):
            self._counts[kind] += 1
        if kind == Command.WRITE:
            error = self._write(request, error)
        elif error is None:
            try:
                if self._do(request, session):
                    return True
            except OSError as problem:
                error = wire_errno(problem.errno)
        if error is None:
            self._answers.append(server.done(request.cookie))
        else:
            self._answers.append(server.failed(request, session, error))
        return True

    def _write(self, request: Request, error: Errno | None) -> Errno | None:
        length = request.length
        held = min(length, self._end - self._start)
        payload = Payload(self._intake, self._view[self._start : self._start + held], length)
        self._start += held
        if held < length and self._answers:
            self._send_answers()  # who sent us so much may wait for them before it sends the rest
        if error is None and length:
            try:
                self._sink.write(request.offset, length, payload)
                self._written += length
            except OSError as problem:
                error = wire_errno(problem.errno)
        if payload.left:
            payload.discard()
        return error

    def _do(self, request: Request, session: Session) -> bool:
        """Do a request that may be done; True when it is also answered."""
        offset, length = request.offset, request.length
        match request.kind:
            case Command.WRITE_ZEROES if length:
                self._sink.zero(offset, length)
                self._zeroed += length
            case Command.TRIM if length:
                self._sink.trim(offset, length)
            case Command.READ:
                if self._reader is None:
                    raise OSError(errno.EOPNOTSUPP, "this disk is only written")
                data = self._reader.read(offset, length) if length else b""
                self._answers += (server.data_head(request, session), data)
                self._send_answers()
                return True
            case Command.BLOCK_STATUS:
                assert self._reader is not None and self._reader.status is not None
                self._answers.append(server.block_status(request, self._reader.status(offset, length)))
                return True
        return False

    def _send_answers(self) -> None:
        if not self._answers:
            return
        try:
            self._socket.sendall(b"".join(self._answers))
        except OSError as error:
            raise broken(error) from None
        self._answers.clear()
