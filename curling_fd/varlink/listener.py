"""The UNIX socket a service listens on, when systemd did not hand one over."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat

import trio

from curling_fd.errors import ConfigError

_BACKLOG = 128


def open_listener(path: str, group: str | None = None, key: str = "control_socket") -> trio.SocketListener:
    """Listen on the UNIX socket `path`, open to its owner and, when named, to `group`.

    A socket file nobody listens on any more is replaced; one that is in use is not. The caller owns the
    listener and unlinks `path` when it is done.

    Args:
        path: of the socket; its directory must exist.
        group: a group's name.
        key: the configuration's name for `path`, for errors.

    Raises:
        ConfigError: the socket cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        gid = -1 if group is None else grp.getgrnam(group).gr_gid
        _remove_stale(path)
        # bind() takes the mode of the open socket: nobody else gets in between it and chmod().
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(path)
        if gid != -1:
            os.chown(path, -1, gid)
            os.chmod(path, 0o660)
        listening.listen(_BACKLOG)
    except KeyError:
        listening.close()
        raise ConfigError(path, f"there is no group {group!r} on this host", "control_group") from None
    except OSError as error:
        listening.close()
        raise ConfigError(path, f"cannot listen here: {error.strerror or error}", key) from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def _remove_stale(path: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            # Also what a plain file answers: that one is not ours to remove.
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
            return
    raise OSError("another service listens on it")
