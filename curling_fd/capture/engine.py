"""What an engine is: a way to get checkpoints out of an unpatched QEMU.

An engine is used as

    async with open_engine(choice, qmp, options, guard) as engine:
        await engine.first_pass(sink)
        while ...:
            captured = await engine.checkpoint(buffer)

and leaves the guest running, unprotected, however the block is left (I5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from curling_fd.capture.reader import Captured
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import RamLayout


@frozen
class Description:
    """What of a migration never changes between its checkpoints.

    Attributes:
        layout: the RAM blocks and how the stream names their section.
        last_block: the block of the first pass's last page.
    """

    layout: RamLayout
    last_block: str | None


class PassSink(Protocol):
    """Where a first pass goes, piece by piece."""

    async def acquire(self) -> Buffer:
        """A free buffer; waits while the backup is behind (I6)."""
        ...

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer that is not needed after all."""
        ...

    async def ship(self, buffer: Buffer, length: int, pages: int) -> None:
        """Send the first `length` bytes of `buffer`, whole records with `pages` pages; takes `buffer`."""
        ...


@frozen
class EngineOptions:
    """How an engine shall work.

    Attributes:
        request_delay_ms: shortest pause between two checkpoint requests of QEMU.
        stop_limit: seconds the guest may stand still for one checkpoint.
    """

    request_delay_ms: int
    stop_limit: float


class Engine(Protocol):
    """A running engine. `name` is its name in configuration and reports."""

    name: str

    async def first_pass(self, sink: PassSink) -> Description:
        """Send all of the guest's memory; the guest runs on when this returns."""
        ...

    async def ready(self) -> None:
        """Wait until a checkpoint can be taken."""
        ...

    async def checkpoint(
        self, buffer: Buffer, on_boundary: Callable[[], None] | None = None, *, resume: bool = True
    ) -> Captured:
        """Take a checkpoint into `buffer`. With `resume=False` the guest stays stopped afterwards."""
        ...

    async def resume(self) -> None:
        """Let the guest go on after a checkpoint taken with `resume=False`."""
        ...

    def keep_stopped(self) -> None:
        """Let nothing but `resume`, or leaving the engine, start a guest that was not resumed.

        Our guard does not any more: the backup may be told to run the VM (I3).

        Raises:
            LinkLost: a guard has let it go already.
        """
        ...
