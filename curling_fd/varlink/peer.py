"""Who is at the other end of a UNIX socket, as the kernel recorded it when they connected (unix(7),
socket(7))."""

from __future__ import annotations

import errno
import socket
import struct

import trio
from attrs import frozen

# Not in Python's socket module; 59 on every architecture with asm-generic/socket.h (x86, arm, riscv, ppc,
# s390).
_SO_PEERGROUPS = 59
_MOST_BYTES = 1024  # what Python's getsockopt takes: 256 groups


@frozen
class Peer:
    """A process. `gids` holds its primary and supplementary groups; `pid` may be another process by now."""

    pid: int
    uid: int
    gids: frozenset[int]


def peer_of(connection: trio.socket.SocketType) -> Peer:
    """Return who connected. The socket is borrowed.

    Raises:
        OSError: it is not a connected UNIX socket.
    """
    pid, uid, gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_BYTES)
    except OSError as error:
        # More groups than fit: they count as none, which can only take rights away.
        if error.errno != errno.ERANGE:
            raise
        packed = b""
    return Peer(pid, uid, frozenset((gid, *(group for (group,) in struct.iter_unpack("=I", packed)))))
