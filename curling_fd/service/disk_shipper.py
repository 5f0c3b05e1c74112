"""What is written to a VM's disks on its way to the backup, in a session on the primary.

Three times follow each other:

    copy      the blocks in which the backup's copies may differ are read from QEMU and go into the log,
              beside what the guest writes meanwhile; the backup applies at once what comes in DISK frames
    follow    the same without reading, during the first pass over the memory
    boundary  from the first checkpoint on: the log of an epoch goes with the epoch's checkpoint
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import trio

from curling_fd.disk.bitmap import DirtyBitmap
from curling_fd.disk.copy import CopyProgress, DiskCopier, LogShipper, RateLimit
from curling_fd.disk.holdings import ClosedLog
from curling_fd.disk.nbd_client import NbdClient
from curling_fd.errors import FrameError
from curling_fd.link.frames import Header, Kind
from curling_fd.link.transport import FrameLink, Received
from curling_fd.qmp.client import QmpClient
from curling_fd.service.mirror import DiskMirror, exported, ident
from curling_fd.system.nursery import open_nursery

#: Seconds between two reports of how far a copy is.
_REPORT = 0.2


class DiskShipper:
    """Ships the log of `mirror` over `link`; borrows both.

    Args:
        alike: for each disk, whether the backup's copy differs from it in nothing but what the log has
            marked; else the two are compared.
        most: DISK frames on their way at once.
        rate: bytes a second that a copy may take of the link; None is no limit.
        progress: told how far the copy of all disks is.
        stir: called when something that a checkpoint waits for has changed.
    """

    def __init__(
        self,
        link: FrameLink,
        generation: int,
        mirror: DiskMirror,
        alike: Sequence[bool],
        *,
        most: int,
        rate: int | None,
        progress: Callable[[CopyProgress], None],
        stir: Callable[[], None],
    ) -> None:
        self.log = mirror.log
        self._mirror = mirror
        self._alike = alike
        self._link = link
        self._generation = generation
        self._most = most
        self._limit = RateLimit(rate)
        self._progress = progress
        self._shipper = LogShipper(self.log, self._ship)
        self._sequence = self._offers = 0
        self._flights: deque[tuple[int, ClosedLog]] = deque()
        self._landed = trio.Event()
        self._answers, self._answered = trio.open_memory_channel[Received](1)
        token = trio.lowlevel.current_trio_token()
        self.log.wake = lambda: token.run_sync_soon(stir, idempotent=True)

    @property
    def urgent(self) -> bool:
        """The guest waits for a checkpoint to take what it has written; or there will be none any more."""
        return self.log.running >= self.log.ask_at or self.log.failure is not None

    async def copy(self, qmp: QmpClient) -> None:
        """Have the copies be what the disks are, but for what the guest writes from then on.

        Raises:
            DiskUnfit, NbdError, NbdRequestFailed: a disk cannot be read.
            DiskLogFull, DiskLogFailed: the log has failed.
            FrameError: the backup's answers make no sense.
        """
        for number, alike in enumerate(self._alike):
            if not alike:
                self.log.mark(number, 0, self.log.sizes[number])
        dirty = self.log.start()
        copiers: list[DiskCopier] = []
        try:
            async with (
                exported(qmp, self._mirror.directory, self._mirror.disks) as path,
                open_nursery() as nursery,
            ):
                nursery.start_soon(self._shipper.run)
                nursery.start_soon(self._report, copiers, dirty)
                for number, bitmap in enumerate(dirty):
                    client = await trio.to_thread.run_sync(NbdClient.connect, path, ident(number))
                    try:
                        copiers.append(self._copier(number, client, bitmap))
                        await copiers[-1].run()
                    finally:
                        client.close()
                nursery.cancel_scope.cancel()
        except BaseException:
            for number, bitmap in enumerate(dirty):
                left = copiers[number].remaining() if number < len(copiers) else bitmap.ranges()
                for offset, length in left:
                    self.log.mark(number, offset, length)
            raise
        self._progress(_sum(copiers, dirty))
        await self._shipper.flush()

    def _copier(self, number: int, client: NbdClient, bitmap: DirtyBitmap) -> DiskCopier:
        compare = None if self._alike[number] else self._compare
        return DiskCopier(self.log, number, client, bitmap.ranges(), self._shipper, self._limit, compare)

    async def _report(self, copiers: Sequence[DiskCopier], dirty: Sequence[DirtyBitmap]) -> None:
        while True:
            self._progress(_sum(copiers, dirty))
            await trio.sleep(_REPORT)

    async def _compare(self, offer: bytes) -> bytes:
        """The backup's answer to an offer."""
        self._offers += 1
        await self._link.send_payload(Kind.OFFER, self._generation, self._offers, offer)
        received = await self._answered.receive()
        if received.header.sequence != self._offers:
            raise FrameError(f"an answer to offer {received.header.sequence} of blocks, which was not due")
        return received.payload

    def answered(self, received: Received) -> None:
        """A WANT has come.

        Raises:
            FrameError: nobody has asked.
        """
        try:
            self._answers.send_nowait(received)
        except trio.WouldBlock:
            raise FrameError("an answer to an offer of blocks, which was not due") from None

    async def follow(self) -> None:
        """Send what the guest writes, until cancelled."""
        await self._shipper.run()

    async def _ship(self, closed: ClosedLog) -> None:
        """Send a log; returns when there is room for another."""
        if closed.buffer is None:
            return
        self._sequence += 1
        self._flights.append((self._sequence, closed))
        header = Header(Kind.DISK, self._generation, self._sequence, closed.length)
        # Who is cancelled stops following, and not in the middle: what follows builds on what came before.
        with trio.CancelScope(shield=True):
            await self._link.send_raw(header, b"", (closed.buffer, closed.length))
        while len(self._flights) >= self._most:
            await self._landed.wait()

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
        while self._flights:
            await self._landed.wait()

    def close(self, closed: ClosedLog | None, *, keep: bool) -> None:
        """The session is over: what the backup has not acknowledged is marked.

        Args:
            closed: the log of a checkpoint that came to nothing.
            keep: the next daemon goes on with it, and the log.
        """
        self.log.wake = lambda: None
        if not keep:
            self.log.track()
        if closed is not None:
            self.log.release(closed)
        while self._flights:
            self.log.release(self._flights.popleft()[1])


def _sum(copiers: Sequence[DiskCopier], dirty: Sequence[DirtyBitmap]) -> CopyProgress:
    """How far all of them are; those that are not begun have all before them."""
    found = [copier.progress() for copier in copiers]
    rest = sum(bitmap.dirty_bytes() for bitmap in dirty[len(found) :])
    return CopyProgress(
        total=rest + sum(one.total for one in found),
        done=sum(one.done for one in found),
        sent=sum(one.sent for one in found),
    )
