"""The primary's disk log: epochs, limits, the map of dirty blocks, and reading beside writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.disk.bitmap import BLOCK
from curling_fd.disk.epoch import HARD, DiskLog
from curling_fd.disk.holdings import ClosedLog
from curling_fd.disk.log import RECORD_SIZE, TRIM, WRITE, ZERO, scan
from curling_fd.disk.watch import Watch
from curling_fd.errors import DiskLogFailed, DiskLogFull

SIZES = (64 * BLOCK, 10 * BLOCK + 512)
SOFT = 8 * BLOCK


class Bytes:
    """A payload that is there already."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.discarded = False

    def read_into(self, view: memoryview, /) -> None:
        view[:] = self.data

    def splice_to(self, fd: int, offset: int, /) -> None:
        os.pwrite(fd, self.data, offset)

    def discard(self) -> None:
        self.discarded = True


class Late(Bytes):
    """A payload that comes, or breaks off, when the test says so."""

    def __init__(self, data: bytes, *, breaks: bool = False) -> None:
        super().__init__(data)
        self.breaks = breaks
        self.asked = threading.Event()
        self.come = threading.Event()

    def read_into(self, view: memoryview, /) -> None:
        self.wait()
        super().read_into(view)

    def splice_to(self, fd: int, offset: int, /) -> None:
        self.wait()
        super().splice_to(fd, offset)

    def wait(self) -> None:
        self.asked.set()
        assert self.come.wait(20)
        if self.breaks:
            raise ConnectionError


@contextmanager
def disk_log(**arguments: object) -> Iterator[DiskLog]:
    log = DiskLog(SIZES, SOFT, 3, "basis", **arguments)  # type: ignore[arg-type]
    try:
        yield log
    finally:
        log.track()
        log.free()


@pytest.fixture
def log() -> Iterator[DiskLog]:
    with disk_log() as log:
        log.start()
        yield log


def content(closed: ClosedLog) -> list[tuple[int, int, int, bytes | int]]:
    if closed.buffer is None:
        return []
    view = closed.buffer.view
    return [
        (
            record.kind,
            record.disk,
            record.offset,
            bytes(view[record.data : record.data + record.length]) if record.kind == WRITE else record.length,
        )
        for record in scan(view, 0, closed.length, SIZES)
    ]


def dirty(log: DiskLog) -> list[list[tuple[int, int]]]:
    return [list(bitmap.ranges()) for bitmap in log.dirty()]


def thread(function: object, *arguments: object) -> threading.Thread:
    started = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
    started.start()
    return started


def test_an_epoch_has_what_was_written_in_it_and_the_next_one_the_rest(log: DiskLog) -> None:
    log.sink(0).write(3, 5, Bytes(b"hello"))
    log.sink(1).zero(0, BLOCK)
    log.sink(1).trim(BLOCK, 512)
    first = log.close()
    log.sink(0).write(0, 1, Bytes(b"x"))
    second = log.close()
    assert content(first) == [(WRITE, 0, 3, b"hello"), (ZERO, 1, 0, BLOCK), (TRIM, 1, BLOCK, 512)]
    assert content(second) == [(WRITE, 0, 0, b"x")]
    log.release(first)
    log.release(second)


def test_an_epoch_without_writes_takes_no_memory(log: DiskLog) -> None:
    for _ in range(10):
        closed = log.close()
        assert closed == ClosedLog(None, 0)
    log.release(closed)


