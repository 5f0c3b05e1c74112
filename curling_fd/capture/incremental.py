"""The engine `incremental`: QEMU's own COLO checkpoint loop, with us as the peer.

After one live pass over all memory QEMU sends, at each checkpoint, the pages dirtied since the last one and
the whole device state, and waits for our answer. Nothing is patched; the peer need not be a QEMU. The
messages are in `colo`, the pass and the loop as a sequence diagram in docs/protocol.md.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from curling_fd.capture import colo
from curling_fd.capture.colo import Message
from curling_fd.capture.engine import Description, EngineOptions, PassSink
from curling_fd.capture.guarding import guarded, hang_up, let_go
from curling_fd.capture.intake import PassIntake
from curling_fd.capture.probe import Choice
from curling_fd.capture.reader import Captured, CheckpointReader, migration_socketpair
from curling_fd.capture.recover import let_go_on, recover
from curling_fd.capture.settings import migration_settings
from curling_fd.capture.tcg import report_all_writes
from curling_fd.errors import EngineFailed, QmpError
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.system.buffers import Buffer
from curling_fd.system.guard import LOST_HEARTBEAT, Guard

_NAME = "incremental"
_FD_NAME = "curling-migration"


class IncrementalEngine:
    """Made by `open_incremental`. Borrows the monitor; owns its end of the migration socket."""

    name = _NAME

    def __init__(
        self, qmp: QmpClient, choice: Choice, options: EngineOptions, sock: socket.socket, guard: Guard
    ) -> None:
        self._qmp = qmp
        self._choice = choice
        self._options = options
        self._socket = sock
        self._guard = guard
        self._reader: CheckpointReader | None = None
        self.kept = False

    async def first_pass(self, sink: PassSink) -> Description:
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

    async def ready(self) -> None:
        await trio.lowlevel.wait_readable(self._socket)
        request = self._socket.recv(colo.MESSAGE_SIZE, socket.MSG_WAITALL)
        if not request:
            raise EngineFailed(_NAME, "QEMU closed the migration")
        colo.expect(request, Message.CHECKPOINT_REQUEST)

    async def checkpoint(
        self, buffer: Buffer, on_boundary: Callable[[], None] | None = None, *, resume: bool = True
    ) -> Captured:
        reader = self._reader
        assert reader is not None, "checkpoint before first_pass"

        # What QEMU tells of the stop would wake our event loop meanwhile, and the thread that takes the
        # checkpoint would wait for the interpreter: some 0.2 ms.
        async with self._qmp.unread():
            self._guard.arm()
            captured = await trio.to_thread.run_sync(partial(reader.take, buffer, on_boundary, resume=resume))
        if resume:
            self._guard.disarm()
        # Else, and after a failure, the guest stands still until leaving the engine has let it go.
        return captured

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
        async with migration_settings(qmp, capabilities, parameters):
            await qmp.hand_over(_FD_NAME, theirs.fileno())
            theirs.close()
            async with guarded(qmp, LOST_HEARTBEAT, _NAME) as guard:
                guard.cut(ours)
                try:
                    engine = IncrementalEngine(qmp, choice, options, ours, guard)
                    yield engine
                finally:
                    hang_up(ours)
                    # Without QEMU there is no session.
                    with trio.CancelScope(shield=True), suppress(QmpError):
                        if not engine.kept:
                            await recover(qmp)
                            # A build whose COLO is broken has completed a migration instead.
                            await let_go_on(qmp)
    finally:
        ours.close()
        theirs.close()
