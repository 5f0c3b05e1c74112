"""The engine `incremental`: QEMU's own COLO checkpoint loop, with us as the peer.

After one live pass over all memory QEMU sends, at each checkpoint, the pages dirtied since the last one and
the whole device state, and waits for our answer. Nothing is patched; the peer need not be a QEMU. The
messages are in `colo`, the pass and the loop as a sequence diagram in docs/protocol.md.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from curling_fd.capture import colo
from curling_fd.capture.colo import Message
from curling_fd.capture.engine import Description, EngineLeft, EngineOptions, Inherited, PassSink
from curling_fd.capture.guarding import guarded, hang_up, let_go, prefixed, without
from curling_fd.capture.intake import PassIntake
from curling_fd.capture.limit import limited_pass
from curling_fd.capture.probe import Choice
from curling_fd.capture.reader import Captured, CheckpointReader, OnBoundary, migration_socketpair
from curling_fd.capture.recover import let_go_on, recover
from curling_fd.capture.settings import Before, migration_settings, put_back
from curling_fd.capture.tcg import report_all_writes
from curling_fd.errors import EngineFailed, QmpError
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.system.buffers import Buffer
from curling_fd.system.guard import LOST_HEARTBEAT, Guard

_NAME = "incremental"
_FD_NAME = "curling-migration"

#: Seconds after its delay within which QEMU asks for the next checkpoint.
_LATE = 1.0


class IncrementalEngine:
    """Made by `open_incremental` and `inherit_incremental`. Borrows monitor and migration socket."""

    name = _NAME

    def __init__(
        self,
        qmp: QmpClient,
        choice: Choice,
        options: EngineOptions,
        sock: socket.socket,
        guard: Guard,
        before: Before,
    ) -> None:
        self._qmp = qmp
        self._choice = choice
        self._options = options
        self._socket = sock
        self._guard = guard
        self._before = before
        self._reader: CheckpointReader | None = None
        self._requested = False
        self._delay_ms = options.request_delay_ms
        self.kept = False
        self.left = False

    async def first_pass(self, sink: PassSink) -> Description:
        async with limited_pass(self._qmp, sink, self._options.pass_limit) as limited:
            return await self._first_pass(limited)

    async def _first_pass(self, sink: PassSink) -> Description:
        with self._qmp.events() as events:
            self._guard.arm()  # the pass ends with the guest stopped
            await self._qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
            if self._choice.return_path:
                self._socket.send(colo.RETURN_PATH_SHUT)
            intake = PassIntake(_NAME, self._socket, sink)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, events, intake)
                description = await intake.run()
        self._reader = CheckpointReader(
            self._socket, description.layout, description.last_block, self._options.stop_limit
        )
        if self._choice.accelerator == "tcg":
            await report_all_writes(self._qmp)
        self._socket.send(colo.encode(Message.CHECKPOINT_READY))
        self._guard.disarm()
        return description

    async def _watch(self, events: EventStream, intake: PassIntake) -> None:
        async for event in events:
            if event.name == "MIGRATION":
                status = event.data.get("status")
                if status == "colo":
                    # QEMU wrote all of the pass before it said so: what the socket holds now is the rest.
                    intake.end()
                    return
                if status in ("completed", "failed", "cancelled"):
                    raise EngineFailed(_NAME, f"the migration ended `{status}` instead of entering COLO")
        raise EngineFailed(_NAME, "QEMU went away during the first pass")

    def inherit(self, left: EngineLeft) -> None:
        """Go on where another engine has left."""
        self._reader = CheckpointReader(self._socket, left.layout, left.last_block, self._options.stop_limit)
        self._requested = left.requested

    def hold(self, paused: bool) -> None:
        self._guard.hold(paused)

    def leave(self) -> tuple[EngineLeft, dict[str, int]]:
        assert self._reader is not None, "leave before first_pass"
        self._guard.leave()
        self.left = True
        left = EngineLeft(self._reader.layout, self._reader.last_block, self._before, self._requested)
        return left, {"migration": self._socket.fileno(), **prefixed("guard.", self._guard.fds)}

    async def ready(self) -> None:
        if self._requested:
            await trio.lowlevel.checkpoint()
            return
        while not await self._asked():
            # QEMU counts the time until it asks with the host's clock, and waits for an hour if that is set
            # back by one. Being told the delay makes it ask at once.
            await self._qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": self._delay_ms})
        request = self._socket.recv(colo.MESSAGE_SIZE, socket.MSG_WAITALL)
        if not request:
            raise EngineFailed(_NAME, "QEMU closed the migration")
        colo.expect(request, Message.CHECKPOINT_REQUEST)
        self._requested = True

    async def _asked(self) -> bool:
        with trio.move_on_after(self._delay_ms / 1000 + _LATE) as scope:
            await trio.lowlevel.wait_readable(self._socket)
        return not scope.cancelled_caught

    async def checkpoint(
        self, buffer: Buffer, on_boundary: OnBoundary | None = None, *, resume: bool = True
    ) -> Captured:
        reader = self._reader
        assert reader is not None, "checkpoint before first_pass"

        # What QEMU tells of the stop would wake our event loop meanwhile, and the thread that takes the
        # checkpoint would wait for the interpreter: some 0.2 ms.
        async with self._qmp.unread():
            self._requested = False
            self._guard.arm()
            captured = await trio.to_thread.run_sync(partial(reader.take, buffer, on_boundary, resume=resume))
        if resume:
            self._guard.disarm()
        # Else, and after a failure, the guest stands still until leaving the engine has let it go.
        return captured

    async def ask_every(self, seconds: float) -> None:
        self._delay_ms = max(1, int(seconds * 1000))
        await self._qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": self._delay_ms})

    async def resume(self) -> None:
        assert self._reader is not None
        self.kept = False
        with suppress(OSError):  # QEMU went: leaving the engine finds out
            self._reader.release()
        self._guard.disarm()

    def keep_stopped(self) -> None:
        self._guard.retire()
        if self._guard.acted:
            raise let_go()
        self.kept = True


@asynccontextmanager
async def open_incremental(
    qmp: QmpClient, choice: Choice, options: EngineOptions
) -> AsyncIterator[IncrementalEngine]:
    """Prepare QEMU for checkpoints; on leaving, end them and see the guest run.

    Should this process die or freeze in between, a guard process ends them.

    Raises:
        LinkLost: instead of what followed from it, when the guard did.
    """
    ours, theirs = migration_socketpair()
    capabilities = {"events": True, "x-colo": True}
    if choice.return_path:
        capabilities["return-path"] = True
    parameters = {"x-checkpoint-delay": options.request_delay_ms}
    try:
        async with migration_settings(qmp, capabilities, parameters) as before:
            await qmp.hand_over(_FD_NAME, theirs.fileno())
            theirs.close()
            async with guarded(qmp, options.will + LOST_HEARTBEAT, _NAME) as guard:
                guard.cut(ours)
                engine = IncrementalEngine(qmp, choice, options, ours, guard, before)
                async with _until_the_guest_runs_on(qmp, engine, ours):
                    yield engine
    finally:
        ours.close()
        theirs.close()


@asynccontextmanager
async def inherit_incremental(
    qmp: QmpClient, choice: Choice, options: EngineOptions, inherited: Inherited
) -> AsyncIterator[IncrementalEngine]:
    """`open_incremental`, but with what another engine has left; the first pass is done.

    Raises:
        LinkLost: as there.
        EngineFailed: the guard is gone, and with it the checkpoint loop.
    """
    left, fds = inherited.left, inherited.fds
    with socket.socket(fileno=fds["migration"]) as ours:
        try:
            async with guarded(
                qmp, options.will + LOST_HEARTBEAT, _NAME, inherited=without("guard.", fds)
            ) as guard:
                engine = IncrementalEngine(qmp, choice, options, ours, guard, left.before)
                engine.inherit(left)
                async with _until_the_guest_runs_on(qmp, engine, ours):
                    yield engine
        finally:
            with trio.CancelScope(shield=True):
                await put_back(qmp, left.before)


@asynccontextmanager
async def _until_the_guest_runs_on(
    qmp: QmpClient, engine: IncrementalEngine, ours: socket.socket
) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if not engine.left:
            hang_up(ours)
        # Without QEMU there is no session.
        with trio.CancelScope(shield=True), suppress(QmpError):
            if not engine.kept and not engine.left:
                await recover(qmp)
                # A build whose COLO is broken has completed a migration instead.
                await let_go_on(qmp)