def test_data_go_into_memory_the_cheapest_way(log: DiskLog, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []

    class Telling(Bytes):
        def read_into(self, view: memoryview, /) -> None:
            ways.append("read")
            super().read_into(view)

        def splice_to(self, fd: int, offset: int, /) -> None:
            ways.append("splice")
            super().splice_to(fd, offset)

    monkeypatch.setattr("curling_fd.disk.memory.PREFAULT", 2 * BLOCK)
    with disk_log() as log:
        for _ in range(2):
            log.start()
            for block in range(4):
                log.sink(0).write(block * BLOCK, BLOCK, Telling(bytes([block]) * BLOCK))
            closed = log.close()
            assert content(closed) == [(WRITE, 0, n * BLOCK, bytes([n]) * BLOCK) for n in range(4)]
            log.track()
            log.release(closed)  # last, so that it is the next one to be taken
    assert ways == ["read", *["splice"] * 3, *["read"] * 4]


def test_memory_goes_round(log: DiskLog) -> None:
    for number in range(20):
        log.sink(0).write(number, 1, Bytes(b"x"))
        closed = log.close()
        assert content(closed) == [(WRITE, 0, number, b"x")]
        log.release(closed)
    statistics = log.statistics()
    assert statistics.allocated <= statistics.limit
    assert (statistics.records, statistics.logged) == (20, 20 * (RECORD_SIZE + 1))
    assert (statistics.running, statistics.held) == (0, 0)


def test_a_write_past_the_end_of_its_disk_is_refused(log: DiskLog) -> None:
    with pytest.raises(ValueError, match="past the end"):
        log.sink(1).write(SIZES[1] - 1, 2, Bytes(b"xx"))
    assert log.close().buffer is None


def test_two_disks_write_at_once_and_the_log_waits_for_both(log: DiskLog) -> None:
    slow = Late(b"slow")
    writer = thread(log.sink(0).write, 0, 4, slow)
    assert slow.asked.wait(20)
    log.sink(1).write(8, 4, Bytes(b"fast"))
    found: list[ClosedLog] = []
    closer = thread(lambda: found.append(log.close()))
    slow.come.set()
    writer.join()
    closer.join()
    assert content(found[0]) == [(WRITE, 0, 0, b"slow"), (WRITE, 1, 8, b"fast")]
    log.release(found[0])


def test_a_write_that_breaks_off_ends_logging_and_counts_as_dirty(log: DiskLog) -> None:
    woken: list[None] = []
    log.wake = lambda: woken.append(None)
    torn = Late(b"torn", breaks=True)
    torn.come.set()
    with pytest.raises(ConnectionError):
        log.sink(0).write(5 * BLOCK, 4, torn)
    assert woken
    with pytest.raises(DiskLogFailed):
        log.close()
    assert dirty(log) == [[(5 * BLOCK, BLOCK)], []]
    log.start()
    assert log.failure is None
    assert log.close().buffer is None


def test_who_closes_while_a_write_breaks_off_learns_of_it(log: DiskLog) -> None:
    torn = Late(b"torn", breaks=True)
    broken: list[BaseException] = []

    def write() -> None:
        try:
            log.sink(0).write(0, 4, torn)
        except ConnectionError as error:
            broken.append(error)

    writer = thread(write)
    assert torn.asked.wait(20)
    failed: list[BaseException] = []

    def close() -> None:
        try:
            log.close()
        except DiskLogFailed as error:
            failed.append(error)

    closer = thread(close)
    torn.come.set()
    writer.join()
    closer.join()
    assert broken and failed
    for _ in range(3):  # every buffer has come back
        log.start()
        log.sink(0).zero(0, 1)
        log.release(log.close())
        log.track()


def test_beyond_the_soft_limit_a_reply_waits_for_a_checkpoint(log: DiskLog) -> None:
    woken = threading.Event()
    log.wake = woken.set
    data = Bytes(bytes(SOFT))
    writer = thread(log.sink(0).write, 0, SOFT, data)
    assert woken.wait(20)
    assert writer.is_alive()
    closed = log.close()
    writer.join()
    assert closed.length == SOFT + RECORD_SIZE
    log.release(closed)
    assert log.statistics().waited > 0


def test_no_reply_waits_while_the_gate_is_open(log: DiskLog) -> None:
    woken = threading.Event()
    log.wake = woken.set
    writer = thread(log.sink(0).write, 0, SOFT, Bytes(bytes(SOFT)))
    assert woken.wait(20)
    log.open_gate()
    writer.join()
    log.sink(0).write(0, SOFT, Bytes(bytes(SOFT)))  # QEMU drains: nobody else is there to let it go on
    log.release(log.close())
    log.sink(1).zero(0, 1)
    woken.clear()
    writer = thread(log.sink(0).write, 0, SOFT, Bytes(bytes(SOFT)))
    assert woken.wait(20), "the gate was for one boundary"
    assert writer.is_alive()
    log.track()
    writer.join()


def test_no_reply_waits_for_ever(log: DiskLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curling_fd.disk.epoch.PATIENCE", 0.01)
    log.sink(0).write(0, SOFT, Bytes(bytes(SOFT)))
    assert content(log.close()) == [(WRITE, 0, 0, bytes(SOFT))]


def test_a_checkpoint_can_be_asked_for_before_anyone_has_to_wait(log: DiskLog) -> None:
    woken: list[int] = []
    log.wake = lambda: woken.append(log.running)
    log.ask_at = 100
    for _ in range(3):
        log.sink(0).write(0, 50, Bytes(bytes(50)))
    assert len(woken) == 1, "once in an epoch"
    log.release(log.close())
    log.sink(0).write(0, 100, Bytes(bytes(100)))
    assert len(woken) == 2


def test_a_full_log_ends_logging_and_forgets_no_write(log: DiskLog) -> None:
    log.open_gate()
    woken = threading.Event()
    log.sink(1).trim(0, 512)
    held = log.close()
    log.open_gate()
    log.wake = woken.set
    for block in range(0, HARD * SOFT // BLOCK, 4):
        last = Bytes(bytes(4 * BLOCK))
        log.sink(0).write(block * BLOCK, 4 * BLOCK, last)
    assert last.discarded
    assert woken.is_set()
    with pytest.raises(DiskLogFull) as caught:
        log.close()
    assert caught.value.limit == HARD * SOFT
    assert dirty(log) == [[(0, HARD * SOFT)], [(0, BLOCK)]], "what was not acknowledged too"
    log.release(held)


def test_without_logging_writes_are_marked_and_dropped() -> None:
    with disk_log() as log:
        assert dirty(log) == [[(0, SIZES[0])], [(0, SIZES[1])]], "nothing is known at first"
        taken = log.start()
        assert [bitmap.dirty_bytes() for bitmap in taken] == [SIZES[0], 11 * BLOCK]
        log.track()
        assert dirty(log) == [[], []]
        payload = Bytes(b"data")
        log.sink(0).write(BLOCK - 1, 2, payload)
        log.sink(1).zero(BLOCK, 1)
        log.sink(1).trim(10 * BLOCK, 512)
        assert payload.discarded
        assert dirty(log) == [[(0, 2 * BLOCK)], [(BLOCK, BLOCK), (10 * BLOCK, 512)]]
        with pytest.raises(DiskLogFailed):
            log.close()
        log.mark(0, 5 * BLOCK, 1)
        assert list(log.start()[0].ranges()) == [(0, 2 * BLOCK), (5 * BLOCK, BLOCK)]
        assert dirty(log) == [[], []]


def test_what_the_backup_has_acknowledged_is_not_dirty_and_the_rest_is(log: DiskLog) -> None:
    log.sink(0).zero(0, 1)
    acknowledged = log.close()
    log.sink(0).zero(2 * BLOCK, 1)
    on_its_way = log.close()
    log.sink(0).zero(4 * BLOCK, 1)
    log.release(acknowledged)
    log.track()
    log.release(on_its_way)
    assert dirty(log)[0] == [(2 * BLOCK, BLOCK), (4 * BLOCK, BLOCK)]


def test_a_write_under_way_when_logging_ends_is_dirty_and_its_memory_comes_back(log: DiskLog) -> None:
    slow = Late(b"slow")
    writer = thread(log.sink(0).write, 7 * BLOCK, 4, slow)
    assert slow.asked.wait(20)
    log.track()
    log.start()
    slow.come.set()
    writer.join()
    log.track()
    assert dirty(log) == [[], []], "the second start took it"
    for _ in range(3):
        log.start()
        log.track()


@pytest.mark.parametrize("logging", [True, False])
def test_another_process_goes_on_with_the_log(logging: bool) -> None:
    with disk_log() as log:
        log.start()
        log.sink(0).write(0, 5, Bytes(b"first"))
        if not logging:
            log.track()
        left, fds = log.leave()
        heir = DiskLog.inherit(left, [os.dup(fd) for fd in fds], lambda: None)
    try:
        heir.sink(1).zero(0, 1)
        assert (heir.basis, heir.sizes) == ("basis", SIZES)
        if logging:
            assert content(heir.close()) == [(WRITE, 0, 0, b"first"), (ZERO, 1, 0, 1)]
        else:
            assert dirty(heir) == [[(0, BLOCK)], [(0, BLOCK)]]
    finally:
        heir.free()


def test_what_was_written_meanwhile_is_left_out_of_what_was_read(log: DiskLog) -> None:
    watch = log.watch(0, 0, 100)
    read = b"o" * 100
    log.sink(0).write(10, 5, Bytes(b"newer"))
    log.sink(0).zero(95, 20)
    log.sink(1).write(50, 5, Bytes(b"other"))
    assert log.put(watch, 0, read) == 90
    log.put_zeroes(watch, 5, 10)
    log.unwatch(watch)
    assert content(log.close()) == [
        (WRITE, 0, 10, b"newer"),
        (ZERO, 0, 95, 20),
        (WRITE, 1, 50, b"other"),
        (WRITE, 0, 0, b"o" * 10),
        (WRITE, 0, 15, b"o" * 80),
        (ZERO, 0, 5, 5),
    ]


def test_a_copy_that_does_not_fit_is_refused_whole_and_its_memory_comes_back(log: DiskLog) -> None:
    watch = log.watch(0, 0, SIZES[0])
    log.sink(0).zero(BLOCK, 1)
    with pytest.raises(DiskLogFull):
        log.put(watch, 0, bytes(HARD * SOFT))
    log.unwatch(watch)
    for _ in range(3):
        log.start()
        log.track()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12), st.integers(0, 2))
def test_the_untouched_parts_are_all_that_was_not_touched(
    touches: list[tuple[int, int]], merge_at: int
) -> None:
    watch = Watch(0, 10, 50)
    watch._merge_at = merge_at
    left = set(range(10, 50))
    for start, length in touches:
        watch.touch(start, start + length)
        left -= set(range(start, start + length))
    parts = watch.untouched(10, 50)
    assert {place for start, end in parts for place in range(start, end)} == left
    assert parts == sorted(parts)


@settings(max_examples=25)
@given(st.data())
def test_many_threads_lose_nothing_between_epochs(data: st.DataObject) -> None:
    """Each writer counts up in a place of its own, while others close; put together, all counts are there."""
    counts = data.draw(st.integers(1, 60))
    with disk_log() as log:
        log.start()

        def write(disk: int, place: int) -> None:
            sink = log.sink(disk)
            for number in range(counts):
                sink.write(place * 16, 16, Bytes(b"%016d" % number))

        writers = [thread(write, disk, place) for disk in (0, 1) for place in (0, 1)]
        seen: list[tuple[int, int, int, bytes | int]] = []
        while any(writer.is_alive() for writer in writers):
            closed = log.close()
            seen += content(closed)
            log.release(closed)
        seen += content(log.close())
        for disk in (0, 1):
            for place in (0, 1):
                mine = [record[3] for record in seen if record[1:3] == (disk, place * 16)]
                assert mine == [b"%016d" % number for number in range(counts)]
