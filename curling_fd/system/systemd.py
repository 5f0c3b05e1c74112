"""What systemd gives a service and wants to hear from it; nothing happens without systemd.

Socket activation is sd_listen_fds(3), notification sd_notify(3), both spoken directly.
"""

from __future__ import annotations

import os
import socket

_FIRST_FD = 3


def activated(name: str) -> socket.socket | None:
    """The listening socket systemd passed under FileDescriptorName=`name`, owned by the caller; or None."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for index in range(int(os.environ.get("LISTEN_FDS", "0"))):
        if index < len(names) and names[index] == name:
            os.set_inheritable(_FIRST_FD + index, False)
            return socket.socket(fileno=_FIRST_FD + index)
    return None


def notify(*assignments: str) -> None:
    """Send `assignments` such as READY=1 to the service manager, if there is one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(assignments).encode(), address)
        except OSError:
            pass  # a manager that does not listen must not stop us


def watchdog_interval() -> float | None:
    """Seconds within which WATCHDOG=1 must be sent, or None."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1_000_000 if microseconds.isdigit() else None
