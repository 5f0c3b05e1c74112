"""Which disks of a VM are replicated, and what each is: out of what QEMU tells of its drives. No I/O.

Every disk that the guest can write is, unless the VM's file says that its content may be lost. Disks that are
only read, CD-ROMs among them, are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from attrs import frozen

from curling_fd.disk.errors import DiskUnfit
from curling_fd.disk.log import MAX_DISKS
from curling_fd.errors import FrameError, WritableDisk

#: QEMU's drivers whose node shows a file's bytes as they are.
_RAW = frozenset({"raw", "file", "host_device"})

#: What a copy can be of.
FORMATS = ("raw", "qcow2")

#: Bytes; no disk is larger, whatever a peer says.
_MOST_BYTES = 1 << 50

#: A disk's size is a multiple of it: of the smallest block that a guest can write.
SECTOR = 512


@frozen
class Disk:
    """A disk that is replicated.

    Attributes:
        name: as in shared_disks and scratch_disks: QEMU's name of the device, or of its node.
        size: bytes that the guest sees.
        format: of the file, one of FORMATS.
        path: of the file or the device on the host where the VM runs.
        node: QEMU's node that the guest's device uses there; empty on the backup.
    """

    name: str
    size: int
    format: str
    path: str
    node: str = ""

    def show(self, path: str, state: str, dirty: int | None = None) -> dict[str, Any]:
        """As the control interface's type `Disk`; `path` is that on the host that shows it."""
        return {
            "name": self.name,
            "path": path,
            "format": self.format,
            "size_bytes": self.size,
            "state": state,
            "dirty_bytes": dirty,
        }

    def encode(self) -> dict[str, Any]:
        """As DEFINE has it."""
        return {"name": self.name, "size": self.size, "format": self.format, "path": self.path}


def decode(content: object) -> tuple[Disk, ...]:
    """The disks in a DEFINE.

    Raises:
        FrameError: it is no list of disks.
    """
    if not isinstance(content, list) or len(content) > MAX_DISKS:
        raise FrameError("a description of a VM whose `disks` are no list")
    return tuple(_decode(entry) for entry in content)


def _decode(entry: object) -> Disk:
    if isinstance(entry, dict):
        name, size, form, path = (entry.get(key) for key in ("name", "size", "format", "path"))
        words = isinstance(name, str) and isinstance(path, str) and "\0" not in name + path
        sized = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= _MOST_BYTES
        if words and sized and form in FORMATS:
            assert isinstance(name, str) and isinstance(path, str) and isinstance(size, int)
            return Disk(name, size, str(form), path)
    raise FrameError("a description of a VM with a disk that is none")


def replicated(
    drives: Sequence[Mapping[str, Any]],
    jobs: Sequence[Mapping[str, Any]],
    shared: Collection[str],
    scratch: Collection[str],
) -> tuple[Disk, ...]:
    """The disks to replicate, in QEMU's order.

    Args:
        drives: the answer to `query-block`.
        jobs: that to `query-block-jobs`, without our own.
        shared, scratch: names of disks that the VM's file excepts.

    Raises:
        WritableDisk: the guest can write to a shared disk.
        DiskUnfit: one cannot be replicated.
    """
    found, written = [], []
    for drive in drives:
        inserted = drive.get("inserted")
        if inserted is None or inserted["ro"]:
            continue
        names = aliases(drive)
        if names & set(scratch):
            continue
        if names & set(shared):
            written.append(name_of(drive))
        else:
            found.append(_disk(name_of(drive), inserted))
    if written:
        raise WritableDisk(tuple(written))
    if found and jobs:
        job = jobs[0]
        raise DiskUnfit(
            found[0].name,
            f"a block job of QEMU's is under way ({job.get('type')}, called {job.get('device')})",
            "End it or wait for its end ('query-block-jobs' on QEMU's monitor shows it): a mirror, a "
            "backup or a commit of a disk cannot be done beside Curling's own",
        )
    return tuple(found)


def path_of(drives: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """The file of the disk called `name`, out of the answer to `query-block`; None if there is no such disk.

    Raises:
        DiskUnfit: it has none.
    """
    for drive in drives:
        if drive.get("inserted") is not None and name_of(drive) == name:
            return _path(name, str(drive["inserted"]["file"]))
    return None


def name_of(drive: Mapping[str, Any]) -> str:
    """What a drive is called: names that somebody has given before those that QEMU makes up."""
    inserted = drive.get("inserted") or {}
    return str(drive.get("device") or _id(drive.get("qdev")) or inserted.get("node-name"))


def aliases(drive: Mapping[str, Any]) -> set[str]:
    """Everything a drive may be called in the VM's file."""
    inserted = drive.get("inserted") or {}
    found = (drive.get("device"), inserted.get("node-name"), _id(drive.get("qdev")))
    return {name for name in found if name}


def _id(qdev: str | None) -> str | None:
    """The id in a QOM path such as `/machine/peripheral/disk0/virtio-backend`."""
    parts = (qdev or "").split("/")
    return parts[3] if len(parts) > 3 and parts[2] == "peripheral" else qdev


def _disk(name: str, inserted: Mapping[str, Any]) -> Disk:
    driver, image = str(inserted["drv"]), inserted["image"]
    form = "raw" if driver in _RAW else driver
    if form not in FORMATS:
        raise DiskUnfit(
            name,
            f"its format is {driver}, and only raw and qcow2 are replicated",
            "Convert it ('qemu-img convert'), or list it under scratch_disks if its content may be lost",
        )
    if inserted.get("encrypted") or image.get("encrypted"):
        raise DiskUnfit(
            name,
            "QEMU encrypts it, and the copy would have to be",
            "Have the guest encrypt it instead, or list it under scratch_disks if its content may be lost",
        )
    size = int(image["virtual-size"])
    if size % SECTOR or not size:
        raise DiskUnfit(
            name,
            f"its size of {size} bytes is no multiple of {SECTOR}",
            "Make it one with 'qemu-img resize' while the VM does not run",
        )
    return Disk(name, size, form, _path(name, str(inserted["file"])), str(inserted["node-name"]))


def _path(name: str, filename: str) -> str:
    """The file behind what QEMU calls the name of a node's file."""
    path = filename
    if filename.startswith("json:"):
        path = _innermost(filename.removeprefix("json:"))
    for prefix in ("file:", "host_device:"):
        path = path.removeprefix(prefix)
    if not path.startswith("/"):
        raise DiskUnfit(
            name,
            f"it is not a file or a device with an absolute path: {filename}",
            "Start the VM with the whole path of a local file or device. A disk on storage that both hosts "
            "see cannot be protected: what is written there cannot be held back until its checkpoint is "
            "safe",
        )
    return path


def _innermost(text: str) -> str:
    try:
        node = json.loads(text)
    except ValueError:
        return ""
    while isinstance(node, dict) and isinstance(node.get("file"), dict):
        node = node["file"]
    usable = isinstance(node, dict) and node.get("driver") in ("file", "host_device")
    return str(node.get("filename", "")) if usable else ""
