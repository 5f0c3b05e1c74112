"""What can go wrong with disks and their copies: a part of the tree in `curling_fd.errors`."""

from __future__ import annotations

from attrs import define

from curling_fd.error_roots import CurlingError, PrecheckFailed, RemoteProtocolError


@define(auto_exc=True, slots=False, str=False, eq=False)
class DiskUnfit(PrecheckFailed):
    """The VM's `disk` cannot be replicated: `problem`. `advice` helps, and is a clause."""

    disk: str
    problem: str
    advice: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyUnfit(PrecheckFailed):
    """What is at `path` on the backup cannot be its copy of the VM's `disk`; nothing was changed."""

    disk: str
    path: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyMissing(CopyUnfit):
    """There is nothing; it is to be of `format` and of `size` bytes."""

    format: str
    size: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyWrongSize(CopyUnfit):
    """It is of `found` bytes, and the disk of `size`."""

    format: str
    found: int
    size: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyWrongFormat(CopyUnfit):
    """It is of the format `found`, and the VM's command line says `format`; the disk has `size` bytes."""

    format: str
    found: str
    size: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyBacked(CopyUnfit):
    """Part of its content is in another file, `backing`."""

    backing: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyInUse(CopyUnfit):
    """`holder` says who has it open, as far as that can be seen."""

    holder: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyReadOnly(CopyUnfit):
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class CopyUnusable(CopyUnfit):
    problem: str


class DiskError(CurlingError):
    """The backup's copies cannot follow the guest's disks. The guest and its own disks go on."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class DisksChanged(DiskError):
    """The VM has other disks than when its protection began: `disks` came, went, or were resized."""

    disks: tuple[str, ...]


@define(auto_exc=True, slots=False, str=False, eq=False)
class DiskLogFull(DiskError):
    """What was written in one epoch came to `limit` bytes."""

    limit: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class DiskLogFailed(DiskError):
    why: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class DiskCopyFailed(DiskError):
    """The copy at `path` on the backup; `problem` is the kernel's or QEMU's."""

    path: str
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class NbdError(RemoteProtocolError):
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class NbdRequestFailed(CurlingError):
    """A disk's server answered `command` (READ, ...) at `offset` with `errno`, which `words` explain."""

    command: str
    offset: int
    errno: int
    words: str
