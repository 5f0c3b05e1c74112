"""QEMU's mirror of every replicated disk of a VM to an endpoint of ours: on the primary, across sessions.

Two commands make the mirror of a disk:

    blockdev-add     node `curling-disk0`: an NBD client on a socket that QEMU is handed
    blockdev-mirror  job `curling-disk0`: from the disk to it; new writes only, and write-blocking: a write of
                     the guest is done when it was done on the disk and then answered by the endpoint

A mirror outlives the session it was made for: without a backup its endpoint goes on answering, and the log it
writes to only marks what was written. When it breaks, or QEMU ends the job, the guest runs on with its disk;
the next session makes a new one, and compares everything.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from curling_fd.disk.endpoint import DiskEndpoint
from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.inventory import Disk
from curling_fd.errors import CurlingError, DiskLogFailed, DiskUnfit, QmpCommandFailed, QmpError
from curling_fd.nbd.server import Export
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.qmp.protocol import Event

#: What our jobs, nodes and exports in a QEMU are called, and a number.
_PREFIX = "curling-disk"

#: Seconds for QEMU to connect to an endpoint, and for a mirror that has nothing to copy to be ready.
_READY_TIMEOUT = 10.0

#: Seconds for a job that was cancelled to end.
_CANCEL_TIMEOUT = 10.0

#: Events of a job that has ended or failed.
_ENDINGS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR")


def ident(number: int) -> str:
    """What the job, the node and the export of that disk are called in QEMU."""
    return f"{_PREFIX}{number}"


def is_ours(name: str) -> bool:
    """Whether something in QEMU is called as our things are."""
    return name.startswith(_PREFIX)


class DiskMirror:
    """The mirrors of all `disks` of a VM, and the log they write to. Made by `open_mirror`.

    Args:
        directory: for the socket by which the disks are read, where only we may enter.
        nursery: where the endpoints are served.

    Attributes:
        pid: of the QEMU.
        broken: why it is of no more use.
    """

    def __init__(
        self, directory: Path, disks: Sequence[Disk], log: DiskLog, pid: int, nursery: trio.Nursery
    ) -> None:
        self.disks = tuple(disks)
        self.log = log
        self.pid = pid
        self.broken: str | None = None
        self._directory = directory
        self._nursery = nursery
        self._endpoints: list[DiskEndpoint] = []
        self._serving = 0
        self._idle = trio.Event()
        self._idle.set()
        self._ending = False

    @property
    def directory(self) -> Path:
        """Where the disks are read."""
        return self._directory

    def fits(self, pid: int, disks: Sequence[Disk]) -> bool:
        """Whether it can go on for these disks of that QEMU."""
        return self.broken is None and not self._ending and self.pid == pid and self.disks == tuple(disks)

    async def attach(self, qmp: QmpClient) -> None:
        """Have QEMU mirror to us; returns when every write of the guest goes through the endpoints.

        Raises:
            DiskUnfit: QEMU cannot; nothing of ours is left in it.
        """
        with qmp.events() as events:
            try:
                for number, disk in enumerate(self.disks):
                    try:
                        with trio.fail_after(_READY_TIMEOUT):
                            await self._attach(qmp, events, number, disk)
                    except trio.TooSlowError:
                        problem = f"QEMU did not begin to mirror it within {_READY_TIMEOUT:g} s"
                        raise DiskUnfit(disk.name, problem, "QEMU's own log may say why") from None
                    except QmpCommandFailed as error:
                        problem = f"QEMU cannot mirror it: {error.description.rstrip('.')}"
                        advice = "Take away what keeps it from that: a job on the disk, say"
                        raise DiskUnfit(disk.name, problem, advice) from None
            except BaseException:
                with trio.CancelScope(shield=True), suppress(QmpError):
                    await self.detach(qmp)
                raise

    async def _attach(self, qmp: QmpClient, events: EventStream, number: int, disk: Disk) -> None:
        name = ident(number)
        ours, theirs = socket.socketpair()
        with theirs:
            self._serve_soon(ours, number, disk)
            await qmp.hand_over(name, theirs.fileno())
        node = {"driver": "nbd", "node-name": name, "server": {"type": "fd", "str": name}, "export": name}
        await qmp.execute("blockdev-add", node)
        job = {
            "job-id": name,
            "device": disk.node,
            "target": name,
            "sync": "none",
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
        }
        await qmp.execute("blockdev-mirror", job)
        async for event in events:
            if event.data.get("device") == name:
                if event.name == "BLOCK_JOB_READY":
                    return
                if event.name in _ENDINGS:
                    break
        raise DiskUnfit(disk.name, "QEMU's mirror of it ended at once", "QEMU's own log may say why")

    def _serve_soon(self, sock: socket.socket, number: int, disk: Disk) -> None:
        """Answer on `sock`, which is owned from here on."""
        endpoint = DiskEndpoint(sock, Export(ident(number), disk.size), self.log.sink(number))
        self._endpoints.append(endpoint)
        self._serving += 1
        self._idle = trio.Event()
        self._nursery.start_soon(self._serve, endpoint, sock, disk)

    async def _serve(self, endpoint: DiskEndpoint, sock: socket.socket, disk: Disk) -> None:
        problem = "QEMU has closed its connection"
        try:
            await endpoint.serve()
        except CurlingError as error:
            problem = str(error)
        finally:
            sock.close()
            endpoint.close()
            self._serving -= 1
            if not self._serving:
                self._idle.set()
            if not self._ending:
                self.fail(f"the mirror of {disk.name} has ended: {problem}")

    def fail(self, why: str) -> None:
        """It is of no more use: what the guest writes from now on may not come here."""
        self.broken = self.broken or why
        self.log.mark_all()
        self.log.fail(why)

    def heed(self, event: Event) -> None:
        """Take notice of an event of QEMU's.

        Raises:
            DiskLogFailed: a mirror has ended.
        """
        name = str(event.data.get("device", ""))
        if event.name in _ENDINGS and is_ours(name) and not self._ending:
            how = event.data.get("error") or event.data.get("operation") or event.name.lower()
            self.fail(f"QEMU ended the mirror {name} ({how})")
            raise DiskLogFailed(self.broken or "")

    async def detach(self, qmp: QmpClient) -> None:
        """End the mirrors; the guest goes on with its disks alone. All of ours in QEMU is gone after it.

        Raises:
            QmpError: QEMU did not do it.
        """
        self._ending = True
        await sweep(qmp)
        with trio.move_on_after(_CANCEL_TIMEOUT):
            await self._idle.wait()

    async def close(self) -> None:
        """Free everything. What QEMU still has breaks, and the guest goes on with its disks alone."""
        self._ending = True
        for endpoint in self._endpoints:
            endpoint.abort()
        await self._idle.wait()
        self.log.free()


async def sweep(qmp: QmpClient) -> None:
    """End the jobs, nodes and exports of ours in QEMU, whoever has left them there.

    Raises:
        QmpError: QEMU did not do it.
    """
    await stop_exports(qmp)
    with qmp.events() as events:
        jobs = {job["device"] for job in await qmp.execute("query-block-jobs") if is_ours(job["device"])}
        for job in jobs:
            with suppress(QmpCommandFailed):  # it has ended meanwhile
                await qmp.execute("block-job-cancel", {"device": job, "force": True})
        with trio.move_on_after(_CANCEL_TIMEOUT):
            while {job["device"] for job in await qmp.execute("query-block-jobs")} & jobs:
                async for event in events:
                    if event.name in _ENDINGS or event.name == "JOB_STATUS_CHANGE":
                        break
    for node in await qmp.execute("query-named-block-nodes", {"flat": True}):
        if is_ours(node["node-name"]):
            await qmp.execute("blockdev-del", {"node-name": node["node-name"]})


# Reading the disks, for a copy of them.


async def stop_exports(qmp: QmpClient) -> None:
    """End our exports, and QEMU's NBD server with them, if there are any.

    Raises:
        QmpError: QEMU did not do it.
    """
    exports = [export["id"] for export in await qmp.execute("query-block-exports")]
    ours = [export for export in exports if is_ours(export)]
    for export in ours:
        await qmp.execute("block-export-del", {"id": export, "mode": "hard"})
    if ours and len(ours) == len(exports):
        with suppress(QmpCommandFailed):
            await qmp.execute("nbd-server-stop")


@asynccontextmanager
async def exported(qmp: QmpClient, directory: Path, disks: Sequence[Disk]) -> AsyncIterator[Path]:
    """Inside the block QEMU shows the disks, read-only, at an NBD socket that only we can reach.

    Yields:
        Its path. The exports are called `ident(number)`.

    Raises:
        DiskUnfit: QEMU does not.
    """
    path = directory / "export"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a daemon that was killed has left it
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.bind(str(path))
        listener.listen(len(disks))
        try:
            await qmp.hand_over(_PREFIX, listener.fileno())
            address = {"type": "fd", "data": {"str": _PREFIX}}
            await qmp.execute("nbd-server-start", {"addr": address, "max-connections": len(disks)})
            for number, disk in enumerate(disks):
                export = {
                    "type": "nbd",
                    "id": ident(number),
                    "node-name": disk.node,
                    "name": ident(number),
                    "writable": False,
                }
                await qmp.execute("block-export-add", export)
        except QmpCommandFailed as error:
            with suppress(QmpError):
                await stop_exports(qmp)
            path.unlink(missing_ok=True)
            problem = f"QEMU does not let it be read: {error.description.rstrip('.')}"
            raise DiskUnfit(
                disks[0].name, problem, "End the NBD server that QEMU has running, if it is that"
            ) from None
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        with trio.CancelScope(shield=True), suppress(QmpError):
            await stop_exports(qmp)
