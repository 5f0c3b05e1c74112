"""What one curlingd leaves to the next, so that a restart costs no protected VM its protection.

A daemon that is told to stop brings each session to a moment in which nothing is under way: no checkpoint
with QEMU, no frame on the link. Then the descriptors of the session go into systemd's store, and with them a
memfd, the manifest, that says in JSON what they are. systemd passes all of it to the daemon it starts next,
which goes on with the next checkpoint. If it starts none, it closes the descriptors: the guards see the end
of the daemon in that, and so does the other host.

The daemon that takes a session up has the store forget it first: a guard notices the end of the daemon only
when nobody else holds its control socket.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import trio
from attrs import define, frozen
from cattrs.preconf.json import make_converter

from curling_fd.capture.engine import Engine, EngineLeft
from curling_fd.capture.guarding import prefixed
from curling_fd.capture.probe import Choice
from curling_fd.errors import StandbyFailed
from curling_fd.link.transport import FrameLink
from curling_fd.qmp.client import EventStream, MonitorLeft, QmpClient
from curling_fd.qmp.protocol import Event
from curling_fd.replica.image import Replica, ReplicaLeft
from curling_fd.service.copies import CopiesLeft, SessionCopies
from curling_fd.service.mirror import DiskMirror, MirrorLeft
from curling_fd.service.primary import PrimarySession
from curling_fd.service.record import VmRecord
from curling_fd.service.standby import Standby
from curling_fd.service.statistics import Totals
from curling_fd.system import systemd
from curling_fd.vmstate.records import Block

_logger = logging.getLogger("curling")

#: Version of the classes below. A daemon that finds another one starts its sessions anew.
VERSION = 2

_MANIFEST = "manifest"

_converter = make_converter()


@frozen
class PrimaryLeft:
    """A session on the primary. Descriptors: `qmp`, `link`, the engine's, and the mirrors' of the disks.

    Attributes:
        peer_rests: the other host's daemon is restarted at the same time.
        sequence: of the newest checkpoint, which is committed.
        paused: the operator has paused the guest.
        events: what QEMU said and nobody has looked at.
    """

    generation: int
    sequence: int
    choice: Choice
    ram_bytes: int
    paused: bool
    peer_rests: bool
    monitor: MonitorLeft
    events: tuple[Event, ...]
    engine: EngineLeft
    totals: Totals
    mirror: MirrorLeft | None = None


@frozen
class BackupLeft:
    """A replica and its standby on the backup. Descriptors: `link` if it has one, `mappedN` and `smallN` (the
    images), `device` (the device state), and the standby's.

    Attributes:
        silent: without a link: the primary fell silent, and did not hang up.
        peer_rests: the other host's daemon is restarted at the same time.
    """

    generation: int
    choice: Choice
    ram_bytes: int
    paused: bool
    peer_rests: bool
    silent: bool
    max_raw: int
    directory: str
    mapped: tuple[Block, ...]
    replica: ReplicaLeft
    totals: Totals
    copies: CopiesLeft | None = None


async def leave_session(
    record: VmRecord,
    session: PrimarySession,
    engine: Engine,
    qmp: QmpClient,
    events: EventStream,
    link: FrameLink,
    mirror: DiskMirror | None,
) -> None:
    """Leave `session`, which is at rest, and all it borrowed, to the next daemon."""
    assert record.choice is not None
    mirror_left, mirror_fds = await mirror.leave() if mirror is not None else (None, {})
    monitor = await qmp.leave()
    engine_left, engine_fds = engine.leave()
    pending = []
    with suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:
            pending.append(events.receive_nowait())
    left = PrimaryLeft(
        generation=record.generation,
        sequence=session.committed,
        choice=record.choice,
        ram_bytes=record.ram_bytes,
        paused=session.stops.paused,
        peer_rests=session.peer_rests,
        monitor=monitor,
        events=tuple(pending),
        engine=engine_left,
        totals=record.counters.totals(),
        mirror=mirror_left,
    )
    engine_fds |= prefixed("disks.", mirror_fds)
    leave(record.name, left, {"qmp": qmp.fileno(), "link": link.fileno(), **engine_fds})


async def leave_replica(record: VmRecord, kept: Kept, link: FrameLink | None, *, silent: bool) -> None:
    """Leave a replica, its standby and its copies of disks to the next daemon; `link` is at rest."""
    assert record.choice is not None
    copies, kept.copies = kept.copies, None
    if copies is not None:
        await trio.to_thread.run_sync(copies.end)
    images, process = kept.standby.leave()
    replica, small, device = kept.replica.leave()
    left = BackupLeft(
        generation=kept.generation,
        choice=record.choice,
        ram_bytes=record.ram_bytes,
        paused=kept.paused,
        peer_rests=kept.peer_rests,
        silent=silent,
        max_raw=kept.max_raw,
        directory=str(kept.standby.directory),
        mapped=tuple(block for block, _ in kept.standby.images),
        replica=replica,
        totals=record.counters.totals(),
        copies=copies.left() if copies is not None else None,
    )
    state = os.memfd_create("curling-device-state")
    try:
        with os.fdopen(os.dup(state), "wb") as file:
            file.write(device)
        fds = {"device": state, **prefixed("standby.", process)}
        fds |= {f"mapped{index}": fd for index, fd in enumerate(images)}
        fds |= {f"small{index}": fd for index, fd in enumerate(small)}
        leave(record.name, left, fds | ({"link": link.fileno()} if link else {}))
        kept.left = True
    finally:
        os.close(state)


def inherit_replica(record: VmRecord, estate: Estate, left: BackupLeft) -> Kept:
    """Take up what `leave_replica` left.

    Raises:
        StandbyFailed: the standby is gone.
        CopyUnfit: somebody has touched a copy of a disk since.
    """
    copies = None
    if left.copies is not None:
        copies = SessionCopies.inherit(record.name, record.host.markers, left.copies)
    try:
        return _inherit_replica(estate, left, copies)
    except BaseException:
        if copies is not None:
            copies.end()
        raise


def _inherit_replica(estate: Estate, left: BackupLeft, copies: SessionCopies | None) -> Kept:
    device_fd = estate.one("device")
    os.lseek(device_fd, 0, os.SEEK_SET)
    with os.fdopen(device_fd, "rb") as file:
        device = file.read()
    mapped = [estate.one(f"mapped{index}") for index in range(len(left.mapped))]
    small = [estate.one(f"small{index}") for index in range(len(left.replica.small))]
    try:
        standby = Standby.inherit(Path(left.directory), left.mapped, mapped, estate.take("standby."))
    except StandbyFailed:
        for fd in small:
            os.close(fd)
        raise
    replica = Replica.inherit(standby.images, left.replica, small, device)
    return Kept(standby, replica, left.generation, left.max_raw, left.paused, left.peer_rests, copies)


@define
class Kept:
    """A replica and its standby; they outlive the session that fills them.

    Attributes:
        generation: of that session.
        max_raw: its largest frame, in bytes.
        paused: the operator had the guest paused on the primary.
        peer_rests: the primary's daemon is being restarted, and ours was as well.
        copies: of the VM's disks, if any are replicated.
        left: the next daemon goes on with them.
    """

    standby: Standby
    replica: Replica
    generation: int
    max_raw: int
    paused: bool = False
    peer_rests: bool = False
    copies: SessionCopies | None = None
    left: bool = False

    async def give_disks_away(self) -> None:
        """Let the standby have the disks.

        Raises:
            DiskCopyFailed: they are not what they must be.
        """
        copies, self.copies = self.copies, None
        if copies is not None:
            await trio.to_thread.run_sync(copies.give_away)

    def close(self) -> bool:
        """Give it up, but for the copies; whether nobody goes on with it, nor with the standby's taps."""
        self.replica.close()
        self.standby.close()
        return not self.left


