"""What QEMU said last: whether its own end is behind an error of a session's."""

from __future__ import annotations

from contextlib import suppress

import trio

from curling_fd.errors import GuestEnded, QemuDied, QmpError
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.service.stops import how_it_ended

#: Seconds after the capture broke off within which QEMU's own end explains it.
_PATIENCE = 1.0


async def explain(qmp: QmpClient, events: EventStream, error: Exception, known: str | None) -> None:
    """Look whether QEMU's end is behind `error`, and raise that instead.

    Args:
        known: how the guest ended, if an event has said so already.
    """
    if known is not None:
        raise GuestEnded(known) from error
    with trio.move_on_after(_PATIENCE), suppress(QmpError):
        await qmp.status()  # what happened before comes before the answer
    with suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:
            ended = how_it_ended(events.receive_nowait())
            if ended is not None:
                raise GuestEnded(ended) from error
    if qmp.disconnected.is_set():
        raise QemuDied() from error
