"""The primary's side of making the backup's copy the same: a first copy, or what changed since.

The disk is read beside the guest's writes, as QEMU exports it, and what the backup lacks is appended to the
disk log; `curling_fd.disk.epoch` has the rule by which the two get into the right order. The log is shipped
whenever it has grown, so that neither it nor the copy has to wait for a checkpoint.

Where it is not known what the backup has, its blocks are compared by digests first: of 64 KiB, and of 4 KiB
where those differ. Zeroes are not sent, but said; and only where the backup has something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

import trio
from attrs import frozen

from curling_fd.disk.bitmap import Range
from curling_fd.disk.compare import BLOCK, FINE, Offer, Verdict, decode_answer, digest, pieces
from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.holdings import ClosedLog
from curling_fd.disk.log import RECORD_SIZE
from curling_fd.disk.steps import Step, digests, next_step, parts
from curling_fd.disk.watch import Watch
from curling_fd.nbd.protocol import Extent
from curling_fd.system.nursery import open_nursery

#: Bytes of data read, and held in memory, at once. Two such pieces are in memory for each copy.
STEP = 8 << 20

#: Bytes of the disk looked at at once: how far apart data may be in one piece.
SPAN = 256 << 20

#: Bytes of a log that make it worth a frame while no checkpoint takes it.
SHIP_AT = 4 << 20


class Reader(Protocol):
    """The disk as it is now; `NbdClient` is one. Calls block."""

    def read_many(self, reads: Iterable[tuple[memoryview, int]]) -> None: ...

    def status(self, offset: int, length: int) -> list[Extent]: ...


@frozen
class CopyProgress:
    """Bytes of the disk: `done` of `total` are the same on the backup. `sent`: bytes that were shipped."""

    total: int
    done: int
    sent: int


class RateLimit:
    """At most so many bytes in a second, for all who pay here; None is no limit."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free_at = 0.0

    async def pay(self, size: int) -> None:
        """Wait until `size` bytes have had their time."""
        await trio.lowlevel.checkpoint()
        if self.rate is not None:
            self._free_at = max(self._free_at, trio.current_time()) + size / self.rate
            await trio.sleep_until(self._free_at)


class LogShipper:
    """Ships the log of a VM's disks while there are no checkpoints to do it.

    Args:
        log: borrowed.
        ship: sends a log to the backup, where it is applied at once; returns when another one may come, and
            releases it when it was acknowledged.
    """

    def __init__(self, log: DiskLog, ship: Callable[[ClosedLog], Awaitable[None]]) -> None:
        self._log = log
        self._ship = ship
        self._lock = trio.Lock()

    async def run(self) -> None:
        """Ship whenever the guest has written enough, until cancelled.

        Raises:
            DiskLogFull, DiskLogFailed: logging has ended.
        """
        wanted = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            nonlocal wanted
            wanted.set()

        before = self._log.wake, self._log.ask_at
        self._log.wake = lambda: token.run_sync_soon(wake, idempotent=True)
        self._log.ask_at = min(SHIP_AT, self._log.soft)
        try:
            while True:
                # Now too: what came before there was anybody to wake.
                await self.flush(min(SHIP_AT, self._log.soft))
                await wanted.wait()
                wanted = trio.Event()
        finally:
            self._log.wake, self._log.ask_at = before

    async def flush(self, least: int = 1) -> None:
        """Ship what is in the log, if that is at least so many bytes.

        Raises:
            DiskLogFull, DiskLogFailed: logging has ended.
        """
        async with self._lock:
            if self._log.failure is None and self._log.running < least:
                return
            await self._ship(await trio.to_thread.run_sync(self._log.close))


