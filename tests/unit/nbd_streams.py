"""What tests of NBD run conversations with: bytes in place of a socket, and a socket that gives them cut."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Generic, TypeVar

from attrs import define

from curling_fd.errors import NbdError
from curling_fd.nbd.protocol import LARGEST_BLOCK, Steps

T = TypeVar("T")


@define
class Outcome(Generic[T]):
    """How a conversation went. `result` counts only when it is `over`; `error` is why it was given up."""

    sent: bytes
    consumed: int
    result: T | None = None
    over: bool = False
    error: NbdError | None = None


def talk(steps: Steps[T], data: bytes) -> Outcome[T]:
    """Run a conversation with `data` as all that the other side says."""
    sent = bytearray()
    at = 0
    received = None
    while True:
        try:
            step = next(steps) if received is None else steps.send(received)
        except StopIteration as stop:
            return Outcome(bytes(sent), at, stop.value, over=True)
        except NbdError as error:
            return Outcome(bytes(sent), at, error=error)
        if isinstance(step, bytes):
            assert step
            sent += step
            received = b""
            continue
        # A step that wants nothing could be taken for ever; one that wants too much is memory for a lie.
        assert 1 <= step <= LARGEST_BLOCK
        if len(data) - at < step:
            return Outcome(bytes(sent), at)
        received = data[at : at + step]
        at += step


class CutSocket(socket.socket):
    """A connected socket whose reads return at most `cuts` bytes, one after the other, and then as usual."""

    def __init__(self, cuts: Sequence[int], fd: int) -> None:
        super().__init__(fileno=fd)
        self._cuts = list(cuts)

    def recv_into(self, buffer, nbytes=0, flags=0):  # type: ignore[no-untyped-def]
        return super().recv_into(memoryview(buffer)[: self._next(len(buffer))], 0, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(self._next(size), flags)

    def _next(self, size: int) -> int:
        return min(size, self._cuts.pop()) if self._cuts else size


def conversation(data: bytes, cuts: Sequence[int] = ()) -> tuple[CutSocket, socket.socket]:
    """Two ends: one to which `data` and then the end of the connection has been sent, and the sender's."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(data) + 4096)
    theirs.setblocking(False)
    assert theirs.send(data) == len(data), "more than a socket holds"
    theirs.shutdown(socket.SHUT_WR)
    theirs.setblocking(True)
    return CutSocket(cuts, ours.detach()), theirs


def all_of(sock: socket.socket) -> bytes:
    """What `sock` was sent until its peer was closed; which had perhaps not read all it was sent itself."""
    parts = []
    try:
        while part := sock.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
