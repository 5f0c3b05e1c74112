"""A look at a running QEMU before it is protected: everything that would fail later fails here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import trio
from attrs import field, frozen

from curling_fd.capture.probe import Choice, choose
from curling_fd.capture.settings import capabilities, set_capabilities
from curling_fd.disk.inventory import Disk, replicated
from curling_fd.errors import (
    CannotDerive,
    DisksChanged,
    GuestNotRunning,
    MigrationBlocked,
    QmpCommandFailed,
    QmpTimeout,
    StandbyFailed,
)
from curling_fd.qmp.client import QmpClient
from curling_fd.service.mirror import is_ours
from curling_fd.service.network import Cards, cards_of
from curling_fd.standby.cmdline import device_ids
from curling_fd.vmstate.records import Block

#: Seconds between two looks at a protected VM's disks.
_LOOK_AT_DISKS = 2.0

#: Why background snapshots do not go with replicated disks: QEMU lets the guest go on before anybody outside
#: can know that it has stood still, and its writes before and after cannot be told apart.
_CANNOT_TELL = "which writes to its disks come before a snapshot cannot be told"

#: Run states in which a guest is worth protecting: it runs, or will when its checkpoint is over.
_RUNNING = ("running", "colo")


@frozen
class Examined:
    """What the backup must know to make a standby, and we to choose an engine.

    Attributes:
        memory: the memory backends: names and sizes of the RAM blocks the standby maps.
        machine: the resolved machine type, such as `pc-i440fx-7.2`.
        argv: command line of the primary's QEMU.
        cards: its network cards.
        disks: those that are replicated.
    """

    choice: Choice
    memory: tuple[Block, ...]
    machine: str
    argv: tuple[str, ...]
    cards: Cards = field(factory=Cards)
    disks: tuple[Disk, ...] = ()


async def examine(
    qmp: QmpClient,
    wanted_engine: str,
    *,
    shared: Collection[str] = (),
    scratch: Collection[str] = (),
    unusable: Mapping[str, str] | None = None,
) -> Examined:
    """Look at the VM behind `qmp`; changes nothing that lasts.

    Args:
        wanted_engine: `auto` or an engine's name.
        shared: devices and node names of disks that both hosts see: the guest must not be able to write them.
        scratch: those that may be written though they are not replicated.
        unusable: engines that failed at run time, and how: `auto` passes them over.

    Raises:
        PrecheckFailed: one of its kinds, for what stands in the way.
    """
    status = await qmp.status()
    if status not in _RUNNING:
        raise GuestNotRunning(status)
    blocked = (await qmp.execute("query-migrate")).get("blocked-reasons")
    if blocked:
        raise MigrationBlocked(tuple(blocked))
    disks = await disks_of(qmp, shared, scratch)
    known = await capabilities(qmp)
    accelerator = "kvm" if (await qmp.execute("query-kvm"))["enabled"] else "tcg"
    choice = choose(
        wanted_engine,
        qmp.greeting.version,
        accelerator,
        frozenset(known),
        background_snapshot=_CANNOT_TELL if disks else await _try_background_snapshot(qmp, known),
        unusable=unusable or {},
    )
    backends = await qmp.execute("query-memdev")
    memory = tuple(Block(entry["id"], entry["size"]) for entry in backends if "id" in entry)
    machine = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    argv = _command_line(qmp.pid)
    await _check_plugged(qmp, argv)
    cards = await cards_of(qmp)
    return Examined(choice, memory, str(machine).removesuffix("-machine"), argv, cards, disks)


async def disks_of(qmp: QmpClient, shared: Collection[str], scratch: Collection[str]) -> tuple[Disk, ...]:
    """The disks of the VM that are replicated.

    Raises:
        WritableDisk, DiskUnfit: one cannot be.
    """
    jobs = [job for job in await qmp.execute("query-block-jobs") if not is_ours(job["device"])]
    return replicated(await qmp.execute("query-block"), jobs, shared, scratch)


async def disks_changed(
    qmp: QmpClient, before: Sequence[Disk], shared: Collection[str], scratch: Collection[str]
) -> None:
    """Look now and then whether the VM still has the disks that it had `before`; returns never.

    QEMU tells nobody when one is plugged in or resized.

    Raises:
        DisksChanged: it has others.
        WritableDisk, DiskUnfit: it has one that cannot be replicated.
    """
    while True:
        await trio.sleep(_LOOK_AT_DISKS)
        try:
            now = await disks_of(qmp, shared, scratch)
        except QmpTimeout:
            continue  # a slow backup keeps QEMU busy at the end of a first pass
        if list(now) != list(before):
            different = {disk.name for disk in {*now} ^ {*before}}
            raise DisksChanged(tuple(sorted(different)))


async def _try_background_snapshot(qmp: QmpClient, known: dict[str, bool]) -> str | None:
    """None if QEMU takes the capability for this VM on this host, else its reason."""
    name = "background-snapshot"
    if name not in known:
        return f"QEMU {'.'.join(map(str, qmp.greeting.version))} has no background snapshots"
    try:
        await set_capabilities(qmp, {name: True})
        await set_capabilities(qmp, {name: False})
    except QmpCommandFailed as error:
        return error.description
    return None


async def _check_plugged(qmp: QmpClient, argv: tuple[str, ...]) -> None:
    """A device that was plugged in later is not on the command line, and would be missing in the standby."""
    found = await qmp.execute("qom-list", {"path": "/machine/peripheral"})
    now = {entry["name"] for entry in found if str(entry["type"]).startswith("child<")}
    then = device_ids(argv)
    if now != then:
        changed = ", ".join(sorted(now ^ then))
        raise CannotDerive(f"-device {changed}", "it was plugged in or out after the VM was started")


def _command_line(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise StandbyFailed(f"the command line of process {pid} cannot be read: {error.strerror}") from None
    argv = tuple(part.decode("utf-8", "surrogateescape") for part in raw.split(b"\0")[:-1])
    if not any("qemu" in part for part in argv[:3]):
        raise StandbyFailed(f"process {pid}, which opened the QMP socket, is not QEMU: {argv[0]}")
    return argv