class DiskCopier:
    """Copies `ranges` of one disk.

    Args:
        log: borrowed; logging.
        reader: of the disk, borrowed. Used from one thread at a time.
        ranges: what may differ, in bytes, in order.
        compare: sends an encoded offer and returns the answer; None if the ranges are known to differ.
    """

    def __init__(
        self,
        log: DiskLog,
        disk: int,
        reader: Reader,
        ranges: Iterable[Range],
        shipper: LogShipper,
        limit: RateLimit,
        compare: Callable[[bytes], Awaitable[bytes]] | None = None,
    ) -> None:
        self._log = log
        self._disk = disk
        self._reader = reader
        self._left = deque(ranges)
        self._shipper = shipper
        self._limit = limit
        self._compare = compare
        self._most = max(min(STEP, log.soft // 2) // BLOCK * BLOCK, BLOCK)
        self._total = sum(length for _, length in self._left)
        self._done = 0
        self._sent = 0
        self._watches: set[Watch] = set()

    async def run(self) -> None:
        """Copy it all. The last of it may still be in the log then.

        Raises:
            DiskLogFull, DiskLogFailed: logging has ended.
            NbdError, NbdRequestFailed: the disk cannot be read.
            FrameError: the backup's answers make no sense.
        """
        to_deal, found = trio.open_memory_channel[tuple[Watch, Step, memoryview]](0)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._read_all, to_deal)
                async for watch, step, data in found:
                    sent = await self._deal(watch, step, data)
                    self._unwatch(watch)
                    self._sent += sent
                    self._finished(step)
                    await self._shipper.flush(min(SHIP_AT, self._log.soft))
                    await self._limit.pay(sent)
        finally:
            for watch in list(self._watches):
                self._unwatch(watch)

    def progress(self) -> CopyProgress:
        """How far it is."""
        return CopyProgress(self._total, self._done, self._sent)

    def remaining(self) -> Iterator[Range]:
        """What has not been dealt with: to be marked as dirty when the copy ends early."""
        yield from self._left

    async def _read_all(self, to_deal: trio.MemorySendChannel[tuple[Watch, Step, memoryview]]) -> None:
        # While one is being offered and sent the other is filled.
        buffers = deque(memoryview(bytearray(self._most)) for _ in range(2))
        async with to_deal:
            for offset, length in list(self._left):
                end = offset + length
                while offset < end:
                    buffers.rotate()
                    watch, step = await trio.to_thread.run_sync(self._read, offset, end, buffers[0])
                    await to_deal.send((watch, step, buffers[0][: step.size]))
                    offset += step.length

    def _read(self, offset: int, end: int, buffer: memoryview) -> tuple[Watch, Step]:
        length = min(end - offset, SPAN)
        watch = self._log.watch(self._disk, offset, length)
        self._watches.add(watch)
        extents = [(extent.length, extent.zero) for extent in self._reader.status(offset, length)]
        step = next_step(offset, extents, self._most)
        watch.end = offset + step.length
        reads = []
        used = 0
        for start, size in step.data:
            reads.append((buffer[used : used + size], start))
            used += size
        if reads:
            self._reader.read_many(reads)
        return watch, step

    async def _deal(self, watch: Watch, step: Step, data: memoryview) -> int:
        """Append what the backup lacks of `step`; how many bytes that took."""
        if self._compare is None:
            return await trio.to_thread.run_sync(self._append_all, watch, step, data)
        whole = (step.offset, step.length)
        offer = Offer(self._disk, BLOCK, (whole,), await trio.to_thread.run_sync(digests, step, data))
        encoded = offer.encode()
        wanted = decode_answer(offer, await self._compare(encoded))
        lookup = _Lookup(step, data)
        fine = _merged(part for part, verdict in wanted if verdict is Verdict.DIFFERS and lookup.at(*part))
        sent = len(encoded)
        if fine:
            seconds = await trio.to_thread.run_sync(_fine_offer, self._disk, fine, lookup)
            encoded = seconds.encode()
            sent += len(encoded)
            again = decode_answer(seconds, await self._compare(encoded))
        else:
            again = []
        return sent + await trio.to_thread.run_sync(self._append_wanted, watch, lookup, wanted, again)

    def _append_wanted(
        self,
        watch: Watch,
        lookup: _Lookup,
        wanted: list[tuple[Range, Verdict]],
        again: list[tuple[Range, Verdict]],
    ) -> int:
        sent = 0
        zeroes: list[Range] = []
        for (offset, length), verdict in wanted:
            data = lookup.at(offset, length)
            if data is None:
                zeroes.append((offset, length))
            elif verdict is Verdict.EMPTY:
                sent += self._append(watch, offset, data, zeroes=False)
        for offset, length in _merged(part for part, _ in again):
            while length:
                data = lookup.at(offset, min(length, lookup.reach(offset)))
                assert data is not None
                sent += self._append(watch, offset, data, zeroes=True)
                offset += len(data)
                length -= len(data)
        return sent + self._append_zeroes(watch, zeroes)

    def _append_all(self, watch: Watch, step: Step, data: memoryview) -> int:
        sent = 0
        zeroes: list[Range] = []
        at = step.offset
        used = 0
        for start, length in (*step.data, (step.offset + step.length, 0)):
            if start > at:
                zeroes.append((at, start - at))
            sent += self._append(watch, start, data[used : used + length], zeroes=True)
            used += length
            at = start + length
        return sent + self._append_zeroes(watch, zeroes)

    def _append(self, watch: Watch, offset: int, data: memoryview, *, zeroes: bool) -> int:
        """`zeroes`: say where there are some; else the backup has them already."""
        sent = 0
        for start, end, zero in parts(data):
            if not zero:
                sent += self._log.put(watch, offset + start, data[start:end]) + RECORD_SIZE
            elif zeroes:
                self._log.put_zeroes(watch, offset + start, end - start)
                sent += RECORD_SIZE
        return sent

    def _append_zeroes(self, watch: Watch, ranges: list[Range]) -> int:
        merged = _merged(ranges)
        for offset, length in merged:
            self._log.put_zeroes(watch, offset, length)
        return len(merged) * RECORD_SIZE

    def _unwatch(self, watch: Watch) -> None:
        self._watches.discard(watch)
        self._log.unwatch(watch)

    def _finished(self, step: Step) -> None:
        offset, length = self._left.popleft()
        assert offset == step.offset
        if length > step.length:
            self._left.appendleft((offset + step.length, length - step.length))
        self._done += step.length


class _Lookup:
    """Finds the data of a step by their place on the disk."""

    def __init__(self, step: Step, data: memoryview) -> None:
        self._found: dict[int, tuple[int, int]] = {}
        self._step = step
        self._data = data
        used = 0
        for start, length in step.data:
            for place in range(0, length, BLOCK):
                self._found[start + place] = (used + place, used + length)
            used += length

    def at(self, offset: int, length: int) -> memoryview | None:
        """What lies there, within one block; None if that block reads as zeroes."""
        within = (offset - self._step.offset) % BLOCK
        found = self._found.get(offset - within)
        return None if found is None else self._data[found[0] + within : found[0] + within + length]

    def reach(self, offset: int) -> int:
        """Bytes from `offset` to the end of its block."""
        return BLOCK - (offset - self._step.offset) % BLOCK


def _fine_offer(disk: int, ranges: list[Range], lookup: _Lookup) -> Offer:
    found = []
    for offset, length in ranges:
        for start, size in pieces(offset, length, FINE):
            data = lookup.at(start, size)
            assert data is not None
            found.append(digest(data))
    return Offer(disk, FINE, tuple(ranges), b"".join(found))


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch made one."""
    found: list[Range] = []
    for offset, length in ranges:
        if found and sum(found[-1]) == offset:
            offset, length = found[-1][0], found.pop()[1] + length
        found.append((offset, length))
    return found
