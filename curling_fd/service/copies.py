"""The backup's copies of a VM's disks in a session, and what is remembered of them until the next.

While a session writes to a copy its marker says that nobody knows what is in it; so it does after a crash.
Ended in order, the copy differs from the primary's disk only in what the primary's log has marked, and the
marker names the log by its basis. A VM that is taken over writes to its disk itself: the marker stays in
doubt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio
from attrs import define, evolve, frozen

from curling_fd.disk.copies import Copies
from curling_fd.disk.inventory import Disk
from curling_fd.disk.marker import Marker
from curling_fd.disk.markers import MarkerStore, stamp
from curling_fd.disk.spec import CopySpec
from curling_fd.errors import ConfigError, CopyUnusable, DiskCopyFailed
from curling_fd.service.config import VmConfig
from curling_fd.standby.paths import Paths


def specs(config: VmConfig, disks: Sequence[Disk]) -> list[CopySpec]:
    """The copies of `disks` on this host: where the standby's command line has them."""
    told = Paths("", config.standby.replace)
    return [_spec(disk, told.read(disk.path)) for disk in disks]


def _spec(disk: Disk, path: str) -> CopySpec:
    return CopySpec(disk.name, path, disk.format, disk.size)


@frozen
class CopiesLeft:
    """Copies between two processes that have them in turn: closed meanwhile, and known by their markers."""

    disks: tuple[Disk, ...]
    paths: tuple[str, ...]
    basis: str
    generation: int
    sequence: int


@define(eq=False)
class SessionCopies:
    """The copies of `disks` in the hands of a session, or of a replica that waits. All methods block.

    Attributes:
        copies: opened, so that nobody else can use them.
        paths: of the copies on this host.
        basis: of the primary's log.
        alike: for each disk, whether its copy was known by that basis when the session began.
        generation, sequence: of the VM, and of the newest checkpoint; for people only.
        begun: the primary has begun to send: from then on its log knows of all in which they differ.
        spoiled: nobody knows what is in them.
    """

    vm: str
    store: MarkerStore
    disks: tuple[Disk, ...]
    paths: tuple[str, ...]
    copies: Copies
    basis: str
    alike: tuple[bool, ...]
    generation: int
    before: Mapping[str, Marker]
    sequence: int = 0
    begun: bool = False
    spoiled: bool = False

    @classmethod
    def open(
        cls,
        vm: str,
        store: MarkerStore,
        disks: Sequence[Disk],
        paths: Sequence[str],
        basis: str,
        generation: int,
    ) -> SessionCopies:
        """Open the copies; from now on their content is in doubt.

        Raises:
            CopyUnfit: what is there cannot be one; nothing was changed.
            ConfigError: it cannot be remembered.
        """
        markers = store.load(vm)
        alike = []
        for disk, path in zip(disks, paths, strict=True):
            marker = markers.get(disk.name)
            alike.append(marker is not None and marker.basis_for(disk.size, stamp(path)) == basis)
        copies = Copies.open([_spec(disk, path) for disk, path in zip(disks, paths, strict=True)])
        try:
            store.save(vm, {name: marker.invalidated() for name, marker in markers.items()})
        except BaseException:
            copies.close()
            raise
        return cls(vm, store, tuple(disks), tuple(paths), copies, basis, tuple(alike), generation, markers)

    @classmethod
    def inherit(cls, vm: str, store: MarkerStore, left: CopiesLeft) -> SessionCopies:
        """Go on with the copies that another process has `left`.

        Raises:
            CopyUnfit: somebody has touched one meanwhile.
            ConfigError: it cannot be remembered.
        """
        copies = cls.open(vm, store, left.disks, left.paths, left.basis, left.generation)
        copies.sequence, copies.begun = left.sequence, True
        for disk, path, alike in zip(left.disks, left.paths, copies.alike, strict=True):
            if not alike:
                copies.spoiled = True
                copies.copies.close()
                raise CopyUnusable(disk.name, path, "it was changed while curlingd was restarted")
        return copies

    def left(self) -> CopiesLeft:
        """What `inherit` needs; they are closed."""
        return CopiesLeft(self.disks, self.paths, self.basis, self.generation, self.sequence)

    def show(self) -> list[dict[str, Any]]:
        """As the control interface's type `Disk`."""
        state = "copy" if self.sequence else "filling"
        return [disk.show(path, state) for disk, path in zip(self.disks, self.paths, strict=True)]

    def give_away(self) -> None:
        """Let the standby have them, all that was applied being on stable storage; they stay in doubt.

        Raises:
            DiskCopyFailed: they are not what they must be.
        """
        try:
            self.copies.sync()
        finally:
            self.copies.close()

    def end(self) -> None:
        """Close them, and remember what they are; in doubt, if that is not known."""
        try:
            self.give_away()
        except DiskCopyFailed:
            return
        if self.spoiled:
            return
        markers = dict(self.before)
        for disk, path in zip(self.disks, self.paths, strict=True):
            if self.begun:
                markers[disk.name] = Marker(disk.size, self.basis, self.generation, self.sequence)
            if disk.name in markers:
                # Also where nothing was written: opening an image can change it.
                markers[disk.name] = evolve(markers[disk.name], stamp=stamp(path))
        with suppress(ConfigError):  # they stay in doubt
            self.store.save(self.vm, markers)


class Closing:
    """Closes copies in the background: nobody can open them again before that is done.

    Args:
        nursery: where.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._under_way = 0
        self._done = trio.lowlevel.ParkingLot()

    def begin(self, copies: SessionCopies) -> None:
        """Close these, which nobody uses any more."""
        self._under_way += 1
        self._nursery.start_soon(self._close, copies)

    async def _close(self, copies: SessionCopies) -> None:
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(copies.end)
        finally:
            self._under_way -= 1
            self._done.unpark_all()

    async def done(self) -> None:
        """Wait until all are closed."""
        while self._under_way:
            await self._done.park()
