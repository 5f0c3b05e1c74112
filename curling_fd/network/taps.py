"""Taps: made for good for a VM, or for a moment to put frames into the kernel.

Sources: Documentation/networking/tuntap.rst of the kernel, include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from curling_fd.errors import NetlinkError
from curling_fd.network.port import Port

_TUNSETIFF = 0x4004_54CA
_TUNSETPERSIST = 0x4004_54CB
_TUNSETOWNER = 0x4004_54CC
_TUNSETGROUP = 0x4004_54CE

_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000

_IFREQ = struct.Struct("16sH22x")


def open_tun() -> int:
    """A descriptor for one tap in the network name space that the calling thread is in; the caller owns it.

    Raises:
        NetlinkError: this host has no taps.
    """
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refused("/dev/net/tun, which makes taps", error) from None


def make_tap(fd: int, port: Port) -> None:
    """Make the tap of `port`, which stays until it is deleted; or nothing.

    Args:
        fd: of open_tun, borrowed; when it is closed QEMU can open the tap.

    Raises:
        NetlinkError: EBUSY, there is an interface of that name; EPERM.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    if port.multi_queue:
        flags |= _IFF_MULTI_QUEUE
    what = f"a new tap {port.name}"
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(port.name.encode(), flags))
        if port.owner is not None:
            fcntl.ioctl(fd, _TUNSETOWNER, port.owner)
        if port.group is not None:
            fcntl.ioctl(fd, _TUNSETGROUP, port.group)
        # Last: should anything have failed, the tap goes with the descriptor.
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    except OSError as error:
        raise _refused(what, error) from None


def make_passing_tap(fd: int, pattern: str) -> str:
    """Make a tap that is gone when `fd`, of open_tun and borrowed, is closed; returns its name.

    Args:
        pattern: of the name, with %d for a number that is free.
    """
    try:
        made = bytearray(_IFREQ.pack(pattern.encode(), _IFF_TAP | _IFF_NO_PI))
        fcntl.ioctl(fd, _TUNSETIFF, made)
    except OSError as error:
        raise _refused("a tap to announce addresses from", error) from None
    return bytes(made[:16]).split(b"\0", 1)[0].decode()


def _refused(what: str, error: OSError) -> NetlinkError:
    number = error.errno or errno.EIO
    return NetlinkError(what, number, os.strerror(number))
