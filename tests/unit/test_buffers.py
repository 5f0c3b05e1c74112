"""Buffers with an fd, and the pool that bounds them (I6)."""

from __future__ import annotations

import gc
import mmap
import os

import pytest
import trio
import trio.testing

from curling_fd.system.buffers import KEEP, PREFAULT, Buffer, BufferPool

MIB = 1 << 20
PAGE = mmap.PAGESIZE


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_mapping_and_file_are_the_same_memory() -> None:
    buffer = Buffer("test", 3 * PAGE)
    buffer.view[PAGE : PAGE + 5] = b"hello"
    assert os.pread(buffer.fd, 5, PAGE) == b"hello"
    os.pwrite(buffer.fd, b"world", 2 * PAGE)
    assert bytes(buffer.view[2 * PAGE : 2 * PAGE + 5]) == b"world"
    assert len(buffer.view) == buffer.capacity == 3 * PAGE
    buffer.close()


def test_a_start_is_made_with_the_first_megabytes_and_the_rest_waits_for_its_use() -> None:
    buffer = Buffer("test", 64 * MIB)
    assert buffer.allocated() == PREFAULT
    buffer.view[32 * MIB] = 1
    assert buffer.allocated() == PREFAULT + PAGE
    buffer.close()
    small = Buffer("test", 100)
    assert small.allocated() == PAGE
    small.close()
    untouched = Buffer("test", 64 * MIB, prefault=0)
    assert untouched.allocated() == 0
    untouched.close()


@pytest.mark.parametrize("keep", [0, 1, PAGE, 5000, 3 * PAGE, 4 * PAGE - 1, 4 * PAGE, 5 * PAGE])
@pytest.mark.parametrize("capacity", [4 * PAGE, 4 * PAGE - 10, 3 * PAGE + 10])
def test_what_is_trimmed_goes_back_to_the_host_and_what_is_kept_stays_as_it_was(
    keep: int, capacity: int
) -> None:
    buffer = Buffer("test", capacity, prefault=0)
    buffer.view[:] = b"\x07" * capacity
    buffer.trim(keep)
    kept = min(-(-keep // PAGE) * PAGE, capacity)
    assert bytes(buffer.view) == b"\x07" * kept + bytes(capacity - kept)
    assert buffer.allocated() <= 4 * PAGE
    buffer.view[:] = b"\x08" * capacity
    buffer.close()


def test_trimming_what_is_small_anyway_changes_nothing() -> None:
    buffer = Buffer("test", KEEP + PAGE, prefault=PAGE)
    buffer.view[KEEP] = 1
    buffer.trim()
    assert buffer.view[KEEP] == 1, "much capacity, but little of it used"
    assert buffer.allocated() == 2 * PAGE
    buffer.close()


def test_closing_frees_everything_and_may_be_done_again() -> None:
    before = open_fds()
    buffer = Buffer("test", MIB)
    assert open_fds() > before
    buffer.close()
    buffer.close()
    assert open_fds() == before
    assert buffer.fd == -1


def test_an_fd_is_not_inherited() -> None:
    buffer = Buffer("test", PAGE)
    assert not os.get_inheritable(buffer.fd)
    buffer.close()


@pytest.mark.parametrize("capacity", [-1, 0, 1 << 70])
def test_an_impossible_capacity_leaves_nothing_open(capacity: int) -> None:
    before = open_fds()
    with pytest.raises((OSError, ValueError, OverflowError)):
        Buffer("test", capacity)
    assert open_fds() == before


def test_a_name_as_long_as_a_ram_block_may_have_does_no_harm() -> None:
    Buffer("curling-" + "\N{SNOWMAN}" * 255, PAGE).close()


async def test_a_pool_makes_its_buffers_beforehand_and_no_more_later() -> None:
    pool = BufferPool("test", 3, MIB)
    assert pool.statistics().buffers == pool.statistics().free == 3
    before = open_fds()
    held = [await pool.acquire() for _ in range(3)]
    with trio.move_on_after(0) as scope:
        await pool.acquire()
    assert scope.cancelled_caught
    assert len({buffer.fd for buffer in held}) == 3
    assert open_fds() == before
    for buffer in held:
        pool.release(buffer)
    assert pool.statistics().free == 3
    pool.close()


async def test_the_buffer_used_last_comes_first_for_its_pages_are_warm() -> None:
    pool = BufferPool("test", 2, MIB)
    one, two = await pool.acquire(), await pool.acquire()
    pool.release(one)
    pool.release(two)
    assert await pool.acquire() is two
    pool.release(two)
    pool.close()


async def test_who_waits_gets_the_buffer_that_comes_back(nursery: trio.Nursery) -> None:
    pool = BufferPool("test", 1, MIB)
    buffer = await pool.acquire()
    got: list[Buffer] = []

    async def wait() -> None:
        got.append(await pool.acquire())

    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    assert got == []
    pool.release(buffer)
    await trio.testing.wait_all_tasks_blocked()
    assert got == [buffer], "one buffer for one of them"
    pool.release(buffer)
    await trio.testing.wait_all_tasks_blocked()
    assert got == [buffer, buffer]
    pool.release(buffer)
    pool.close()


async def test_a_waiter_that_gives_up_takes_nothing_with_it(nursery: trio.Nursery) -> None:
    pool = BufferPool("test", 1, MIB)
    buffer = await pool.acquire()
    scope = trio.CancelScope()

    async def give_up() -> None:
        with scope:
            await pool.acquire()

    nursery.start_soon(give_up)
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()
    pool.release(buffer)
    await trio.testing.wait_all_tasks_blocked()
    assert await pool.acquire() is buffer
    pool.release(buffer)
    pool.close()


@pytest.mark.parametrize("capacity", [16 * PAGE, 5000])
async def test_a_pool_holds_no_more_memory_than_its_limit_however_it_is_used(
    nursery: trio.Nursery, capacity: int
) -> None:
    """I6, in the small: many users that fill their buffers to the brim, a few buffers."""
    pool = BufferPool("test", 3, capacity)
    highest = 0

    async def use() -> None:
        nonlocal highest
        for _ in range(5):
            buffer = await pool.acquire()
            buffer.view[:] = b"\xff" * capacity
            await trio.lowlevel.checkpoint()
            highest = max(highest, pool.statistics().allocated)
            pool.release(buffer)

    async with trio.open_nursery() as users:
        for _ in range(20):
            users.start_soon(use)
    statistics = pool.statistics()
    assert statistics.buffers == statistics.free == 3
    assert 0 < highest <= statistics.limit
    pool.close()
    assert pool.statistics().allocated == 0


async def test_a_closed_pool_frees_what_comes_back_later() -> None:
    before = open_fds()
    pool = BufferPool("test", 2, MIB)
    one, two = await pool.acquire(), await pool.acquire()
    pool.release(one)
    pool.close()
    assert one.fd == -1
    assert two.fd >= 0, "it is still in use"
    assert pool.statistics().allocated == two.allocated()
    pool.release(two)
    assert two.fd == -1
    pool.close()
    assert open_fds() == before
