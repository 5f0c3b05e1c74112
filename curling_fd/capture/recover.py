"""Ending whatever checkpointing is under way, ours or that of a daemon that died: the guest runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import trio

from curling_fd.capture.settings import capabilities, set_capabilities
from curling_fd.errors import (
    CheckpointTimeout,
    EngineFailed,
    GuestEnded,
    MigrationBlocked,
    QmpCommandFailed,
    QmpError,
)
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.system.privileges import raised
from curling_fd.system.userfault import release

#: Seconds for QEMU to end what was under way.
_TIMEOUT = 10.0

#: Capabilities we turn on, and a daemon that died could not turn off again.
_OURS = ("x-colo", "background-snapshot")

#: Run states in which the guest stands still for a reason of its own or an operator's, not for a checkpoint.
_STANDS = ("paused", "guest-panicked", "io-error", "watchdog")

#: Pause between two `cont` while QEMU finishes a migration, in seconds.
_AGAIN = 0.001

_UNDER_WAY = ("setup", "active", "device", "pre-switchover", "cancelling", "failing", "colo")


async def recover(qmp: QmpClient, *, ours: bool = True) -> None:
    """End a checkpoint loop or a migration in whatever state it is; nothing happens where there is none.

    QEMU starts the guest at the end of its checkpoint loop. One that stood still before stands still again.

    Args:
        ours: a migration that is under way is ours to end. A checkpoint loop always is.

    Raises:
        MigrationBlocked: an administrator's migration is under way.
        CheckpointTimeout: QEMU did not end it.
        EngineFailed: a snapshot has left the guest waiting, and we cannot help it.
    """
    free_guest(qmp)  # QEMU itself may wait with it
    with qmp.events() as events, qmp.events() as starts:
        state = await qmp.status()
        status = (await qmp.execute("query-migrate")).get("status")
        with trio.move_on_after(_TIMEOUT) as scope:
            if status == "colo":
                await qmp.execute("x-colo-lost-heartbeat")
            elif status in _UNDER_WAY and ours:
                await qmp.execute("migrate_cancel")
            elif status in _UNDER_WAY:
                raise MigrationBlocked(("another migration of the VM is under way",))
            await until_no_migration(qmp, events)
            if status == "colo" and state in (*_STANDS, "colo"):
                async for event in starts:
                    if event.name == "RESUME":
                        break
                if state in _STANDS:
                    await qmp.execute("stop")
    if scope.cancelled_caught:
        raise CheckpointTimeout(_TIMEOUT, "QEMU to end an earlier migration")
    free_guest(qmp)
    known = await capabilities(qmp)
    await set_capabilities(qmp, {name: False for name in _OURS if known.get(name)})


async def stand_still(qmp: QmpClient) -> None:
    """Stop a guest again that was started by the end of the checkpoints, and must not be."""
    deadline = trio.current_time() + _TIMEOUT
    with trio.CancelScope(deadline=deadline, shield=True), suppress(QmpError), qmp.events() as events:
        if await qmp.status() == "colo":  # just about to be started
            async for event in events:
                if event.name == "RESUME":
                    break
        if await qmp.status() == "running":
            await qmp.execute("stop")


@asynccontextmanager
async def standing_still(qmp: QmpClient, paused: Callable[[], bool]) -> AsyncIterator[None]:
    """Leave a guest stopped that has ended or was `paused`, though the end of the checkpoints starts it."""
    ended = False
    try:
        yield
    except GuestEnded:
        ended = True
        raise
    finally:
        if ended or paused():
            await stand_still(qmp)


async def until_no_migration(qmp: QmpClient, events: EventStream) -> None:
    """Wait until no migration is under way. `events` was opened before what ends it was ordered."""
    while (await qmp.execute("query-migrate")).get("status") in _UNDER_WAY:
        async for event in events:
            if event.name == "MIGRATION":
                break


def free_guest(qmp: QmpClient) -> None:
    """Let the guest write to its memory again that a snapshot of no use any more has write-protected.

    Raises:
        EngineFailed: we must not.
    """
    try:
        with raised("CAP_SYS_PTRACE"):
            release(qmp.pid)
    except OSError as error:
        why = f"a snapshot that ended early left the guest waiting, and it cannot be freed: {error.strerror}"
        raise EngineFailed("snapshot", why) from None


async def let_go_on(qmp: QmpClient) -> None:
    """Let the guest go on that a migration of ours, now over, has stopped: as soon as QEMU takes it.

    Raises:
        CheckpointTimeout: QEMU did not finish the migration.
    """
    if await qmp.status() not in ("postmigrate", "finish-migrate"):
        return
    with trio.move_on_after(_TIMEOUT):
        while True:
            try:
                await qmp.execute("cont")
                return
            except QmpCommandFailed as error:
                if "finalized" not in error.description:
                    raise
            await trio.sleep(_AGAIN)
    raise CheckpointTimeout(_TIMEOUT, "QEMU to finish the migration")
