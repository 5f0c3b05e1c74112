"""The primary's disk log: what the guest writes in the running epoch, in a memfd until a checkpoint takes it.

A thread for each disk appends through a `DiskSink`. A write gets its place under the lock and its data beside
it, straight from the socket. `close`, at the boundary, hands over the log of the epoch and
goes on with a fresh one; that takes microseconds, for at the boundary QEMU has drained its disks: every write
was answered, so every place is filled.

How it is bounded (I6): from `soft` bytes on a checkpoint is asked for, and replies to further writes wait
until one is being taken. They do not wait while the gate is open, which is from before the guest is told to
stop until the boundary: QEMU drains its disks then, and a reply that waited would hang it. Neither do they
ever wait longer than `PATIENCE`. A log that comes to `HARD * soft` bytes fails, and protection ends with it.

Without a backup there is no log: what is written is only marked, in a map with a bit for each 4 KiB. When
logging ends for whatever reason, all that was logged and not released (that is, acknowledged by the backup)
is marked too. So the map always says where the disk may differ from the backup's copy. `start` takes the
map, for whoever copies those blocks, and who ends early `mark`s what was not copied in the end.

Who copies reads the disk beside the guest's writes, by this rule: a `Watch` is set before reading and
remembers what is written in there meanwhile, and of what was read only the rest is appended. The guest's
write is in the log already, and it is newer: QEMU writes to the disk first and to us afterwards.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from curling_fd.disk.bitmap import DirtyBitmap
from curling_fd.disk.holdings import ClosedLog, DiskLogLeft, DiskLogStatistics
from curling_fd.disk.log import (
    MAX_DISKS,
    MAX_LENGTH,
    RECORD_SIZE,
    TRIM,
    WRITE,
    ZERO,
    encode_into,
    scan,
)
from curling_fd.disk.memory import LogMemory
from curling_fd.disk.watch import Watch
from curling_fd.errors import DiskLogFailed, DiskLogFull
from curling_fd.system.buffers import Buffer

#: Seconds for which the reply to a write waits, at most, for a checkpoint to begin. A guest gives up on
#: its disk after 30 s.
PATIENCE = 10.0

#: Seconds that `close` waits for writes whose data are still on their way from QEMU.
SETTLE = 2.0

#: The hard limit, in soft limits.
HARD = 4


class Payload(Protocol):
    """The data of one write, still in the socket."""

    def read_into(self, view: memoryview, /) -> None:
        """Read them all into `view`: the cheapest, where memory has been used before."""

    def splice_to(self, fd: int, offset: int, /) -> None:
        """Move them all to `fd`, borrowed, at `offset`: the cheapest, where pages are still to be made."""

    def discard(self) -> None:
        """Read them and forget them."""


class _Segment:
    """A log that is being written. `pending` places have no data yet."""

    __slots__ = ("asked", "buffer", "dropped", "pending", "tail", "warm")

    def __init__(self, buffer: Buffer, warm: int) -> None:
        self.buffer = buffer
        self.warm = warm
        self.tail = 0
        self.pending = 0
        self.asked = False
        self.dropped = False


class DiskLog:
    """The log of a VM's disks. It begins without logging, every block dirty.

    All methods may be called from any thread.

    Args:
        sizes: of the disks, in bytes, in the order of their numbers.
        soft: bytes of an epoch's log from which on writers wait.
        count: memfds, of `HARD * soft` bytes each: one more than checkpoints can be on their way at once.
        basis: names what the map of dirty blocks is relative to: a copy that says the same differs from the
            disks in no other block.
        wake: called in the thread of a writer when the log has come to `ask_at` bytes, once in an epoch, and
            when it has failed. It must not wait, and not use the log.

    Attributes:
        ask_at: bytes of an epoch's log from which on `wake` is called; `soft` by default.
        failure: why logging ended by itself.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        soft: int,
        count: int,
        basis: str,
        wake: Callable[[], None] = lambda: None,
        *,
        _bits: int | None = None,
        _running: int | None = None,
    ) -> None:
        assert 0 < len(sizes) <= MAX_DISKS
        self.sizes = tuple(sizes)
        self.basis = basis
        self.soft = self.ask_at = soft
        self.wake = wake
        self.failure: DiskLogFull | DiskLogFailed | None = None
        self._count = count
        self._changed = threading.Condition(threading.Lock())
        self._gate = False
        self._running: _Segment | None = None
        self._held: list[ClosedLog] = []
        self._watches: list[Watch] = []
        self._records = 0
        self._logged = 0
        self._waited = 0.0
        self._memory = LogMemory(sizes, HARD * soft, count, soft, _bits, _running)
        self._maps = self._memory.bitmaps

    @classmethod
    def inherit(cls, left: DiskLogLeft, fds: Sequence[int], wake: Callable[[], None]) -> DiskLog:
        """The log that another process has `left`; the descriptors are owned from here on."""
        bits, *running = fds
        assert len(running) == left.logging
        log = cls(
            left.sizes,
            left.soft,
            left.count,
            left.basis,
            wake,
            _bits=bits,
            _running=running[0] if left.logging else None,
        )
        if left.logging:
            log._running = log._segment()
            log._running.tail = left.length
        return log

    def leave(self) -> tuple[DiskLogLeft, tuple[int, ...]]:
        """What `inherit` needs; the descriptors are borrowed.

        No sink may be in use any more, and every closed log must have been released.
        """
        with self._changed:
            assert not self._held
            running = self._running
            assert running is None or not running.pending
            left = DiskLogLeft(
                self.sizes,
                self.basis,
                self.soft,
                self._count,
                running is not None,
                running.tail if running else 0,
            )
            return left, (self._memory.map.fd, *((running.buffer.fd,) if running else ()))

    def sink(self, disk: int) -> DiskSink:
        """Where the writes to the disk of that number go."""
        return DiskSink(self, disk)

    # What a session does

    def start(self) -> tuple[DirtyBitmap, ...]:
        """Begin logging. Returns what was dirty at that moment, for each disk; from now on nothing is."""
        with self._changed:
            assert self._running is None
            self.failure = None
            self._running = self._segment()
            self._gate = False
            taken = tuple(bitmap.copy() for bitmap in self._maps)
            for bitmap in self._maps:
                bitmap.clear()
            return taken

    def open_gate(self) -> None:
        """The guest is about to be stopped: from now until `close` no writer waits."""
        with self._changed:
            self._gate = True
            self._changed.notify_all()

    def close(self) -> ClosedLog:
        """The log so far, to be `release`d when the backup has it; a fresh one goes on.

        At a boundary this takes microseconds. At other times it waits for data on their way from QEMU, and
        belongs into a thread.

        Raises:
            DiskLogFull, DiskLogFailed: logging has ended.
        """
        with self._changed:
            old = self._require()
            self._gate = False
            if not old.tail:
                return ClosedLog(None, 0)
            self._running = self._segment()
            closed = ClosedLog(old.buffer, old.tail)
            self._held.append(closed)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not old.pending, SETTLE):
                self._fail(DiskLogFailed("QEMU began a write and did not send its data"))
            if self.failure is not None:
                # The one that closes has it in hand: nobody else gives it back.
                self._free_later(old)
                raise self.failure
            return closed

    def release(self, closed: ClosedLog) -> None:
        """The backup has it, or logging has ended: it is forgotten."""
        if closed.buffer is None:
            return
        with self._changed:
            self._held = [held for held in self._held if held is not closed]
            self._memory.give_back(closed.buffer, closed.length)

    def track(self) -> None:
        """End logging: what is not released becomes dirty, and so does what is written from now on."""
        with self._changed:
            self._track()

    def fail(self, why: str) -> None:
        """What the guest writes does not come here any more: logging ends with `failure`, if it was on."""
        with self._changed:
            self._fail(DiskLogFailed(why))

    def mark(self, disk: int, offset: int, length: int) -> None:
        """That part of the disk may differ from the backup's copy."""
        with self._changed:
            self._maps[disk].mark(offset, length)

    def mark_all(self) -> None:
        """No copy is known, or what is known of it is in doubt."""
        with self._changed:
            for bitmap in self._maps:
                bitmap.mark_all()

    def dirty(self) -> tuple[DirtyBitmap, ...]:
        """Which blocks are marked now, for each disk; copies."""
        with self._changed:
            return tuple(bitmap.copy() for bitmap in self._maps)

    # What who copies does

    @property
    def running(self) -> int:
        """Bytes in the epoch's log."""
        running = self._running
        return running.tail if running else 0

    def watch(self, disk: int, offset: int, length: int) -> Watch:
        """Remember what is written to that part of the disk, until `unwatch`."""
        watch = Watch(disk, offset, offset + length)
        with self._changed:
            self._watches.append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """That part was read and dealt with."""
        with self._changed:
            self._watches.remove(watch)

    def put(self, watch: Watch, offset: int, data: memoryview | bytes) -> int:
        """Append what was read at `offset`, but for what was written there since the watch was set.

        Returns:
            The bytes of data that were appended.

        Raises:
            DiskLogFull, DiskLogFailed: logging has ended.
        """
        places = []
        with self._changed:
            try:
                for start, end in watch.untouched(offset, offset + len(data)):
                    segment, at = self._place(WRITE, watch.disk, start, end - start, end - start)
                    places.append((segment, at, start - offset, end - offset))
            except BaseException:
                for segment, *_ in places:
                    self._filled(segment)
                raise
        for segment, at, start, end in places:
            segment.buffer.view[at : at + end - start] = data[start:end]
            self._settle(segment)
        return sum(end - start for _, _, start, end in places)

    def put_zeroes(self, watch: Watch, offset: int, length: int) -> None:
        """Append that this part reads as zeroes, but for what was written there since.

        Raises:
            DiskLogFull, DiskLogFailed: logging has ended.
        """
        with self._changed:
            for start, end in watch.untouched(offset, offset + length):
                for first in range(start, end, MAX_LENGTH):
                    segment, _ = self._place(ZERO, watch.disk, first, min(end - first, MAX_LENGTH), 0)
                    self._filled(segment)

    # What the endpoints do, through their sinks

    def write(self, disk: int, offset: int, length: int, payload: Payload) -> None:
        """Append a write of the guest, with its data."""
        place = self._append(WRITE, disk, offset, length, length)
        if place is None:
            payload.discard()
            return
        segment, at = place
        try:
            if at + length <= segment.warm:
                payload.read_into(segment.buffer.view[at : at + length])
            else:
                payload.splice_to(segment.buffer.fd, at)
        except BaseException as error:
            # Its frames have views of the memory, and whoever keeps the error would keep it from being freed.
            traceback.clear_frames(error.__traceback__)
            with self._changed:
                self._fail(DiskLogFailed("QEMU broke off in the middle of a write"))
            raise
        finally:
            self._settle(segment)
        self._throttle(segment)

    def clear(self, kind: int, disk: int, offset: int, length: int) -> None:
        """Append a ZERO or a TRIM of the guest."""
        place = self._append(kind, disk, offset, length, 0)
        if place is not None:
            self._settle(place[0])
            self._throttle(place[0])

    def _append(
        self, kind: int, disk: int, offset: int, length: int, data: int
    ) -> tuple[_Segment, int] | None:
        """A place for the data of a record; None where it was only marked. Its segment is to be settled."""
        if length <= 0 or offset < 0 or offset + length > self.sizes[disk]:
            raise ValueError("a write past the end of the disk")
        with self._changed:
            for watch in self._watches:
                if watch.disk == disk:
                    watch.touch(offset, offset + length)
            if self._running is not None:
                try:
                    place = self._place(kind, disk, offset, length, data)
                except (DiskLogFull, DiskLogFailed):
                    place = None
            else:
                place = None
            if place is None:
                self._maps[disk].mark(offset, length)
                return None
            segment = place[0]
            wake = segment.tail >= self.ask_at and not segment.asked
            segment.asked = segment.asked or wake
        if wake:
            self.wake()
        return place

    def _segment(self) -> _Segment:
        buffer = self._memory.take()
        return _Segment(buffer, self._memory.warm(buffer))

    def _place(self, kind: int, disk: int, offset: int, length: int, data: int) -> tuple[_Segment, int]:
        segment = self._require()
        at = segment.tail + RECORD_SIZE
        if at + data > segment.buffer.capacity:
            full = DiskLogFull(segment.buffer.capacity)
            self._fail(full)
            raise full
        encode_into(segment.buffer.view, segment.tail, kind, disk, offset, length)
        segment.tail = at + data
        segment.pending += 1
        self._records += 1
        self._logged += RECORD_SIZE + data
        return segment, at

    def _settle(self, segment: _Segment) -> None:
        with self._changed:
            self._filled(segment)

    def _filled(self, segment: _Segment) -> None:
        segment.pending -= 1
        if not segment.pending:
            if segment.dropped:
                self._memory.give_back(segment.buffer, segment.tail)
            self._changed.notify_all()

    def _throttle(self, segment: _Segment) -> None:
        """Wait while this log is beyond its soft limit and no checkpoint is being taken."""
        if segment.tail < self.soft:
            return
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._gate or self._running is not segment, PATIENCE)
            self._waited += time.monotonic() - began

    def _require(self) -> _Segment:
        if self._running is None:
            raise self.failure or DiskLogFailed("protection has ended")
        return self._running

    def _fail(self, failure: DiskLogFull | DiskLogFailed) -> None:
        if self._running is not None:
            self.failure = failure
            self._track()
            self.wake()

    def _track(self) -> None:
        running = self._running
        if running is None:
            return
        self._running = None
        for buffer, length in [(held.buffer, held.length) for held in self._held] + [
            (running.buffer, running.tail)
        ]:
            assert buffer is not None
            for record in scan(buffer.view, 0, length, self.sizes):
                self._maps[record.disk].mark(record.offset, record.length)
        self._held.clear()
        self._free_later(running)
        self._changed.notify_all()

    def _free_later(self, segment: _Segment) -> None:
        if segment.pending:
            segment.dropped = True
        else:
            self._memory.give_back(segment.buffer, segment.tail)

    def statistics(self) -> DiskLogStatistics:
        """What the log holds now."""
        with self._changed:
            return DiskLogStatistics(
                logging=self._running is not None,
                running=self.running,
                held=sum(held.length for held in self._held),
                allocated=self._memory.allocated(),
                limit=self._memory.limit(),
                records=self._records,
                logged=self._logged,
                waited=self._waited,
            )

    def free(self) -> None:
        """Free the memory. No sink may be in use any more."""
        self._memory.close()


class DiskSink:
    """Where the endpoint of one disk puts what QEMU writes; it may be made to wait."""

    def __init__(self, log: DiskLog, disk: int) -> None:
        self._log = log
        self._disk = disk

    def write(self, offset: int, length: int, payload: Payload) -> None:
        """A write, with its data."""
        self._log.write(self._disk, offset, length, payload)

    def zero(self, offset: int, length: int) -> None:
        """That part reads as zeroes from now on."""
        self._log.clear(ZERO, self._disk, offset, length)

    def trim(self, offset: int, length: int) -> None:
        """The guest does not need that part's content any more."""
        self._log.clear(TRIM, self._disk, offset, length)
