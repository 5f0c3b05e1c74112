"""How many epochs may be on their way while their packets are held."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from curling_fd.errors import CheckpointTimeout
from curling_fd.output.hold import HoldStatistics, NoHold
from curling_fd.service.gate import OutputGate


class OneBarrier(NoHold):
    """A hold that can tell two epochs apart, no more."""

    depth: int | None = 1

    def __init__(self) -> None:
        self.held = 0
        self.barriers: list[int] = []

    def barrier(self, sequence: int) -> None:
        self.barriers.append(sequence)

    def statistics(self) -> HoldStatistics:
        return HoldStatistics(1, self.held)


async def waits(gate: OutputGate) -> bool:
    with trio.move_on_after(0.02) as scope:
        await gate.turn()
    return scope.cancelled_caught


async def test_the_next_epoch_does_not_end_before_the_one_before_is_committed() -> None:
    gate = OutputGate(OneBarrier(), 1000, 1)
    assert not await waits(gate)
    gate.barrier(1)
    assert await waits(gate)
    await gate.release(1)
    assert not await waits(gate)


async def test_who_waits_is_told_of_the_release(nursery: trio.Nursery) -> None:
    gate = OutputGate(OneBarrier(), 1000, 1)
    gate.barrier(1)
    done = trio.Event()

    async def turn() -> None:
        await gate.turn()
        done.set()

    nursery.start_soon(turn)
    await gate.release(1)
    await done.wait()


async def test_a_guest_that_sends_too_much_waits_in_the_checkpoint(nursery: trio.Nursery) -> None:
    hold = OneBarrier()
    gate = OutputGate(hold, 1000, 10)
    gate.barrier(1)
    hold.held = 1001
    assert not await waits(gate), "its checkpoint is begun"
    done = trio.Event()

    async def barrier() -> None:
        await trio.to_thread.run_sync(gate.barrier, 2)
        done.set()

    nursery.start_soon(barrier)
    await trio.testing.wait_all_tasks_blocked()
    assert hold.barriers == [1], "and it stands still"
    await gate.release(1)
    await done.wait()
    assert hold.barriers == [1, 2]


def test_it_does_not_stand_still_for_ever() -> None:
    gate = OutputGate(OneBarrier(), 1000, 0.01)
    gate.barrier(1)
    with pytest.raises(CheckpointTimeout):
        gate.barrier(2)


async def test_what_holds_nothing_never_waits() -> None:
    gate = OutputGate(NoHold(), 0, 1)
    for sequence in range(1, 10):
        assert not await waits(gate)
        gate.barrier(sequence)
