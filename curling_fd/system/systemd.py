"""What systemd gives a service and wants to hear from it. Without systemd every call does nothing.

Sources: sd_listen_fds(3) (socket activation), sd_notify(3), sd_watchdog_enabled(3), and systemd's "File
Descriptor Store" page. All are a few environment variables and datagrams, and are spoken directly.

The store: while a service is restarted, systemd holds the descriptors it was given, and passes them to the
new process as it passes sockets. When the service is stopped it closes them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterable, MutableMapping
from functools import cache

from curling_fd.errors import ConfigError

FIRST_FD = 3
"""Where the passed sockets begin (SD_LISTEN_FDS_START)."""

BARRIER_SECONDS = 5.0
"""How long systemd may take to work off what it was sent."""


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
        message = "\n".join(" ".join(assignment.splitlines()) for assignment in assignments)
        # A manager that is busy or gone must not stop us.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(message.encode(errors="replace"), socket.MSG_DONTWAIT, _address(self._address))

    @property
    def keeps(self) -> bool:
        """Whether there is somebody to `keep` descriptors."""
        return bool(self._address)

    def keep(self, name: str, fd: int) -> None:
        """Put a duplicate of `fd` (borrowed) into the store, as `name` with a slash. See `settled`.

        Raises:
            OSError: it cannot be sent.
        """
        # FDPOLL=0: it stays there though its peer hangs up; we want to see that ourselves.
        message = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()
        with self._connected() as sock:
            socket.send_fds(sock, [message], [fd])

    def forget(self, names: Iterable[str]) -> None:
        """Have the store close what it keeps under `names`. See `settled`."""
        with self._connected() as sock:
            for name in names:
                sock.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())

    def settled(self) -> bool:
        """Wait until systemd has done what it was told; False if it does not answer.

        Blocks for some milliseconds, `BARRIER_SECONDS` at most. The process must not end before, for systemd
        would not know whose messages these were.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                with self._connected() as sock:
                    socket.send_fds(sock, [b"BARRIER=1"], [theirs])
            except OSError:
                return False
            finally:
                os.close(theirs)
            poller = select.poll()
            poller.register(ours, 0)
            return bool(poller.poll(BARRIER_SECONDS * 1000))
        finally:
            os.close(ours)

    def kept(self) -> dict[str, int]:
        """What the process before us left in the store: their names have a slash, a socket unit's has none.

        The caller owns the descriptors. They are in the store as well until it is told to `forget` them.
        """
        names = [name for name in self._fds if "/" in name]
        return {name: self._fds.pop(name) for name in names}

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.settimeout(BARRIER_SECONDS)
            sock.connect(_address(self._address))
        except BaseException:
            sock.close()
            raise
        return sock

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


def _address(given: str) -> str:
    """NOTIFY_SOCKET as an address; `@` stands for the NUL of an abstract one."""
    return "\0" + given[1:] if given.startswith("@") else given


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
