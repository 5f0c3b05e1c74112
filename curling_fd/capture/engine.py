"""What an engine is: a way to get checkpoints out of an unpatched QEMU.

An engine is used as

    async with open_engine(choice, qmp, options, guard) as engine:
        await engine.first_pass(sink)
        while ...:
            captured = await engine.checkpoint(buffer)

and leaves the guest running, unprotected, however the block is left (I5): unless `leave` was called between
two checkpoints, so that the daemon after us goes on with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from attrs import frozen

from curling_fd.capture.reader import Captured, OnBoundary
from curling_fd.capture.settings import UNTHROTTLED, Before
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import Block, RamLayout

#: Times the guest's memory that a first pass may send before its limit is raised.
_FREE = 2


@frozen
class Description:
    """What of a migration never changes between its checkpoints.

    Attributes:
        layout: the RAM blocks and how the stream names their section.
        last_block: the block of the first pass's last page.
    """

    layout: RamLayout
    last_block: str | None


@frozen
class EngineLeft:
    """An engine between two checkpoints, for the one that goes on in its place; descriptors go beside it.

    Attributes:
        before: QEMU's settings before ours.
        requested: QEMU waits for the answer to a checkpoint request that was read.
        images: of what was shipped last; their memfds are `image0`, `image1`, ...
    """

    layout: RamLayout
    last_block: str | None
    before: Before
    requested: bool = False
    images: tuple[Block, ...] = ()


@frozen
class Inherited:
    """What another engine has left, with the descriptors of that by name, which are owned."""

    left: EngineLeft
    fds: Mapping[str, int]


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
class PassLimit:
    """How fast a first pass may be.

    A guest that writes faster would keep a pass going for ever, and stay unprotected. So the limit is for
    `_FREE` times the memory, and is doubled with every further memory's worth of bytes.

    Attributes:
        bandwidth: bytes a second.
        memory: bytes of the guest's memory.
        raised: called with the new limit when the guest writes too fast for the one before.
    """

    bandwidth: int
    memory: int
    raised: Callable[[int], None]

    def after(self, sent: int) -> int:
        """The limit, in bytes a second, once `sent` bytes are."""
        doublings = max(0, sent // max(self.memory, 1) - _FREE + 1)
        return min(self.bandwidth << min(doublings, 40), UNTHROTTLED)


@frozen
class EngineOptions:
    """How an engine shall work.

    Attributes:
        request_delay_ms: shortest pause between two checkpoint requests of QEMU.
        stop_limit: seconds the guest may stand still for one checkpoint.
        pass_limit: how fast the first pass may be. The engine `snapshot` has no use for one: its guest waits
            for each page it writes to be sent first, and would wait longer.
        will: commands for QEMU for when this daemon dies or stands still, before its guest goes on.
    """

    request_delay_ms: int
    stop_limit: float
    pass_limit: PassLimit | None = None
    will: bytes = b""


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
        self, buffer: Buffer, on_boundary: OnBoundary | None = None, *, resume: bool = True
    ) -> Captured:
        """Take a checkpoint into `buffer`. With `resume=False` the guest stays stopped afterwards.

        What the guest sends before `on_boundary` is called, in a thread, is sent before the checkpoint.
        """
        ...

    async def resume(self) -> None:
        """Let the guest go on after a checkpoint taken with `resume=False`."""
        ...

    async def ask_every(self, seconds: float) -> None:
        """From now on QEMU may ask for checkpoints that often."""
        ...

    def hold(self, paused: bool) -> None:
        """An operator has `paused` the guest: should this daemon die, it is to stand still all the same."""
        ...

    def leave(self) -> tuple[EngineLeft, dict[str, int]]:
        """Between two checkpoints: let leaving the block leave all as it is.

        Returns:
            What the next engine needs, and the descriptors for it, borrowed until the block is left.
        """
        ...

    def keep_stopped(self) -> None:
        """Let nothing but `resume`, or leaving the engine, start a guest that was not resumed.

        Our guard does not any more: the backup may be told to run the VM (I3).

        Raises:
            LinkLost: a guard has let it go already.
        """
        ...
