"""QEMU's locks on images: seen by it, and by us.

For each of QEMU's permissions there is a byte at 100 that says that somebody has it, and one at 200 that
somebody does not share it. Both are taken as shared locks, and whether they are taken is asked by trying for
an exclusive one. Locks are those of an open file description (OFD), fcntl(2).
Source: raw_apply_lock_bytes() and raw_check_lock_bytes() in QEMU's block/file-posix.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_HELD = 100
_UNSHARED = 200

_CONSISTENT_READ = 0
_WRITE = 1
_RESIZE = 3

#: struct flock where off_t has 64 bits: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")

#: Others may read beside us, but neither write nor resize.
_OURS = (_CONSISTENT_READ, _WRITE)
_NOT_SHARED = (_WRITE, _RESIZE)

#: A file system without such locks has none of QEMU's either.
_NO_LOCKS = frozenset({errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


def lock(fd: int) -> bool:
    """Take the locks of a writer on `fd` (borrowed), as QEMU would; they last until it is closed.

    Returns:
        False if another has the image open in a way that forbids it.
    """
    try:
        for permission in _OURS:
            _set(fd, _HELD + permission)
        for permission in _NOT_SHARED:
            _set(fd, _UNSHARED + permission)
        return free(fd)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise


def free(fd: int) -> bool:
    """Whether nobody else's locks forbid to write to `fd` (borrowed)."""
    try:
        return not any(
            [_taken(fd, _UNSHARED + permission) for permission in _OURS]
            + [_taken(fd, _HELD + permission) for permission in _NOT_SHARED]
        )
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise


def holders(fd: int, proc: Path = Path("/proc")) -> str:
    """Which other processes have the file behind `fd` (borrowed) open, for people."""
    ours = os.fstat(fd)
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if any(_same(entry, ours) for entry in (folder / "fd").iterdir()):
                name = (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
                found.append(f"{name} (pid {folder.name})")
        except OSError:
            continue  # it has ended, or is not ours to look at
    return ", ".join(found) or "by whom cannot be seen from here"


def _same(entry: Path, ours: os.stat_result) -> bool:
    try:
        theirs = entry.stat()
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def _set(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _taken(fd: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return bool(kind != fcntl.F_UNLCK)
