"""Copying a disk that is being written: in the end the copy is the disk, whatever came between.

The guest here does as QEMU does: a write is on the disk first, and comes to the log afterwards; two that
overlap are never under way at once; at a boundary none is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from itertools import pairwise
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.disk import copy as copying
from curling_fd.disk.bitmap import Range
from curling_fd.disk.compare import BLOCK, FINE, Offer, answer, digest
from curling_fd.disk.copy import CopyProgress, DiskCopier, LogShipper, RateLimit
from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.holdings import ClosedLog
from curling_fd.disk.log import TRIM, WRITE, ZERO, scan
from curling_fd.disk.steps import digests, next_step, parts
from curling_fd.errors import CurlingError, DiskLogFailed
from curling_fd.nbd.protocol import Extent
from tests.unit.test_disk_epoch import Bytes

SIZE = 5 * BLOCK + 3 * FINE + 512


class Torn(Bytes):
    def read_into(self, view: memoryview, /) -> None:
        raise ConnectionError


class Broken(CurlingError):
    """The link, or the disk, or QEMU."""


class World:
    """A disk, the guest that writes to it, its log, and the backup's copy.

    Args:
        script: what the guest does at each opportunity; a negative number breaks what is going on.
    """

    def __init__(self, source: bytes, copy: bytes, script: Iterable[int] = ()) -> None:
        self.source = bytearray(source)
        self.copy = bytearray(copy)
        self.script = iter(script)
        # The copier reads in steps of one or two blocks then.
        self.log = DiskLog([len(source)], 4 * BLOCK, 4, "basis")
        self.under_way: list[tuple[int, int, int, bytes]] = []
        self.on_the_way: list[ClosedLog] = []
        self.read = 0
        self.shipped = 0
        self.number = 1

    def close(self) -> None:
        self.log.track()
        self.log.free()

    # The guest

    def act(self) -> None:
        for _ in range(2):
            action = next(self.script, 0)
            if action < 0:
                raise Broken
            if action % 4 == 0:
                continue
            if action % 4 == 1 and self.under_way:
                self.arrive(action // 4 % len(self.under_way))
            else:
                self.begin(action // 4)

    def begin(self, seed: int) -> None:
        unit = 512 if seed % 3 else FINE
        offset = seed // 4 * unit % (len(self.source) - unit)
        length = min(unit * (1 + seed // 7 % 9), len(self.source) - offset)
        if any(offset < at + size and at < offset + length for _, at, size, _ in self.under_way):
            return
        kind = (WRITE, WRITE, ZERO, TRIM)[seed % 4]
        self.number = self.number % 250 + 1
        data = bytes([self.number if kind == WRITE else 0]) * length
        self.source[offset : offset + length] = data
        self.under_way.append((kind, offset, length, data))

    def arrive(self, which: int = 0) -> None:
        kind, offset, length, data = self.under_way.pop(which)
        self.log.open_gate()  # these tests have one thread
        if kind == WRITE:
            self.log.sink(0).write(offset, length, Bytes(data))
        else:
            self.log.clear(kind, 0, offset, length)

    def drain(self) -> None:
        while self.under_way:
            self.arrive()

    # QEMU's export

    def read_many(self, reads: Iterable[tuple[memoryview, int]]) -> None:
        for view, offset in reads:
            for start in range(0, len(view), BLOCK // 2):
                self.act()
                size = min(BLOCK // 2, len(view) - start)
                view[start : start + size] = self.source[offset + start : offset + start + size]
                self.read += size

    def status(self, offset: int, length: int) -> list[Extent]:
        self.act()
        data = memoryview(self.source)[offset : offset + length]
        return [Extent(end - start, zero, zero) for start, end, zero in parts(data)]

    # The backup

    async def ship(self, closed: ClosedLog) -> None:
        await trio.lowlevel.checkpoint()
        self.act()
        self.on_the_way.append(closed)
        if len(self.on_the_way) == 2:
            self.apply()

    def apply(self) -> None:
        """The oldest on its way arrives."""
        closed = self.on_the_way.pop(0)
        if closed.buffer is not None:
            self.shipped += closed.length
            # A crash in the middle, and again from the beginning.
            for most in (self.number % 5, 1 << 30):
                view = closed.buffer.view
                for count, record in enumerate(scan(view, 0, closed.length, [len(self.copy)])):
                    if count == most:
                        break
                    data = bytes(record.length)
                    if record.kind == WRITE:
                        data = bytes(view[record.data : record.data + record.length])
                    self.copy[record.offset : record.offset + record.length] = data
            self.log.release(closed)

    async def compare(self, payload: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        self.act()
        while self.on_the_way:
            self.apply()  # the link keeps the order
        said = answer(Offer.decode(payload, [len(self.copy)]), self.digests)
        self.shipped += len(payload)
        self.act()
        return said

    def digests(self, offset: int, length: int, block: int) -> Iterator[bytes]:
        end = offset + length
        return (digest(self.copy[at : min(at + block, end)]) for at in range(offset, end, block))

    def boundary(self) -> None:
        """Checkpoint 1 takes the log."""
        self.drain()
        self.on_the_way.append(self.log.close())
        while self.on_the_way:
            self.apply()

    # A session

    def copier(self, ranges: Iterable[Range], *, compare: bool) -> DiskCopier:
        shipper = LogShipper(self.log, self.ship)
        asked = self.compare if compare else None
        return DiskCopier(self.log, 0, self, ranges, shipper, RateLimit(None), asked)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in threads is done in place, so that a run is the same as the one before."""

    async def in_place(function, *arguments):  # type: ignore[no-untyped-def]
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(copying.trio.to_thread, "run_sync", in_place)


