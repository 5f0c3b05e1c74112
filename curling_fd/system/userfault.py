"""Freeing a guest that waits for a page to be saved by a snapshot that is not taken any more.

QEMU 7.2 ends a background snapshot that failed or was cancelled with its userfaultfd still open and the
guest's memory still write-protected by it: the next write of the guest waits for ever, and QEMU says that it
runs. (Seen on 7.2.22; 10.0.13 and 11.1.3 clean up.) And in every version the guest waits while QEMU cannot
get rid of the pages it saves first. With a duplicate of that userfaultfd the protection can be taken away.

Sources: pidfd_getfd(2), ioctl_userfaultfd(2). The guard uses this file too: nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

_PIDFD_GETFD = 438  # on every architecture
_UNREGISTER = 0x8010AA01
_WAKE = 0x8010AA02

_libc = ctypes.CDLL(None, use_errno=True)


def release(pid: int) -> None:
    """Let `pid` write to its memory again. A snapshot that is being taken is of no use afterwards.

    Raises:
        OSError: it has a userfaultfd, and we must not touch it.
    """
    for number in _userfaultfds(pid):
        fd = _duplicate(pid, number)
        try:
            for start, end in _mappings(pid):
                memory = struct.pack("QQ", start, end - start)
                try:
                    fcntl.ioctl(fd, _UNREGISTER, memory)
                    # Who waits for a page that was only write-protected is not woken by that.
                    fcntl.ioctl(fd, _WAKE, memory)
                except OSError:
                    continue  # none of this userfaultfd's
        finally:
            os.close(fd)


def _userfaultfds(pid: int) -> list[int]:
    numbers = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except FileNotFoundError:
                continue  # closed meanwhile
            if target == "anon_inode:[userfaultfd]":
                numbers.append(int(name))
    except (FileNotFoundError, ProcessLookupError):
        return []  # the process is gone, and nobody waits
    return numbers


def _duplicate(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        fd: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return fd
    finally:
        os.close(pidfd)


def _mappings(pid: int) -> list[tuple[int, int]]:
    """Start and end of all memory that `pid` can write to."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        entries = [line.split(maxsplit=2) for line in maps]
    ranges = [entry[0].split("-") for entry in entries if entry[1].startswith("rw")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
