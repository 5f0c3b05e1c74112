"""The guard of a capture: what lets the guest go on if this daemon dies or freezes."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import trio

from curling_fd.errors import CaptureError, EngineFailed, LinkLost, RemoteProtocolError
from curling_fd.qmp.client import QmpClient
from curling_fd.system.guard import LOST_HEARTBEAT, Guard, GuardFailed
from curling_fd.system.nursery import open_nursery

#: Seconds our event loop may stand still while the guest does; as long a silence makes the backup give us up.
FROZEN = 1.0


@asynccontextmanager
async def guarded(
    qmp: QmpClient,
    will: bytes,
    engine: str,
    *,
    snapshots: bool = False,
    inherited: Mapping[str, int] | None = None,
) -> AsyncIterator[Guard]:
    """A guard that writes `will` to the monitor when we are gone, or when it is armed and we stand still.

    Args:
        snapshots: background snapshots are taken, which must not leave the guest waiting.
        inherited: the descriptors of a guard for all this, left by `Guard.leave`, owned: it is taken up.

    Raises:
        EngineFailed: it did not start; without one no checkpoint is taken.
        LinkLost: the guard has let the guest go; raised instead of the failure of the capture that followed.
    """

    def start() -> Guard:
        if inherited is not None:
            return Guard.inherit(inherited["control"], inherited["page"], int(FROZEN * 1000))
        pid = qmp.pid if snapshots else 0
        loop = will.endswith(LOST_HEARTBEAT)  # whose end starts the guest
        deadline = int(FROZEN * 1000)
        return Guard.start_write(qmp.fileno(), will, deadline, snapshot_of=pid, starts_paused=loop)

    try:
        guard = await trio.to_thread.run_sync(start)
    except GuardFailed as error:
        raise EngineFailed(engine, str(error)) from None
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(guard.put_off)
            try:
                yield guard
            except (CaptureError, RemoteProtocolError) as error:
                if guard.acted:
                    raise let_go() from error
                raise
            finally:
                nursery.cancel_scope.cancel()
    finally:
        guard.retire()


def prefixed(prefix: str, fds: Mapping[str, int]) -> dict[str, int]:
    """`fds` with `prefix` before their names."""
    return {prefix + name: fd for name, fd in fds.items()}


def without(prefix: str, fds: Mapping[str, int]) -> dict[str, int]:
    """Those of `fds` whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): fd for name, fd in fds.items() if name.startswith(prefix)}


def let_go() -> LinkLost:
    """The error for a guest that a guard let go.

    To the backup a daemon that stood still is one that was lost: who may run the VM has to be settled anew.
    """
    return LinkLost(f"this daemon stood still for {FROZEN:g} s in a checkpoint, and the guest was let go")


def hang_up(sock: socket.socket) -> None:
    """Close `sock`, of which the guard has a duplicate, so that its peer sees the end."""
    with suppress(OSError):  # the peer may have gone first
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
