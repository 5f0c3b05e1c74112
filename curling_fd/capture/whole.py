"""The engines `snapshot` and `precopy`: whole migrations over and over, made incremental on our side.

`snapshot` asks for a background snapshot: QEMU stops the guest for a moment and writes an image of that
moment while the guest runs on. `precopy` is the RFC's own way: a plain live migration, after which the guest
is told to go on. Either way all of memory comes at each checkpoint; what differs from the last image is kept
and shipped, encoded as QEMU would have.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from curling_fd.capture.engine import Description, EngineLeft, EngineOptions, Inherited, PassSink
from curling_fd.capture.guarding import guarded, hang_up, let_go, prefixed, without
from curling_fd.capture.intake import PassIntake
from curling_fd.capture.limit import limited_pass
from curling_fd.capture.reader import Captured, OnBoundary, migration_socketpair, set_receive_timeout
from curling_fd.capture.recover import free_guest, let_go_on, until_no_migration
from curling_fd.capture.settings import Before, migration_settings, put_back, set_capabilities
from curling_fd.errors import CheckpointTimeout, CheckpointTooLarge, EngineFailed, QmpError
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.system.buffers import Buffer
from curling_fd.system.guard import Guard
from curling_fd.system.nursery import open_nursery
from curling_fd.vmstate.image import ZERO_PAGE, RamImage
from curling_fd.vmstate.ram import fill_bytes, page_addresses
from curling_fd.vmstate.records import (
    PAGE_SIZE,
    PAGE_STRIDE,
    Block,
    BlockTable,
    DeviceState,
    Event,
    FillRun,
    PageRun,
    RamLayout,
    SectionType,
)
from curling_fd.vmstate.restore import RamSectionWriter
from curling_fd.vmstate.scanner import Scanner

_FD_NAME = "curling-migration"

#: Bytes read from QEMU at a time.
_CHUNK = 4 << 20

#: Bytes of device state believed.
_MAX_DEVICE_STATE = 256 << 20

#: Seconds QEMU may be silent in the middle of a migration; a guest with much memory and a slow
#: accelerator pauses between the rounds of a pass.
_SILENCE = 10.0

#: Seconds for QEMU to finish a migration after its last byte.
_FINISH = 10.0

#: The will of a daemon that dies while a migration has the guest stopped.
_CONTINUE = (
    b'{"execute":"query-migrate","id":"curling-guard-status"}\r\n{"execute":"cont","id":"curling-guard"}\r\n'
)


class LastImage:
    """What the backup has: an image of every RAM block as last shipped."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._buffers: list[Buffer] = []
        self._images: dict[str, RamImage] = {}

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(self._blocks)

    def fds(self) -> dict[str, int]:
        """The memfds of the images, borrowed; in the order of `blocks`."""
        return {f"image{index}": buffer.fd for index, buffer in enumerate(self._buffers)}

    def add(self, block: Block, fd: int | None = None) -> None:
        """Keep an image of `block`: empty, or the one in the memfd `fd`, owned from here on."""
        size = -(-block.size // PAGE_SIZE) * PAGE_SIZE
        self._blocks.append(block)
        self._buffers.append(buffer := Buffer(f"curling-last-{block.name}", size, prefault=0, fd=fd))
        self._images[block.name] = RamImage(buffer.view, fresh=fd is None)

    def observe(self, view: memoryview, events: Iterable[Event]) -> None:
        """Take over everything in `events`, which lies in `view`."""
        for event in events:
            if isinstance(event, BlockTable):
                for block in event.blocks:
                    self.add(block)
            elif isinstance(event, PageRun | FillRun):
                self._images[event.block.name].apply(view, event)

    def changed(self, view: memoryview, run: PageRun | FillRun, writer: RamSectionWriter) -> int:
        """Write the pages of `run` that differ from the image, and take them over; returns their number."""
        image = self._images[run.block.name]
        count = 0
        for address, page in _pages(view, run):
            # As bytes: memoryviews compare item by item.
            if page != image.page(address):
                if page == ZERO_PAGE:
                    writer.zero(run.block, address)
                else:
                    writer.page(run.block, address, page)
                image.write(address, page)
                count += 1
        return count

    def close(self) -> None:
        self._images.clear()
        for buffer in self._buffers:
            buffer.close()


def _pages(view: memoryview, run: PageRun | FillRun) -> Iterable[tuple[int, bytes]]:
    addresses = page_addresses(view, run)
    if isinstance(run, PageRun):
        data = run.data
        for address in addresses:
            yield address, bytes(view[data : data + PAGE_SIZE])
            data += PAGE_STRIDE
    else:
        for address, byte in zip(addresses, fill_bytes(view, run), strict=True):
            yield address, bytes([byte]) * PAGE_SIZE if byte else ZERO_PAGE


class WholeEngine:
    """Made by `open_whole` and `inherit_whole`. Borrows the monitor."""

    def __init__(
        self, name: str, qmp: QmpClient, options: EngineOptions, guard: Guard, before: Before
    ) -> None:
        self.name = name
        self._qmp = qmp
        self._options = options
        self._guard = guard
        self._image = LastImage()
        self._chunk = Buffer("curling-chunk", _CHUNK)
        self._layout: RamLayout | None = None
        self._before = before
        self.kept = False
        self.left = False

    async def first_pass(self, sink: PassSink) -> Description:
        description: Description | None = None

        async def receive(sock: socket.socket) -> None:
            nonlocal description
            observe = self._image.observe
            intake = PassIntake(self.name, sock, limited, ends_with_socket=True, observe=observe)
            description = await intake.run()

        limit = None if self.name == "snapshot" else self._options.pass_limit
        async with limited_pass(self._qmp, sink, limit) as limited:
            await self._migrate(receive, resume=True)
        assert description is not None
        self._layout = description.layout
        return description

    def inherit(self, inherited: Inherited) -> None:
        """Go on where another engine has left."""
        self._layout = inherited.left.layout
        for index, block in enumerate(inherited.left.images):
            self._image.add(block, inherited.fds[f"image{index}"])

    def hold(self, paused: bool) -> None:
        self._guard.hold(paused)

    def leave(self) -> tuple[EngineLeft, dict[str, int]]:
        assert self._layout is not None, "leave before first_pass"
        self._guard.leave()
        self.left = True
        left = EngineLeft(self._layout, None, self._before, images=self._image.blocks)
        return left, {**self._image.fds(), **prefixed("guard.", self._guard.fds)}

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def checkpoint(
        self, buffer: Buffer, on_boundary: OnBoundary | None = None, *, resume: bool = True
    ) -> Captured:
        captured: Captured | None = None

        async def receive(sock: socket.socket) -> None:
            nonlocal captured
            captured = await trio.to_thread.run_sync(self._take, sock, buffer)

        if not resume and self.name == "snapshot":
            # A background snapshot lets the guest go on by itself; a plain migration does not.
            await set_capabilities(self._qmp, {"background-snapshot": False})
        await self._migrate(receive, resume=resume, on_boundary=on_boundary)
        assert captured is not None
        return captured

    async def ask_every(self, seconds: float) -> None:
        await trio.lowlevel.checkpoint()  # it never asks

    async def resume(self) -> None:
        self.kept = False
        await let_go_on(self._qmp)

    def keep_stopped(self) -> None:
        self._guard.retire()
        if self._guard.acted:
            raise let_go()
        self.kept = True

    def close(self) -> None:
        self._image.close()
        self._chunk.close()

    async def _migrate(
        self,
        receive: Callable[[socket.socket], Awaitable[None]],
        *,
        resume: bool,
        on_boundary: OnBoundary | None = None,
    ) -> None:
        """One migration, its stream given to `receive`; it counts only if QEMU says so too."""
        # A background snapshot stops the guest at its beginning and lets it go on by itself. What the guest
        # sends before that is of this epoch, and what it sends after must not be taken for it.
        early = self.name == "snapshot" and resume
        ours, theirs = migration_socketpair()
        try:
            with self._qmp.events() as events:
                await self._qmp.hand_over(_FD_NAME, theirs.fileno())
                theirs.close()
                self._guard.cut(ours)
                if on_boundary is not None and early:
                    await trio.to_thread.run_sync(_whole, on_boundary)
                self._guard.arm()
                await self._qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
                async with open_nursery() as nursery:
                    nursery.start_soon(receive, ours)
                    await self._completed(events)
                    if on_boundary is not None and not early:
                        await trio.to_thread.run_sync(_whole, on_boundary)
                if resume:
                    await let_go_on(self._qmp)
                    self._guard.disarm()
        finally:
            hang_up(ours)
            theirs.close()

    async def _completed(self, events: EventStream) -> None:
        async for event in events:
            if event.name == "MIGRATION":
                status = event.data.get("status")
                if status == "completed":
                    return
                if status in ("failed", "cancelled"):
                    raise EngineFailed(self.name, await self._failure(str(status)))
        raise EngineFailed(self.name, "QEMU went away during a migration")

    async def _failure(self, status: str) -> str:
        answer = await self._qmp.execute("query-migrate")
        return f"the migration {status}: {answer.get('error-desc', 'QEMU gives no reason')}"

    def _take(self, sock: socket.socket, buffer: Buffer) -> Captured:
        """Read a whole migration from `sock`, keeping what changed. Runs in a thread."""
        assert self._layout is not None, "checkpoint before first_pass"
        set_receive_timeout(sock, _SILENCE)
        started = time.perf_counter()
        boundary_us = time.time_ns() // 1000
        view = self._chunk.view
        scanner = Scanner.for_pass(check_addresses=True)
        writer = RamSectionWriter(buffer.view, self._layout, SectionType.END)
        device = bytearray()
        have = pages = 0
        while count := self._receive(sock, view, have):
            have += count
            position = scanner.scan(view, 0, have)
            in_device_state = scanner.device_state_offset is not None
            for event in scanner.drain():
                if isinstance(event, PageRun | FillRun):
                    pages += self._image.changed(view, event, writer)
                elif isinstance(event, BlockTable) and event.blocks != self._layout.blocks:
                    raise EngineFailed(self.name, "the guest's RAM blocks changed")
                elif isinstance(event, DeviceState):
                    device += view[event.offset : position]
                    in_device_state = False
            if in_device_state:
                device += view[:position]
            if len(device) > _MAX_DEVICE_STATE:
                raise EngineFailed(self.name, f"more than {_MAX_DEVICE_STATE} bytes of device state")
            view[: have - position] = view[position:have]
            have -= position
        if not device:
            raise EngineFailed(self.name, "the migration ended before its device state")
        ram = writer.close() + 1
        if ram + len(device) > buffer.capacity:
            raise CheckpointTooLarge(buffer.capacity)
        buffer.view[ram - 1] = SectionType.END_OF_VM_STATE
        buffer.view[ram : ram + len(device)] = device
        return Captured(buffer, ram, len(device), pages, boundary_us, time.perf_counter() - started)

    def _receive(self, sock: socket.socket, view: memoryview, have: int) -> int:
        try:
            return sock.recv_into(view[have:])
        except BlockingIOError:
            raise CheckpointTimeout(_SILENCE, "QEMU's migration stream") from None


@asynccontextmanager
async def open_whole(name: str, qmp: QmpClient, options: EngineOptions) -> AsyncIterator[WholeEngine]:
    """Prepare QEMU for whole migrations; on leaving, see the guest run.

    Should this process die or freeze while a migration is under way, a guard process lets the guest go on.

    Raises:
        LinkLost: instead of what followed from it, when the guard did.
    """
    snapshots = name == "snapshot"
    capabilities = {"events": True, "background-snapshot": snapshots}
    async with (
        migration_settings(qmp, capabilities) as before,
        guarded(qmp, options.will + _CONTINUE, name, snapshots=snapshots) as guard,
        _until_the_guest_runs_on(qmp, WholeEngine(name, qmp, options, guard, before)) as engine,
    ):
        yield engine


@asynccontextmanager
async def inherit_whole(
    name: str, qmp: QmpClient, options: EngineOptions, inherited: Inherited
) -> AsyncIterator[WholeEngine]:
    """`open_whole`, but with what another engine has left; the first pass is done.

    Raises:
        LinkLost: as there.
        EngineFailed: the guard is gone.
    """
    before, guard_fds = inherited.left.before, without("guard.", inherited.fds)
    try:
        async with (
            guarded(
                qmp, options.will + _CONTINUE, name, snapshots=name == "snapshot", inherited=guard_fds
            ) as guard,
            _until_the_guest_runs_on(qmp, WholeEngine(name, qmp, options, guard, before)) as engine,
        ):
            engine.inherit(inherited)
            yield engine
    finally:
        with trio.CancelScope(shield=True):
            await put_back(qmp, before)


@asynccontextmanager
async def _until_the_guest_runs_on(qmp: QmpClient, engine: WholeEngine) -> AsyncIterator[WholeEngine]:
    try:
        yield engine
    finally:
        with trio.CancelScope(shield=True):
            if not engine.kept and not engine.left:
                await _end(qmp)
        engine.close()


async def _end(qmp: QmpClient) -> None:
    """See that no migration is left and the guest is not stopped because of one."""
    try:
        free_guest(qmp)  # QEMU itself may wait with it
        with trio.move_on_after(_FINISH), qmp.events() as events:
            await qmp.execute("migrate_cancel")
            await until_no_migration(qmp, events)
            free_guest(qmp)
            await let_go_on(qmp)
    except QmpError:
        pass  # QEMU is gone, or refuses to cancel what is over


def _whole(on_boundary: OnBoundary) -> None:
    """Both halves at once: here the guest stands still for long enough anyway."""
    finish = on_boundary()
    if finish is not None:
        finish()
