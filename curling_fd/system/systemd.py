"""What systemd gives a service and wants to hear from it. Without systemd every call does nothing.

Sources: sd_listen_fds(3) (socket activation), sd_notify(3), sd_watchdog_enabled(3). All three are a few
environment variables and datagrams, and are spoken directly.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping
from functools import cache

from curling_fd.errors import ConfigError

FIRST_FD = 3
"""Where the passed sockets begin (SD_LISTEN_FDS_START)."""


class ServiceManager:
    """What the environment of a service says.

    The variables are taken out of `environ`: a QEMU we start must not believe they were meant for it. The
    passed descriptors are owned, and close-on-exec from here on.
    """

    def __init__(
        self, environ: MutableMapping[str, str], pid: int | None = None, first_fd: int = FIRST_FD
    ) -> None:
        pid = os.getpid() if pid is None else pid
        take = {key: environ.pop(key, "") for key in _VARIABLES}
        self._address = take["NOTIFY_SOCKET"]
        self._watchdog: float | None = None
        if take["WATCHDOG_PID"] in ("", str(pid)) and take["WATCHDOG_USEC"].isdigit():
            self._watchdog = int(take["WATCHDOG_USEC"]) / 1_000_000 or None
        self._fds: dict[str, int] = {}
        if take["LISTEN_PID"] == str(pid) and take["LISTEN_FDS"].isdigit():
            # A name may hold no colon, so the list is split safely; two sockets of one name leave the first.
            names = take["LISTEN_FDNAMES"].split(":") if take["LISTEN_FDNAMES"] else []
            for index in range(int(take["LISTEN_FDS"])):
                os.set_inheritable(first_fd + index, False)
                self._fds.setdefault(names[index] if index < len(names) else "unknown", first_fd + index)

    def is_activated(self, name: str) -> bool:
        """Whether a socket was passed under FileDescriptorName=`name`."""
        return name in self._fds

    def activated(self, name: str) -> socket.socket | None:
        """The listening UNIX socket passed under `name`, or None. The caller owns it: it is a duplicate.

        Raises:
            ConfigError: what was passed is something else.
        """
        if name not in self._fds:
            return None
        passed = socket.socket(fileno=os.dup(self._fds[name]))
        kind = (passed.family, passed.type)
        if kind != (socket.AF_UNIX, socket.SOCK_STREAM) or not _is_listening(passed):
            passed.close()
            raise ConfigError("curlingd.socket", f"{name!r} is no listening UNIX socket", "ListenStream")
        return passed

    def notify(self, *assignments: str) -> None:
        """Tell the manager `assignments`, such as READY=1 or STATUS=words, in one message.

        A line break in one would begin another: it is sent as a blank.
        """
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        message = "\n".join(" ".join(assignment.splitlines()) for assignment in assignments)
        # A manager that is busy or gone must not stop us.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(message.encode(errors="replace"), socket.MSG_DONTWAIT, address)

    @property
    def watchdog(self) -> float | None:
        """Seconds within which WATCHDOG=1 must be sent, or None."""
        return self._watchdog


_VARIABLES = (
    "LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID",
    "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC",
)  # fmt: skip


@cache
def manager() -> ServiceManager:
    """The manager of this process."""
    return ServiceManager(os.environ)


def activated(name: str) -> socket.socket | None:
    """See `ServiceManager.activated`."""
    return manager().activated(name)


def is_activated(name: str) -> bool:
    """See `ServiceManager.is_activated`."""
    return manager().is_activated(name)


def notify(*assignments: str) -> None:
    """See `ServiceManager.notify`."""
    manager().notify(*assignments)


def watchdog_interval() -> float | None:
    """See `ServiceManager.watchdog`."""
    return manager().watchdog


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
