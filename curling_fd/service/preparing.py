"""The beginning of a session on the backup: from the description of a VM to a standby that waits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trio

from curling_fd.capture.intake import PIECE
from curling_fd.capture.probe import Choice
from curling_fd.disk.inventory import decode, path_of
from curling_fd.errors import CopyUnusable, FrameError, HostsDisagree
from curling_fd.failover.arbiter import FileArbiter
from curling_fd.link.frames import HEAD_SIZE, Kind
from curling_fd.link.transport import FrameLink
from curling_fd.qmp.client import open_qmp
from curling_fd.replica.image import Replica
from curling_fd.service.backup import definition_problem
from curling_fd.service.copies import Closing, SessionCopies, specs
from curling_fd.service.network import VmNetwork, decode_ports, decode_taps
from curling_fd.service.record import VmRecord
from curling_fd.service.restart import Kept
from curling_fd.service.standby import Standby, start_standby
from curling_fd.vmstate.records import Block

#: A primary describes its VM within this many seconds of its greeting.
_DEFINE_TIMEOUT = 30.0


async def prepare(record: VmRecord, network: VmNetwork, link: FrameLink, closing: Closing) -> Kept:
    """A standby for the VM the primary describes on `link` (borrowed), and copies of its disks.

    Args:
        closing: where copies go of which nothing comes.

    Raises:
        PrecheckFailed: why there can be none here.
        FrameError, LinkError: the primary did not describe it.
    """
    with trio.move_on_after(_DEFINE_TIMEOUT) as scope:
        received = await link.receive()
    if scope.cancelled_caught or received.header.kind is not Kind.DEFINE:
        raise FrameError("the primary did not describe its VM")
    content = received.content
    problem = definition_problem(content)
    if problem is not None:
        raise FrameError(f"the primary's description of the VM is wrong: {problem}")
    await _check_arbiter(record, content.get("token"))
    _show(record, content)
    memory = [Block(name, size) for name, size in content["memory"]]
    record.ram_bytes = sum(block.size for block in memory)
    copies = await _open_copies(record, content, received.header.generation)
    try:
        max_disk_log = content["max_disk_log"] if copies is not None else 0
        max_raw = HEAD_SIZE + max(content["max_checkpoint"], PIECE) + max_disk_log
        await network.connect(decode_ports(content.get("ports", [])))
        standby = await start_standby(
            record.config,
            Path(record.host.config.runtime_directory) / record.name,
            argv=content["argv"],
            machine=content["machine"],
            version=tuple(content["version"]),
            memory=memory,
            staging=min(max_raw, record.ram_bytes + max_disk_log),
            taps=decode_taps(content.get("taps", {})),
        )
        if copies is not None:
            try:
                await _check_paths(standby, copies)
            except BaseException:
                standby.close()
                raise
    except BaseException:
        if copies is not None:
            closing.begin(copies)
        raise
    return Kept(standby, Replica(standby.images), received.header.generation, max_raw, copies=copies)


async def _open_copies(record: VmRecord, content: dict[str, Any], generation: int) -> SessionCopies | None:
    disks = decode(content["disks"])
    if not disks:
        return None
    paths = [spec.path for spec in specs(record.config, disks)]
    markers, basis = record.host.markers, content["disk_basis"]
    return await trio.to_thread.run_sync(
        SessionCopies.open, record.name, markers, disks, paths, basis, generation
    )


async def _check_paths(standby: Standby, copies: SessionCopies) -> None:
    """See that what the standby has opened are the copies: after a failover it would run from other disks.

    Raises:
        CopyUnusable: it has another one.
    """
    async with open_qmp(standby.qmp_path) as qmp:
        drives = await qmp.execute("query-block")
    for disk, path in zip(copies.disks, copies.paths, strict=True):
        found = path_of(drives, disk.name)
        if found is None or os.path.realpath(found) != os.path.realpath(path):
            raise CopyUnusable(disk.name, path, f"the standby's command line has {found} for that disk")


async def _check_arbiter(record: VmRecord, token: object) -> None:
    """Both hosts must ask the same arbiter."""
    arbiter = record.arbiter
    if isinstance(arbiter, FileArbiter) != (token is not None):
        raise HostsDisagree('one host has arbiter = "file" and the other has not')
    if isinstance(arbiter, FileArbiter) and not await arbiter.sees_token(str(token)):
        raise HostsDisagree("the two hosts do not see the same arbiter_directory")


def _show(record: VmRecord, content: dict[str, Any]) -> None:
    engine = content.get("engine") or {}
    record.choice = Choice(
        str(engine.get("name")),
        str(engine.get("reason")),
        str(engine.get("accelerator")),
        tuple(content["version"]),
        return_path=False,
    )
