"""The replicated disks of a VM where it runs: their mirror, from its first session to the last."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.inventory import Disk
from curling_fd.errors import QmpError
from curling_fd.failover.states import State
from curling_fd.qmp.client import QmpClient, open_qmp
from curling_fd.service.mirror import DiskMirror, MirrorLeft, sweep
from curling_fd.service.record import VmRecord


class VmDisks:
    """Of the VM of `record`.

    A mirror is kept from one session to the next, so that what is written between them is known; it is given
    up when it is broken, when the disks or their QEMU are others, and when nobody wants the VM protected.
    """

    def __init__(self, record: VmRecord) -> None:
        self._record = record
        self._mirror: DiskMirror | None = None
        self._next_basis = secrets.token_hex(16)
        record.disks.append(self._show)

    def _show(self) -> list[dict[str, Any]]:
        mirror = self._mirror
        if mirror is None:
            return []
        if mirror.log.statistics().logging:
            state = "copying" if self._record.state is State.SYNCING else "replicated"
            return [disk.show(disk.path, state) for disk in mirror.disks]
        dirty = [bitmap.dirty_bytes() for bitmap in mirror.log.dirty()]
        return [
            disk.show(disk.path, "tracked", marked) for disk, marked in zip(mirror.disks, dirty, strict=True)
        ]

    def basis(self, pid: int, disks: Sequence[Disk]) -> str:
        """Of the log that the next mirror of `disks` of that QEMU will have."""
        if self._mirror is not None and self._mirror.fits(pid, disks):
            return self._mirror.log.basis
        return self._next_basis

    def inherit(self, left: MirrorLeft | None, fds: Mapping[str, int]) -> DiskMirror | None:
        """Go on with the mirrors that the daemon before us has `left`, if any."""
        if left is not None:
            self._mirror = DiskMirror.inherit(self._directory(), left, fds, self._record.host.nursery)
        return self._mirror

    def _directory(self) -> Path:
        """Where the disks are read; no VM's name begins with a dot."""
        directory = Path(self._record.host.config.runtime_directory) / ".disks"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory / self._record.name

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
        basis, self._next_basis = self._next_basis, secrets.token_hex(16)
        log = DiskLog(sizes, config.disk_log_limit, config.buffers + 1, basis)
        nursery = self._record.host.nursery
        self._mirror = DiskMirror(self._directory(), disks, log, qmp.pid, nursery)
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

    def forget(self) -> None:
        """The mirror was left to the next daemon."""
        self._mirror = None

    async def _free(self) -> None:
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            with trio.CancelScope(shield=True):
                await mirror.close()
