"""What is written to a VM's disks on its way to the backup, in a session on the primary.

Three times follow each other:

    copy      the blocks in which the backup's copies may differ are read from QEMU and go into the log,
              beside what the guest writes meanwhile; the backup applies at once what comes in DISK frames
    follow    the same without reading, during the first pass over the memory
    boundary  from the first checkpoint on: the log of an epoch goes with the epoch's checkpoint
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import trio

from curling_fd.disk.holdings import ClosedLog
from curling_fd.disk.nbd_client import NbdClient
from curling_fd.errors import FrameError
from curling_fd.link.frames import Header, Kind
from curling_fd.link.transport import FrameLink
from curling_fd.qmp.client import QmpClient
from curling_fd.service.mirror import DiskMirror, exported, ident

#: Bytes of a disk that are read at a time.
CHUNK = 1 << 20

#: Bytes of log that are worth a frame.
_WORTH = 8 << 20

#: Seconds after which fewer are sent as well.
_LATEST = 0.2


class DiskShipper:
    """Ships the log of `mirror` over `link`; borrows both.

    Args:
        most: DISK frames on their way at once.
        progress: told the bytes of the disks that were copied, and how many there are to be.
        stir: called when something that a checkpoint waits for has changed.
    """

    def __init__(
        self,
        link: FrameLink,
        generation: int,
        mirror: DiskMirror,
        most: int,
        progress: Callable[[int, int], None],
        stir: Callable[[], None],
    ) -> None:
        self.log = mirror.log
        self._mirror = mirror
        self._link = link
        self._generation = generation
        self._most = most
        self._progress = progress
        self._stir = stir
        self._sequence = 0
        self._flights: deque[tuple[int, ClosedLog]] = deque()
        self._landed = trio.Event()
        self._shipping = trio.Lock()
        self._woken = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self.log.wake = lambda: token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self._woken.set()
        self._stir()

    @property
    def urgent(self) -> bool:
        """The guest waits for a checkpoint to take what it has written; or there will be none any more."""
        return self.log.running >= self.log.ask_at or self.log.failure is not None

    async def copy(self, qmp: QmpClient, directory: Path) -> None:
        """Have the copies be what the disks are, but for what the guest writes from then on.

        Raises:
            DiskUnfit, NbdError, NbdRequestFailed: a disk cannot be read.
            DiskLogFull, DiskLogFailed: the log has failed.
        """
        dirty = self.log.start()
        total = sum(bitmap.dirty_bytes() for bitmap in dirty)
        done = 0
        self._progress(done, total)
        async with exported(qmp, directory, self._mirror.disks) as path:
            for number, bitmap in enumerate(dirty):
                client = await trio.to_thread.run_sync(NbdClient.connect, path, ident(number))
                try:
                    for start, length in bitmap.ranges():
                        for offset in range(start, start + length, CHUNK):
                            count = min(CHUNK, start + length - offset)
                            await trio.to_thread.run_sync(self._read, client, number, offset, count)
                            if self.log.running >= min(_WORTH, self.log.soft // 2):
                                await self._ship()
                            done += count
                            self._progress(done, total)
                finally:
                    client.close()
        await self._ship()

    def _read(self, client: NbdClient, number: int, offset: int, length: int) -> None:
        """Put a part of a disk into the log. Runs in a thread."""
        watch = self.log.watch(number, offset, length)
        try:
            for extent in client.status(offset, length):
                if extent.zero:
                    self.log.put_zeroes(watch, offset, extent.length)
                else:
                    data = memoryview(bytearray(extent.length))
                    client.read_into(data, offset)
                    self.log.put(watch, offset, data)
                offset += extent.length
        finally:
            self.log.unwatch(watch)

    async def follow(self) -> None:
        """Send what the guest writes, until cancelled."""
        while True:
            with trio.move_on_after(_LATEST):
                await self._woken.wait()
            self._woken = trio.Event()
            with trio.CancelScope(shield=True):
                await self._ship()

    async def _ship(self) -> None:
        """Send the log so far."""
        async with self._shipping:
            while len(self._flights) >= self._most:
                await self._landed.wait()
            closed = await trio.to_thread.run_sync(self.log.close)
            if closed.buffer is None:
                return
            self._sequence += 1
            self._flights.append((self._sequence, closed))
            header = Header(Kind.DISK, self._generation, self._sequence, closed.length)
            await self._link.send_raw(header, b"", (closed.buffer, closed.length))

    def acknowledged(self, sequence: int) -> None:
        """The backup has written what DISK frame `sequence` had.

        Raises:
            FrameError: that is not the oldest on its way.
        """
        if not self._flights or self._flights[0][0] != sequence:
            raise FrameError(f"an acknowledgement of piece {sequence} of a disk, which was not due")
        self.log.release(self._flights.popleft()[1])
        self._landed.set()
        self._landed = trio.Event()

    async def settle(self) -> None:
        """From now on checkpoints carry the log: wait until no DISK frame is on its way."""
        async with self._shipping:
            while self._flights:
                await self._landed.wait()

    def close(self) -> None:
        """The session is over: what the backup has not acknowledged is marked."""
        self.log.wake = lambda: None
        self.log.track()
        while self._flights:
            self.log.release(self._flights.popleft()[1])
