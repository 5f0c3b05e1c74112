"""The replicated disks of a VM where it runs: their mirror, from its first session to the last."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.inventory import Disk
from curling_fd.errors import QmpError
from curling_fd.qmp.client import QmpClient, open_qmp
from curling_fd.service.mirror import DiskMirror, sweep
from curling_fd.service.record import VmRecord


class VmDisks:
    """Of the VM of `record`.

    A mirror is kept from one session to the next, so that what is written between them is known; it is given
    up when it is broken, when the disks or their QEMU are others, and when nobody wants the VM protected.
    """

    def __init__(self, record: VmRecord) -> None:
        self._record = record
        self._mirror: DiskMirror | None = None

    @property
    def replicated(self) -> bool:
        """Whether there are any."""
        return self._mirror is not None

    async def mirror(self, qmp: QmpClient, disks: Sequence[Disk]) -> DiskMirror | None:
        """A mirror of `disks` for a session; None where there are none.

        Raises:
            DiskUnfit: QEMU does not mirror one of them.
        """
        mirror = self._mirror
        if mirror is not None and mirror.fits(qmp.pid, disks):
            return mirror
        if mirror is not None:
            await self._free()
        await sweep(qmp)  # also what the daemon before us has left
        if not disks:
            return None
        config = self._record.config
        sizes = [disk.size for disk in disks]
        log = DiskLog(sizes, config.disk_log_limit, config.buffers + 1, secrets.token_hex(16))
        runtime = Path(self._record.host.config.runtime_directory)
        # No VM's name begins with a dot.
        directory = runtime / ".disks" / self._record.name
        self._mirror = DiskMirror(directory, disks, log, qmp.pid, self._record.host.nursery)
        try:
            await self._mirror.attach(qmp)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._free()
            raise
        return self._mirror

    async def end(self) -> None:
        """Nobody wants to know any more what the guest writes: QEMU is to mirror nothing."""
        if self._mirror is None:
            return
        if self._record.qmp is not None:
            with trio.CancelScope(shield=True), suppress(QmpError):
                async with open_qmp(self._record.qmp) as qmp:
                    await self._mirror.detach(qmp)
        await self._free()

    async def _free(self) -> None:
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            with trio.CancelScope(shield=True):
                await mirror.close()
