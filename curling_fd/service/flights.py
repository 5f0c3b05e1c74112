"""Checkpoints that are taken and not committed yet, on the primary."""

from __future__ import annotations

from collections import deque

import trio

from curling_fd.capture.reader import Captured
from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.holdings import ClosedLog
from curling_fd.errors import FrameError
from curling_fd.link.frames import CheckpointHead, Header, Kind
from curling_fd.link.transport import FrameLink
from curling_fd.system.buffers import BufferPool

_NO_LOG = ClosedLog(None, 0)


class Flights:
    """Sends checkpoints and keeps what they lie in until then. Borrows link, pool and log."""

    def __init__(self, link: FrameLink, generation: int, pool: BufferPool, log: DiskLog | None) -> None:
        self._link = link
        self._generation = generation
        self._pool = pool
        self._log = log
        self._flights: deque[tuple[int, Captured, ClosedLog]] = deque()
        self._send, self._due = trio.open_memory_channel[tuple[int, Captured, ClosedLog]](0)

    async def add(self, sequence: int, captured: Captured, disk: ClosedLog | None) -> None:
        """Take over checkpoint `sequence` with its disk log; returns when the one before is sent."""
        flight = (sequence, captured, disk or _NO_LOG)
        self._flights.append(flight)
        await self._send.send(flight)

    async def ship(self) -> None:
        """Send all that are added, in order."""
        async for sequence, captured, disk in self._due:
            head = CheckpointHead(captured.ram, captured.device, disk.length, captured.boundary_us)
            header = Header(Kind.CHECKPOINT, self._generation, sequence, head.payload_size)
            parts = [(captured.buffer, captured.ram + captured.device)]
            if disk.buffer is not None:
                parts.append((disk.buffer, disk.length))
            await self._link.send_raw(header, head.encode(), *parts)

    def acknowledged(self, sequence: int) -> None:
        """Checkpoint `sequence` is committed.

        Raises:
            FrameError: it is not the oldest on its way.
        """
        if not self._flights or self._flights[0][0] != sequence:
            raise FrameError(f"an acknowledgement of checkpoint {sequence}, which was not due")
        _, captured, disk = self._flights.popleft()
        self._pool.release(captured.buffer)
        if self._log is not None:
            self._log.release(disk)

    def close(self) -> None:
        """The session is over: what is still on its way does not count any more."""
        while self._flights:
            _, captured, disk = self._flights.popleft()
            captured.buffer.close()
            if self._log is not None:
                self._log.release(disk)
