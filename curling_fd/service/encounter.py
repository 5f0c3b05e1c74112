"""How a session begins, between the primary and the other host: a link to a peer whose standby waits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from curling_fd.failover.arbiter import FileArbiter
from curling_fd.link.transport import FrameLink
from curling_fd.service.examine import Examined
from curling_fd.service.greeting import define, dial, greet
from curling_fd.service.record import VmRecord


@asynccontextmanager
async def greeted(
    record: VmRecord, examined: Examined, basis: str, sure: bool, became_sure: Callable[[], None]
) -> AsyncIterator[tuple[FrameLink, tuple[bool, ...]]]:
    """A link to the peer of the VM of `record`, on which its standby waits; closed after the block.

    Beside it, for each disk, whether the copy there is known by `basis`.

    Args:
        basis: of the log of the VM's disks.
        sure: no backup of an earlier session may take the VM over.
        became_sure: called when that is so from now on.

    Raises:
        CurlingError: why there is none.
    """
    config = record.config
    assert config.peer is not None
    if record.wanted and record.arbiter.automatic and not sure:
        # The daemon before us may have left a replica that the backup may run any moment.
        await record.swap(incumbent=True)
        became_sure()
    link = await dial(config.peer, record.host.config.insecure)
    try:
        known = await greet(link, record.host.name, record.name, record.generation)
        await record.claim(known)
        became_sure()
        token = None
        if isinstance(record.arbiter, FileArbiter):
            token = await record.arbiter.leave_token(record.name)
        try:
            alike = await define(link, record.generation, examined, config, token, basis)
        finally:
            if isinstance(record.arbiter, FileArbiter) and token is not None:
                await record.arbiter.remove_token(token)
        record.remember(fenced=None, elsewhere=False)
        yield link, alike
    finally:
        link.close()
