"""Between a session's checkpoints and what holds the guest's packets: how many epochs may be on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable

import trio

from curling_fd.errors import CheckpointTimeout
from curling_fd.output.hold import OutputHold

#: Seconds between two looks at how much is held, while another epoch must not end yet.
_LOOK = 0.005


class OutputGate:
    """Puts the barriers of a session into `hold`, no more of them than it can tell apart.

    Args:
        limit: bytes. A guest that has sent more stands still until the checkpoint before is committed.
        stop_limit: seconds it may stand still for that.
    """

    def __init__(self, hold: OutputHold, limit: int, stop_limit: float) -> None:
        self._hold = hold
        self.limit = limit
        self._stop_limit = stop_limit
        self._unreleased = 0
        self._open = threading.Event()
        self._open.set()
        self._released = trio.Event()

    async def turn(self) -> None:
        """Wait until the next epoch may end: there is room for its barrier, or too much is held."""
        await trio.lowlevel.checkpoint()
        while not self._open.is_set() and self._hold.statistics().bytes <= self.limit:
            with trio.move_on_after(_LOOK):
                await self._released.wait()

    def barrier(self, sequence: int) -> Callable[[], None] | None:
        """What the guest has sent so far is of epoch `sequence`. Called in a thread, the guest stopped.

        Returns:
            What has to be called before the guest goes on, if anything.

        Raises:
            CheckpointTimeout: the epoch before was not committed in time.
            OutputError: the barrier could not be put.
        """
        if not self._open.wait(self._stop_limit):
            raise CheckpointTimeout(self._stop_limit, "the commit of the checkpoint before")
        finish = self._hold.barrier(sequence)
        self._count(+1)
        return finish

    async def release(self, sequence: int) -> None:
        """Epoch `sequence` is committed.

        Raises:
            OutputError: its packets could not be let out.
        """
        await self._hold.release(sequence)
        self._count(-1)
        self._released.set()
        self._released = trio.Event()

    def _count(self, change: int) -> None:
        self._unreleased += change
        if self._hold.depth is None or self._unreleased < self._hold.depth:
            self._open.set()
        else:
            self._open.clear()