Left = TypeVar("Left", PrimaryLeft, BackupLeft)


@define
class Estate:
    """What was left of one VM. The descriptors are owned until they are taken or the estate is closed."""

    vm: str
    manifest: Mapping[str, object]
    fds: dict[str, int]

    def read(self, kind: type[Left]) -> Left | None:
        """What was left, if it is of that kind and can be read."""
        if self.manifest.get("kind") != kind.__name__ or self.manifest.get("version") != VERSION:
            return None
        try:
            return _converter.structure(self.manifest["left"], kind)
        except Exception as error:  # cattrs raises groups of whatever its hooks raise
            _logger.warning("%s: what the daemon before left cannot be read: %r", self.vm, error)
            return None

    def one(self, name: str) -> int:
        """The descriptor called so; the caller owns it now."""
        return self.fds.pop(name)

    def take(self, prefix: str = "") -> dict[str, int]:
        """Those whose names begin with `prefix`, by the rest of the name; the caller owns them now."""
        names = [name for name in self.fds if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.fds.pop(name) for name in names}

    def close(self) -> None:
        """Give up what was not taken."""
        for fd in self.take().values():
            os.close(fd)


def leave(vm: str, left: PrimaryLeft | BackupLeft, fds: Mapping[str, int]) -> bool:
    """Put a session into systemd's store. Blocks for some milliseconds.

    Args:
        fds: its descriptors by name, borrowed.

    Returns:
        False if systemd did not take it: as if there were no store.
    """
    manifest = {"version": VERSION, "kind": type(left).__name__, "left": _converter.unstructure(left)}
    memory = os.memfd_create("curling-manifest")
    try:
        with os.fdopen(os.dup(memory), "w", encoding="utf-8") as file:
            json.dump(manifest, file)
        for name, fd in {**fds, _MANIFEST: memory}.items():
            systemd.manager().keep(f"{vm}/{name}", fd)
    except OSError as error:
        _logger.warning("%s: systemd does not keep its session: %s", vm, error.strerror)
        with suppress(OSError):
            systemd.manager().forget(f"{vm}/{name}" for name in (*fds, _MANIFEST))
        return False
    finally:
        os.close(memory)
    return systemd.manager().settled()


def estates(vms: Iterable[str]) -> dict[str, Estate]:
    """What the daemon before us has left of `vms`, out of systemd's store. All else it kept is closed."""
    manager = systemd.manager()
    kept = manager.kept()
    if not kept:
        return {}
    manager.forget(kept)
    manager.settled()
    result: dict[str, Estate] = {}
    by_vm: dict[str, dict[str, int]] = {}
    for name, fd in kept.items():
        vm, _, part = name.partition("/")
        by_vm.setdefault(vm, {})[part] = fd
    for vm, fds in by_vm.items():
        estate = Estate(vm, _manifest(fds), fds)
        if vm in vms and estate.manifest:
            result[vm] = estate
        else:
            _logger.warning("%s: what the daemon before left of it is of no use", vm)
            estate.close()
    return result


def _manifest(fds: dict[str, int]) -> Mapping[str, object]:
    if _MANIFEST not in fds:
        return {}
    fd = fds.pop(_MANIFEST)
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        with os.fdopen(fd, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
