"""The words for errors of disks: a part of `curling_fd.sentences`, which asks for them and alone is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curling_fd.disk.errors import (
    CopyBacked,
    CopyInUse,
    CopyMissing,
    CopyReadOnly,
    CopyUnfit,
    CopyUnusable,
    CopyWrongFormat,
    CopyWrongSize,
    DiskCopyFailed,
    DiskError,
    DiskLogFailed,
    DiskLogFull,
    DisksChanged,
    DiskUnfit,
    NbdError,
    NbdRequestFailed,
)
from curling_fd.error_roots import CurlingError

WORDS: dict[type[CurlingError], tuple[str, str]] = {
    DiskUnfit: (
        "The disk {disk} cannot be replicated: {problem}.",
        "{advice}.",
    ),
    CopyUnfit: (
        "What is at {path} on the backup cannot be the copy of the disk {disk}.",
        "Make a fitting one there, or name another with standby.replace in the VM's file on the backup.",
    ),
    CopyBacked: (
        "{path} on the backup cannot be the copy of the disk {disk}: part of its content is in {backing}, "
        "which Curling does not keep the same.",
        "Make it whole while nothing uses it: 'qemu-img rebase -b \"\" {path}'.",
    ),
    CopyInUse: (
        "{path} on the backup, the copy of the disk {disk}, is in use: {holder}.",
        "End what uses it (for a VM that runs there: see first that it is not the one to be protected), or "
        "name another file with standby.replace in the VM's file on the backup.",
    ),
    CopyReadOnly: (
        "{path} on the backup, the copy of the disk {disk}, cannot be written: {problem}.",
        "Let curlingd write to it: permissions, a read-only mount, or a device that is set read-only "
        "('blockdev --setrw').",
    ),
    CopyUnusable: (
        "{path} on the backup cannot be the copy of the disk {disk}: {problem}.",
        "Put a raw or qcow2 image or a block device there, or name another path with standby.replace in the "
        "VM's file on the backup.",
    ),
    DiskError: (
        "The backup's copies of the disks could not follow the guest's; it runs on, unprotected.",
        "Look into 'journalctl -u curlingd' on both hosts.",
    ),
    DisksChanged: (
        "The VM's disks have changed while it was protected: {disks}.",
        "It runs on, unprotected, until it is tried again, which is done at once. A device that was "
        "plugged in after the VM's start cannot be replicated: start the VM anew with it on its command "
        "line.",
    ),
    DiskLogFull: (
        "The guest wrote more than {limit} to its disks before a checkpoint could take it.",
        "It runs on, and what was written is copied when it is protected again. If it happens again, see why "
        "checkpoints take so long (the link, the backup's disks), or raise disk_log_limit in the VM's file.",
    ),
    DiskLogFailed: (
        "What the guest writes to its disks could not be logged: {why}.",
        "It runs on and is protected again by itself; QEMU's log may say more.",
    ),
    DiskCopyFailed: (
        "The backup's copy of a disk, {path}, failed: {problem}.",
        "The guest runs on, unprotected. Make room there, or see with 'dmesg' what is wrong with the device; "
        "then the VM is protected again by itself.",
    ),
    NbdError: (
        "A disk's connection to QEMU broke the NBD protocol, or broke off: {problem}.",
        "See whether QEMU still runs, and what it and 'journalctl -u curlingd' say about its disks.",
    ),
    NbdRequestFailed: (
        "A disk's server failed {command} at byte {offset}: {words} (error {errno}).",
        "See what QEMU (or qemu-storage-daemon) and the kernel ('journalctl -k') say about the disk.",
    ),
}
"""Text and remedy, as in the table there."""


def _missing(error: CopyMissing) -> tuple[str, str]:
    return (
        f"There is no {error.path} on the backup, which is to hold the copy of the disk {error.disk}.",
        f"Make it there: {_make_image(error)}; or name another with standby.replace in the VM's file there.",
    )


def _wrong_format(error: CopyWrongFormat) -> tuple[str, str]:
    return (
        f"{error.path} on the backup, the copy of the disk {error.disk}, is {error.found} and not "
        f"{error.format}, as the VM's command line has it.",
        f"Make another one there, and lose what is in it: {_make_image(error)}; or correct standby.replace "
        "in the VM's file there.",
    )


def _wrong_size(error: CopyWrongSize) -> tuple[str, str]:
    how = "" if error.found < error.size else " --shrink"
    remedy = f"'qemu-img resize{how} -f {error.format} {error.path} {error.size}' there"
    if error.path.startswith("/dev/"):
        remedy = f"Make the device one of {error.size} bytes (a logical volume: 'lvresize -L {error.size}B')"
    else:
        remedy = f"Make it the same: {remedy}"
    return (
        f"{error.path} on the backup is of {error.found} bytes, and the disk {error.disk}, whose copy it is "
        f"to be, of {error.size}.",
        f"{remedy}; or name another with standby.replace in the VM's file there.",
    )


def _make_image(error: CopyMissing | CopyWrongFormat) -> str:
    if error.path.startswith("/dev/"):
        return f"a block device of {error.size} bytes, which holds {error.format}"
    return f"'qemu-img create -f {error.format} {error.path} {error.size}'"


FORMED: dict[type[CurlingError], Callable[[Any], tuple[str, str]]] = {
    CopyMissing: _missing,
    CopyWrongFormat: _wrong_format,
    CopyWrongSize: _wrong_size,
}
"""Those whose words depend on their facts."""
