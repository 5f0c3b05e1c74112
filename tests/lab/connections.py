"""TCP connections of a client to the guest's services (see guest.c), and what must hold of each."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from attrs import define

from .hosts import Host

COUNTER, STREAM, SINK = 7, 19, 9
_NUMBERS = 1024


@define
class Progress:
    """Of one connection: steps made so far, and how long it made none at most, in seconds."""

    steps: int = 0
    longest: float = 0.0
    _last: float | None = None

    def step(self, count: int) -> None:
        now = time.monotonic()
        self.steps += count
        if self._last is not None:
            self.longest = max(self.longest, now - self._last)
        self._last = now


@asynccontextmanager
async def connected(client: Host, address: str, port: int) -> AsyncIterator[trio.SocketStream]:
    """A connection from the name space of `client`."""
    with client.entered():
        sock = trio.socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    async with trio.SocketStream(sock) as stream:
        await sock.connect((address, port))
        yield stream


async def increment(stream: trio.SocketStream, progress: Progress) -> int:
    """Ask the counter for the next number."""
    await stream.send_all(b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        part = await stream.receive_some(64)
        assert part, "the guest closed the connection"
        answer += part
    progress.step(1)
    return int(answer)


async def download(stream: trio.SocketStream, count: int, progress: Progress) -> None:
    """Read that many numbers; each must be the next."""
    rest, expected = b"", 1
    while expected <= count:
        part = await stream.receive_some(1 << 16)
        assert part, "the guest closed the connection"
        rest += part
        whole = len(rest) // 8
        progress.step(whole)
        numbers = struct.unpack_from(f"<{whole}Q", rest)
        assert numbers == tuple(range(expected, expected + whole))
        expected += whole
        rest = rest[whole * 8 :]


async def upload(stream: trio.SocketStream, count: int, progress: Progress) -> None:
    """Send that many numbers; the guest must have got each as the next."""
    for first in range(1, count + 1, _NUMBERS):
        numbers = range(first, min(first + _NUMBERS, count + 1))
        await stream.send_all(struct.pack(f"<{len(numbers)}Q", *numbers))
        progress.step(len(numbers))
    await stream.send_eof()
    answer = b""
    while len(answer) < 8:
        part = await stream.receive_some(8)
        assert part, "the guest closed the connection"
        answer += part
    assert struct.unpack("<Q", answer) == (count,)
