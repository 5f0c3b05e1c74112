"""A first pass on its way to the backup, piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from curling_fd.capture.intake import PIECE
from curling_fd.errors import FrameError
from curling_fd.link.frames import Header, Kind
from curling_fd.link.transport import FrameLink
from curling_fd.system.buffers import Buffer, BufferPool

#: Pieces of a first pass on their way at once.
_PASS_BUFFERS = 4


class PassShipper:
    """Sends the pieces of a first pass; at most `_PASS_BUFFERS` are on their way (I6)."""

    def __init__(self, link: FrameLink, generation: int, progress: Callable[[int], None]) -> None:
        self._link = link
        self._generation = generation
        self._progress = progress
        self._pool = BufferPool("curling-pass", _PASS_BUFFERS, PIECE)
        self._flights: deque[tuple[int, Buffer]] = deque()
        self._sequence = 0
        self._bytes = 0

    async def acquire(self) -> Buffer:
        return await self._pool.acquire()

    def give_back(self, buffer: Buffer) -> None:
        self._pool.release(buffer)

    async def ship(self, buffer: Buffer, length: int, pages: int) -> None:
        self._sequence += 1
        self._flights.append((self._sequence, buffer))
        header = Header(Kind.BULK, self._generation, self._sequence, length)
        await self._link.send_raw(header, b"", (buffer, length))
        self._bytes += length
        self._progress(self._bytes)

    def acknowledged(self, sequence: int) -> None:
        """The backup has taken piece `sequence`.

        Raises:
            FrameError: that is not the oldest piece on its way.
        """
        if not self._flights or self._flights[0][0] != sequence:
            raise FrameError(f"an acknowledgement of piece {sequence}, which was not due")
        self._pool.release(self._flights.popleft()[1])

    def close(self) -> None:
        """Free all buffers; what is still on its way does not count any more."""
        self._pool.close()
        while self._flights:
            self._flights.popleft()[1].close()
