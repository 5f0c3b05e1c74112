"""Can what is at a path be the backup's copy of a disk? Asked without changing anything."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from attrs import frozen

from curling_fd.disk.locks import free, holders
from curling_fd.disk.qcow2_header import ENOUGH, read_header
from curling_fd.disk.spec import SECTOR, CopySpec
from curling_fd.errors import (
    CopyBacked,
    CopyInUse,
    CopyMissing,
    CopyReadOnly,
    CopyUnusable,
    CopyWrongFormat,
    CopyWrongSize,
)

#: How images of other kinds begin, so that they can be named.
_OTHERS = {b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc", b"QED\0": "qed", b"LUKS\xba\xbe": "luks"}

_BLKROGET = 0x125E  # linux/fs.h

_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_BUSY = frozenset({errno.EBUSY, errno.ETXTBSY})


@frozen
class OpenFile:
    """`fd`, owned by whoever has this, is open for reading and writing. `device`: a block device."""

    fd: int
    device: bool


def open_checked(spec: CopySpec) -> OpenFile:
    """Open what is to be a copy, if it can be one.

    Raises:
        CopyUnfit: why it cannot be.
    """
    disk, path = spec.disk, spec.path
    if spec.format not in ("raw", "qcow2"):
        raise CopyUnusable(disk, path, f"Curling keeps copies in raw and qcow2 images, not in {spec.format}")
    try:
        mode = os.stat(path).st_mode
        device = stat.S_ISBLK(mode)
        if not device and not stat.S_ISREG(mode):
            raise CopyUnusable(disk, path, "it is neither a file nor a block device")
        # For a block device O_EXCL is asking whether it is mounted, a part of another one, or swap.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | (os.O_EXCL if device else 0))
    except OSError as error:
        problem = error.strerror or str(error)
        if error.errno == errno.ENOENT:
            raise CopyMissing(disk, path, spec.format, spec.size) from None
        if error.errno in _READ_ONLY:
            raise CopyReadOnly(disk, path, problem) from None
        if error.errno in _BUSY:
            raise CopyInUse(disk, path, f"{problem}; see 'lsblk' and 'findmnt'") from None
        raise CopyUnusable(disk, path, problem) from None
    try:
        try:
            # The kernel opens it all the same, and then refuses to write.
            if device and _read_only(fd):
                raise CopyReadOnly(disk, path, "the device is set read-only")
            _check_content(spec, fd)
            if not free(fd):
                raise CopyInUse(disk, path, holders(fd))
        except OSError as error:
            raise CopyUnusable(disk, path, f"it cannot be read: {error.strerror or error}") from None
    except BaseException:
        os.close(fd)
        raise
    return OpenFile(fd, device)


def check_copy(spec: CopySpec) -> None:
    """Say why what is there cannot be a copy.

    Raises:
        CopyUnfit: the reason.
    """
    os.close(open_checked(spec).fd)


def _read_only(fd: int) -> bool:
    return any(fcntl.ioctl(fd, _BLKROGET, bytes(4)))


def _check_content(spec: CopySpec, fd: int) -> None:
    disk, path = spec.disk, spec.path
    beginning = os.pread(fd, ENOUGH, 0)
    header = read_header(beginning)
    size = os.lseek(fd, 0, os.SEEK_END)
    if spec.format == "raw":
        if -(-size // SECTOR) * SECTOR == spec.whole:
            return  # whatever it begins with is the guest's
        other = "qcow2" if header else next((n for m, n in _OTHERS.items() if beginning.startswith(m)), None)
        if other:
            raise CopyWrongFormat(disk, path, "raw", other, spec.size)
        raise CopyWrongSize(disk, path, "raw", size, spec.size)
    if header is None:
        other = next((name for magic, name in _OTHERS.items() if beginning.startswith(magic)), "raw")
        raise CopyWrongFormat(disk, path, "qcow2", other, spec.size)
    if header.backing is not None:
        raise CopyBacked(disk, path, header.backing)
    if header.problem is not None:
        raise CopyUnusable(disk, path, header.problem)
    if -(-header.size // SECTOR) * SECTOR != spec.whole:
        raise CopyWrongSize(disk, path, "qcow2", header.size, spec.size)
