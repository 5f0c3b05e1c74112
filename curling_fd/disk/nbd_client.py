"""A client of NBD servers on UNIX sockets, with blocking calls: for threads.

Several requests are on their way at once: reads among reads, changes among changes, so that neither side
ever waits for the other to take what it sends. Changes that touch the same bytes are never on their way
together, for a server may do what it has at once in any order.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from attrs import frozen

from curling_fd.disk.intake import Intake, broken, converse
from curling_fd.errors import NbdError, NbdRequestFailed
from curling_fd.nbd.client import Data, Finished, Remote, Replies, Status, Zeroes, negotiate
from curling_fd.nbd.protocol import Command, CommandFlag, Extent, Flag, Request

#: Requests on their way at most. QEMU's server takes 16 before it waits for us to read answers.
_DEPTH = 8

#: Bytes of one request at most: enough to make its cost small beside the copying, few enough to overlap.
_PIECE = 1 << 20

#: Bytes that one question about block status is about; a length has 32 bits.
_SPAN = 1 << 30

_NOTHING = memoryview(b"")


@frozen
class Change:
    """A write (`data` of `length` bytes), or zeroes or a trim (Command) of `length` bytes at `offset`."""

    kind: Command
    offset: int
    length: int
    data: memoryview = _NOTHING
    flags: int = 0

    @classmethod
    def write(cls, offset: int, data: memoryview) -> Self:
        return cls(Command.WRITE, offset, len(data), data)

    @classmethod
    def zero(cls, offset: int, length: int, *, thin: bool = True) -> Self:
        """`thin`: the server may free the space."""
        return cls(Command.WRITE_ZEROES, offset, length, flags=0 if thin else CommandFlag.NO_HOLE)

    @classmethod
    def trim(cls, offset: int, length: int) -> Self:
        return cls(Command.TRIM, offset, length)


class NbdClient:
    """An open export. Owns `sock`. After NbdError nothing but `close` is of use."""

    def __init__(self, sock: socket.socket, remote: Remote) -> None:
        self.remote = remote
        self._socket = sock
        self._intake = Intake(sock)
        self._replies = Replies(remote)
        self._cookies = itertools.count(1)
        minimum = remote.blocks.minimum
        self._largest = max(remote.blocks.maximum // minimum, 1) * minimum
        self._piece = max(min(_PIECE, self._largest) // minimum, 1) * minimum

    @classmethod
    def connect(cls, path: str | Path, export: str = "", *, timeout: float | None = None) -> Self:
        """Open `export` of the server at the UNIX socket `path`.

        Args:
            timeout: seconds that the server may be silent, now and later; None waits for ever.

        Raises:
            NbdError: there is no server, or it does not give the export.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            try:
                sock.connect(str(path))
            except OSError as error:
                problem = os.strerror(error.errno) if error.errno else str(error)
                raise NbdError(f"there is no server at {path} ({problem})") from None
            return cls.over(sock, export)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def over(cls, sock: socket.socket, export: str = "") -> Self:
        """Open `export` over a connected socket, which is taken over when this succeeds."""
        return cls(sock, converse(negotiate(export), sock))

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.remote.size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with what is at `offset`.

        Raises:
            NbdRequestFailed: the server cannot read it. What `view` holds then means nothing.
            NbdError: the connection is of no use any more.
        """
        self.read_many([(view, offset)])

    def read_many(self, reads: Iterable[tuple[memoryview, int]]) -> None:
        """`read_into` for several, with requests of all of them on their way at once."""
        views: dict[int, tuple[memoryview, int]] = {}

        def pieces() -> Iterable[tuple[Request, memoryview]]:
            for view, offset in reads:
                for at in range(0, len(view), self._piece):
                    piece = view[at : at + self._piece]
                    request = self._request(Command.READ, offset + at, len(piece))
                    views[request.cookie] = (piece, offset + at)
                    yield request, _NOTHING

        self._perform(pieces(), views)

    def status(self, offset: int, length: int) -> list[Extent]:
        """What is known of `length` bytes from `offset` on: extents that cover just these.

        A server without block status knows of data only.

        Raises:
            NbdRequestFailed, NbdError: as for `read_into`.
        """
        if self.remote.allocation is None:
            return [Extent(length, hole=False, zero=False)] if length else []
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            request = self._request(Command.BLOCK_STATUS, offset, min(end - offset, _SPAN))
            extents: list[Extent] = []
            self._perform([(request, _NOTHING)], {}, extents)
            for extent in extents:
                offset += extent.length
                if found and found[-1].state == extent.state:
                    extent = Extent(found.pop().length + extent.length, extent.hole, extent.zero)
                found.append(extent)
        return found

    def write(self, offset: int, view: memoryview) -> None:
        """Write `view` at `offset`. Raises as `read_into` does, as all that follow do."""
        self.change([Change.write(offset, view)])

    def zero(self, offset: int, length: int, *, thin: bool = True) -> None:
        """Write zeroes; `thin`: the server may free the space."""
        self.change([Change.zero(offset, length, thin=thin)])

    def trim(self, offset: int, length: int) -> None:
        """Let the server free the space, if it can; what is read there afterwards is not said."""
        self.change([Change.trim(offset, length)])

    def change(self, changes: Iterable[Change]) -> None:
        """Do all of `changes`, with the effect of one after the other.

        A trim is left out where the server cannot do it. After a failure nothing more is begun; what was on
        its way by then may have been done.

        Raises:
            NbdRequestFailed, NbdError: as for `read_into`.
        """
        self._perform(self._changes(changes), {})

    def flush(self) -> None:
        """Return when all that was written is on stable storage."""
        if self.remote.flags & Flag.SEND_FLUSH:
            self._perform([(self._request(Command.FLUSH, 0, 0), _NOTHING)], {})

    def close(self) -> None:
        """Say goodbye and close the connection. What was not flushed may be lost."""
        try:
            self._socket.sendall(self._request(Command.DISC, 0, 0).encode())
        except OSError:
            pass
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, kind: Command, offset: int, length: int, flags: int = 0) -> Request:
        return Request(kind, flags, next(self._cookies), offset, length)

    def _changes(self, changes: Iterable[Change]) -> Iterable[tuple[Request, memoryview]]:
        flags = self.remote.flags
        for change in changes:
            if change.kind == Command.TRIM and not flags & Flag.SEND_TRIM:
                continue
            # A server may refuse more than its largest block, even where no data is sent.
            step = self._piece if change.kind == Command.WRITE else self._largest
            if change.kind == Command.WRITE_ZEROES and not flags & Flag.SEND_WRITE_ZEROES:
                words = "it cannot write zeroes"
                raise NbdRequestFailed(change.kind.name, change.offset, errno.EOPNOTSUPP, words)
            for at in range(0, change.length, step):
                length = min(step, change.length - at)
                request = self._request(change.kind, change.offset + at, length, change.flags)
                yield request, change.data[at : at + length]

    def _perform(
        self,
        requests: Iterable[tuple[Request, memoryview]],
        views: dict[int, tuple[memoryview, int]],
        extents: list[Extent] | None = None,
    ) -> None:
        """Send requests and take their answers until all are answered; then raise the first failure."""
        flying: dict[int, Request] = {}
        failure: NbdRequestFailed | None = None
        for request, data in requests:
            while flying and (len(flying) >= _DEPTH or _meets(request, flying)):
                failed = self._answer(flying, views, extents)
                failure = failure or failed
            if failure is not None:
                break
            self._send(request, data)
            flying[request.cookie] = request
        while flying:
            failed = self._answer(flying, views, extents)
            failure = failure or failed
        if failure is not None:
            raise failure

    def _send(self, request: Request, data: memoryview) -> None:
        self._replies.expect(request)
        parts = [memoryview(request.encode()), data]
        try:
            sent = self._socket.sendmsg(parts)
            for part in parts:
                rest = part[sent:]
                sent = max(sent - len(part), 0)
                if len(rest):
                    self._socket.sendall(rest)
        except OSError as error:
            raise broken(error) from None

    def _answer(
        self,
        flying: dict[int, Request],
        views: dict[int, tuple[memoryview, int]],
        extents: list[Extent] | None,
    ) -> NbdRequestFailed | None:
        """Take answers until a request is finished; its failure, if it is one."""
        while True:
            match converse(self._replies.read(), self._socket):
                case Data(cookie, offset, length):
                    view, start = views[cookie]
                    self._intake.fill(view[offset - start : offset - start + length])
                case Zeroes(cookie, offset, length):
                    view, start = views[cookie]
                    view[offset - start : offset - start + length] = bytes(length)
                case Status(_, found):
                    assert extents is not None
                    extents += found
                case Finished(cookie, error, words):
                    request = flying.pop(cookie)
                    views.pop(cookie, None)
                    if not error:
                        return None
                    name = Command(request.kind).name
                    return NbdRequestFailed(name, request.offset, error, words or os.strerror(error))


def _meets(request: Request, flying: dict[int, Request]) -> bool:
    """Whether it changes bytes that one on its way changes too."""
    if request.kind not in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM):
        return False
    end = request.offset + request.length
    return any(
        other.offset < end and request.offset < other.offset + other.length for other in flying.values()
    )