def disk_of(runs: list[tuple[int, int, int]]) -> bytes:
    """A disk of `SIZE` bytes, with holes but for `runs`: first sector, bytes, and what is in them."""
    disk = bytearray(SIZE)
    for sector, length, value in runs:
        start = sector * 512
        disk[start : start + length] = bytes([value]) * len(disk[start : start + length])
    return bytes(disk)


disks = st.lists(
    st.tuples(
        st.integers(0, SIZE // 512 - 1),
        st.sampled_from((512, FINE, BLOCK, 2 * BLOCK)),
        st.integers(251, 255),
    ),
    max_size=5,
)


def busy(seed: int, breaks_at: int | None = None) -> Iterator[int]:
    """What a busy guest does: too much of it to be drawn one by one."""
    random = Random(seed)
    for count in itertools.count():
        yield -1 if count == breaks_at else random.randrange(1 << 16)


seeds = st.integers(0, 1 << 32)


@given(disks, disks, seeds)
@settings(max_examples=150)
def test_a_first_copy_is_the_disk_at_the_boundary(
    source: list[tuple[int, int, int]], copy: list[tuple[int, int, int]], seed: int
) -> None:
    world = World(disk_of(source), disk_of(copy), busy(seed))
    try:
        ranges = [part for bitmap in world.log.start() for part in bitmap.ranges()]
        copier = world.copier(ranges, compare=True)
        trio.run(copier.run)
        assert copier.progress().done == copier.progress().total == SIZE
        assert not list(copier.remaining())
        world.boundary()
        assert world.copy == world.source
    finally:
        world.close()


@given(disks, seeds, st.lists(st.integers(0, 150), min_size=1, max_size=3))
@settings(max_examples=150)
def test_an_outage_is_followed_by_a_copy_of_what_was_written_since(
    source: list[tuple[int, int, int]], seed: int, breaks: list[int]
) -> None:
    """A session breaks anywhere; writes without a backup; a resync that breaks too; one that does not."""
    world = World(disk_of(source), disk_of(source), busy(seed))
    try:
        world.log.start()  # the two are the same, as after an earlier copy
        for _ in range(seed % 20):
            world.act()
        if seed % 2:
            world.on_the_way.append(world.log.close())
        for number, breaks_at in enumerate([*breaks, None]):
            # Of what is on its way some arrives; none of it is acknowledged.
            world.log.track()
            arrives = seed % 3
            for count, closed in enumerate(list(world.on_the_way)):
                if count < arrives:
                    world.apply()
                else:
                    world.log.release(closed)
            world.on_the_way.clear()
            for _ in range(3):
                world.act()
            (dirty,) = world.log.start()
            world.script = busy(seed + number + 1, breaks_at)
            copier = world.copier(dirty.ranges(), compare=False)
            try:
                trio.run(copier.run)
            except Broken:
                for part in copier.remaining():
                    world.log.mark(0, *part)
            world.script = busy(seed)
        world.boundary()
        assert world.copy == world.source
    finally:
        world.close()


def quiet(source: bytes, copy: bytes) -> World:
    world = World(source, copy)
    trio.run(world.copier([(0, SIZE)] if world.log.start() else [], compare=True).run)
    world.boundary()
    assert world.copy == world.source
    return world


def test_a_copy_that_is_the_same_already_costs_its_digests() -> None:
    disk = b"d" * SIZE
    world = quiet(disk, disk)
    assert world.shipped < SIZE // 1000
    world.close()


def test_a_block_that_differs_costs_the_four_kibibytes_in_which_it_does() -> None:
    copy = bytearray(b"d" * SIZE)
    copy[BLOCK + FINE + 7] = 0
    world = quiet(b"d" * SIZE, bytes(copy))
    assert world.shipped < FINE + 1000
    world.close()


def test_a_thin_disk_is_neither_read_nor_sent_where_there_is_nothing() -> None:
    disk = bytearray(SIZE)
    disk[FINE : 2 * FINE] = b"d" * FINE
    world = quiet(bytes(disk), bytes(SIZE))
    assert world.read == BLOCK
    assert world.shipped < FINE + 1000
    world.close()


def test_what_is_to_be_empty_is_said_and_not_sent() -> None:
    world = quiet(bytes(SIZE), b"old" * (SIZE // 3) + b"o" * (SIZE % 3))
    assert world.read == 0
    assert world.shipped < 1000
    world.close()


def test_known_differences_are_sent_without_asking() -> None:
    world = World(b"d" * SIZE, bytes(SIZE))
    world.log.start()
    copier = world.copier([(FINE, FINE), (3 * FINE, 2 * FINE)], compare=False)
    trio.run(copier.run)
    world.boundary()
    assert bytes(world.copy[FINE : 5 * FINE]) == b"d" * FINE + bytes(FINE) + b"d" * 2 * FINE
    assert copier.progress() == CopyProgress(3 * FINE, 3 * FINE, 3 * FINE + 2 * 16)
    world.close()


async def test_the_guests_writes_are_shipped_without_a_checkpoint(autojump_clock: object) -> None:
    world = World(bytes(SIZE), bytes(SIZE))
    world.log.start()
    shipped = trio.Event()

    async def ship(closed: ClosedLog) -> None:
        world.log.release(closed)
        shipped.set()

    shipper = LogShipper(world.log, ship)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shipper.run)
        await trio.testing.wait_all_tasks_blocked()
        world.log.ask_at = BLOCK
        world.log.sink(0).write(0, BLOCK, Bytes(bytes(BLOCK)))
        assert not shipped.is_set(), "a writer only asks"
        world.log.open_gate()
        for block in range(1, 4):
            world.log.sink(0).write(block * BLOCK, BLOCK, Bytes(bytes(BLOCK)))
        world.log.wake()
        await shipped.wait()
        nursery.cancel_scope.cancel()
    world.close()


async def test_who_ships_learns_that_the_log_has_failed() -> None:
    world = World(bytes(SIZE), bytes(SIZE))
    world.log.start()
    with pytest.raises(ConnectionError):
        world.log.sink(0).write(0, 1, Torn(b"x"))
    with pytest.raises(DiskLogFailed):
        await LogShipper(world.log, world.ship).run()
    world.close()


async def test_copies_together_keep_to_their_rate(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(1000)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(limit.pay, 500)
    assert trio.current_time() - began == pytest.approx(2)
    await RateLimit(None).pay(1 << 40)


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=8), st.integers(1, 4))
def test_steps_cover_what_there_is_in_whole_blocks(lengths: list[tuple[int, bool]], most: int) -> None:
    extents = [(length * 512, zero) for length, zero in lengths]
    total = sum(length for length, _ in extents)
    offset = 7 * FINE
    step = next_step(offset, extents, most * BLOCK)
    assert step.offset == offset and 0 < step.length <= total
    assert step.size <= most * BLOCK
    assert step.length == total or (step.length % BLOCK == 0 and step.size == most * BLOCK)
    for start, length in step.data:
        assert length > 0 and (start - offset) % BLOCK == 0
        assert length % BLOCK == 0 or start + length == offset + step.length
    for (start, length), (after, _) in pairwise(step.data):
        assert start + length < after
    at = offset
    for length, zero in extents:
        inside = [
            place
            for place in range(at, min(at + length, offset + step.length), 512)
            if any(start <= place < start + size for start, size in step.data)
        ]
        if not zero:
            assert len(inside) == max(0, min(at + length, offset + step.length) - at + 511) // 512
        at += length
    content = memoryview(b"d" * step.size)
    assert len(digests(step, content)) == 16 * -(-step.length // BLOCK)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), max_size=6), st.integers(0, 600))
def test_parts_tell_zeroes_from_the_rest(runs: list[tuple[int, int]], rest: int) -> None:
    data = b"".join(bytes([value]) * (count * FINE) for value, count in runs) + b"e" * rest
    found = list(parts(memoryview(data)))
    assert b"".join(data[start:end] for start, end, _ in found) == data
    for start, end, zero in found:
        assert (not any(data[start:end])) == zero
    assert all(before[2] != after[2] for before, after in pairwise(found))
