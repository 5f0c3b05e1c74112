"""Bytes that come in by an NBD connection: a write's data on its way to where it is kept, and messages."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from typing import TypeVar

from curling_fd.errors import NbdError
from curling_fd.nbd.protocol import Steps

T = TypeVar("T")

_F_SETPIPE_SZ = 1031

#: What a user without privilege may have.
_PIPE_SIZE = 1 << 20

#: Bytes moved at once where data is thrown away, or copied because the kernel cannot splice.
_SCRATCH = 1 << 16


class Intake:
    """A connected socket (borrowed, in blocking mode), and what moving data from it takes (owned)."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._pipe: tuple[int, int] | None = None
        self._scratch: memoryview | None = None
        self._can_splice = True

    def fill(self, view: memoryview) -> None:
        """Read until `view` is full.

        Raises:
            NbdError: the connection ended before.
        """
        have, length = 0, len(view)
        while have < length:
            try:
                count = self.socket.recv_into(view[have:])
            except OSError as error:
                raise broken(error) from None
            if not count:
                raise NbdError(f"the connection ended {length - have} bytes too early")
            have += count

    def take(self, length: int) -> int:
        """Read up to `length` bytes, one at least, for `put` or to be forgotten; how many.

        Raises:
            NbdError: the connection ended before.
        """
        count = None
        if self._can_splice:
            try:
                if self._pipe is None:
                    self._pipe = _wide_pipe()
                count = os.splice(self.socket.fileno(), self._pipe[1], length)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EMFILE, errno.ENFILE):
                    raise broken(error) from None
                self._can_splice = False
        if count is None:
            try:
                count = self.socket.recv_into(self._buffer()[:length])
            except OSError as error:
                raise broken(error) from None
        if not count:
            raise NbdError(f"the connection ended {length} bytes too early")
        return count

    def put(self, fd: int, offset: int, length: int) -> None:
        """Write the `length` bytes of the last `take` to `offset` in the file `fd` (borrowed).

        Raises:
            OSError: the file does not take them.
        """
        if not self._can_splice:
            write_all(fd, self._buffer()[:length], offset)
            return
        assert self._pipe is not None
        while length:
            try:
                count = os.splice(self._pipe[0], fd, length, offset_dst=offset)
            except OSError as error:
                if error.errno == errno.EINVAL:  # a file that cannot be spliced to
                    self._put_copied(fd, offset, length)
                    return
                self.close()  # what is in the pipe belongs to a write that failed
                raise
            offset += count
            length -= count

    def _put_copied(self, fd: int, offset: int, length: int) -> None:
        assert self._pipe is not None
        data = _read_all(self._pipe[0], length)
        self._can_splice = False
        self.close()
        write_all(fd, memoryview(data), offset)

    def _buffer(self) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH))
        return self._scratch

    def close(self) -> None:
        """Close the pipe."""
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            for end in pipe:
                os.close(end)


class Payload:
    """The data of a write: what was read ahead (`held`), the rest from the socket. Read once, in order.

    `left` bytes are there to be read. To read into mapped memory whose pages exist already (`read_into`) is
    one copy and one system call, and the cheapest; for a file whose pages do not exist, `splice_to` is.
    """

    __slots__ = ("_held", "_intake", "left")

    def __init__(self, intake: Intake, held: memoryview, length: int) -> None:
        self._intake = intake
        self._held = held
        self.left = length

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes: at most `left`.

        Raises:
            NbdError: the connection ended before they came.
        """
        wanted, held = len(view), len(self._held)
        if wanted > self.left:
            raise ValueError(f"{wanted} bytes of the {self.left} that are left")
        self.left -= wanted
        if held >= wanted:
            view[:] = self._held[:wanted]
            self._held = self._held[wanted:]
            return
        if held:
            view[:held] = self._held
            self._held = self._held[held:]
            view = view[held:]
        self._intake.fill(view)

    def splice_to(self, fd: int, offset: int) -> None:
        """Put all that is left into `fd` (borrowed, a file), from `offset` on.

        Raises:
            NbdError: the connection ended before it came.
            OSError: the file does not take it; some of it may be written.
        """
        if held := len(self._held):
            view, self._held = self._held, self._held[held:]
            self.left -= held
            write_all(fd, view, offset)
            offset += held
        while self.left:
            count = self._intake.take(self.left)
            self.left -= count
            self._intake.put(fd, offset, count)
            offset += count

    def discard(self) -> None:
        """Read what is left, for nothing.

        Raises:
            NbdError: the connection ended before it came.
        """
        scratch = memoryview(bytearray(min(self.left, _SCRATCH)))
        while self.left:
            self.read_into(scratch[: self.left])


def converse(steps: Steps[T], sock: socket.socket) -> T:
    """Run a conversation over `sock` (borrowed, blocking) to its end.

    Raises:
        NbdError: the other side broke the protocol, or closed the connection.
    """
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, int):
                    received = _receive(sock, step)
                else:
                    sock.sendall(step)
                    received = b""
            except OSError as error:
                # Whether it is over is for the conversation to say: some end without a last word.
                step = steps.throw(broken(error))
            else:
                step = steps.send(received)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _receive(sock: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes. Memory is taken as they come: the length may be a lie."""
    parts = []
    while length:
        part = sock.recv(min(length, _SCRATCH))
        if not part:
            raise NbdError(f"the connection ended {length} bytes too early")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def broken(error: OSError) -> NbdError:
    """What to say of a connection that ended with `error`."""
    if isinstance(error, TimeoutError | BlockingIOError):
        return NbdError("the other side said nothing for too long")
    return NbdError(f"the connection broke ({os.strerror(error.errno or 0)})")


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` to `offset` in `fd` (borrowed, a file)."""
    while len(view):
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def _read_all(fd: int, length: int) -> bytes:
    parts = []
    while length:
        parts.append(os.read(fd, length))
        length -= len(parts[-1])
    return b"".join(parts)


def _wide_pipe() -> tuple[int, int]:
    pipe = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(pipe[1], _F_SETPIPE_SZ, _PIPE_SIZE)
    except OSError:  # the user has many pipes: one of 64 KiB does as well
        pass
    return pipe
