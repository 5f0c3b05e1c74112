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
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from attrs import frozen

from curling_fd.disk.endpoint import DiskEndpoint, Ending
from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.holdings import DiskLogLeft
from curling_fd.disk.inventory import Disk
from curling_fd.errors import CurlingError, DiskLogFailed, DiskUnfit, QmpCommandFailed, QmpError
from curling_fd.nbd.server import Export, Session
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.qmp.protocol import Event, encode_command

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


@frozen
class MirrorLeft:
    """Mirrors between two processes that serve them in turn.

    Descriptors go beside it: `sock0`, ... the connections of the disks, `log0`, ... the log's.
    """

    disks: tuple[Disk, ...]
    pid: int
    log: DiskLogLeft
    sessions: tuple[Session, ...]


class DiskMirror:
    """The mirrors of all `disks` of a VM, and the log they write to.

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
        self._socks: list[socket.socket] = []
        self._serving = 0
        self._idle = trio.Event()
        self._idle.set()
        self._ending = False

    @classmethod
    def inherit(
        cls, directory: Path, left: MirrorLeft, fds: Mapping[str, int], nursery: trio.Nursery
    ) -> DiskMirror:
        """Go on with the mirrors that another process has `left`; the descriptors are owned from here on."""
        logs = [fds[f"log{number}"] for number in range(1 + left.log.logging)]
        mirror = cls(directory, left.disks, DiskLog.inherit(left.log, logs, lambda: None), left.pid, nursery)
        for number, (disk, session) in enumerate(zip(left.disks, left.sessions, strict=True)):
            sock = socket.socket(fileno=fds[f"sock{number}"])
            sock.setblocking(True)
            mirror._serve_soon(sock, number, disk, session)
        return mirror

    async def leave(self) -> tuple[MirrorLeft, dict[str, int]]:
        """Serve no more; what the guest writes waits in the sockets until somebody goes on with them.

        To be called while nothing of the log is on its way. What `inherit` needs; descriptors are borrowed.

        Raises:
            DiskLogFailed: a mirror is broken.
        """
        self._ending = True
        self.log.open_gate()  # who waits for a checkpoint would not come to an end
        for endpoint in self._endpoints:
            endpoint.stop()
        await self._idle.wait()
        sessions = [endpoint.session for endpoint in self._endpoints if endpoint.session is not None]
        if self.broken is not None or len(sessions) != len(self.disks):
            raise DiskLogFailed(self.broken or "a mirror has ended")
        log, fds = self.log.leave()
        named = {f"log{number}": fd for number, fd in enumerate(fds)}
        named |= {f"sock{number}": sock.fileno() for number, sock in enumerate(self._socks)}
        return MirrorLeft(self.disks, self.pid, log, tuple(sessions)), named

    @property
    def directory(self) -> Path:
        """Where the disks are read."""
        return self._directory

    @property
    def last_will(self) -> bytes:
        """What QEMU is to be told when this process stands still: else it waits for us with all it does.

        Out of band, for its main loop may be what waits.
        """
        instances = [{"type": "block-node", "node-name": ident(number)} for number in range(len(self.disks))]
        return encode_command("yank", {"instances": instances}, "curling-guard-disks", out_of_band=True)

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

    def _serve_soon(
        self, sock: socket.socket, number: int, disk: Disk, session: Session | None = None
    ) -> None:
        """Answer on `sock`, which is owned from here on."""
        export = Export(ident(number), disk.size)
        endpoint = DiskEndpoint(sock, export, self.log.sink(number), session=session)
        self._endpoints.append(endpoint)
        self._socks.append(sock)
        self._serving += 1
        self._idle = trio.Event()
        self._nursery.start_soon(self._serve, endpoint, sock, disk)

    async def _serve(self, endpoint: DiskEndpoint, sock: socket.socket, disk: Disk) -> None:
        problem: str | None = "it was cancelled"
        try:
            ending = await endpoint.serve()
            problem = "QEMU has closed its connection" if ending is Ending.LEFT else None
        except CurlingError as error:
            problem = str(error)
        finally:
            endpoint.close()
            if problem is not None:
                sock.close()
                if not self._ending:
                    self.fail(f"the mirror of {disk.name} has ended: {problem}")
                self.broken = self.broken or problem
            self._serving -= 1
            if not self._serving:
                self._idle.set()

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
        for sock in self._socks:
            sock.close()
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
