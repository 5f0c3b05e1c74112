"""Processes that are not our children: started by the curlingd before this one.

They are known by a pidfd, so that a pid which was given to another process meanwhile cannot be mistaken for
theirs. Their exit status went to whoever was their parent; all that can be seen here is that they ended.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from typing import Protocol


class Process(Protocol):
    """What `subprocess.Popen` and `Inherited` have in common."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit status if the process has ended, else None."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, at most `timeout` seconds; the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        ...

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        ...


UNKNOWN = 1 << 16
"""The exit status of a process whose status went to another; no process has this one."""


class Inherited:
    """The process of `pidfd`, which is owned until `close`."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd
        self._ended = False
        self.pid = pid_of(pidfd)

    def poll(self) -> int | None:
        return UNKNOWN if self._over(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._over(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return UNKNOWN

    def kill(self) -> None:
        if not self._ended:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        """Forget the process. Idempotent."""
        if self._pidfd >= 0:
            self._ended = True
            pidfd, self._pidfd = self._pidfd, -1
            os.close(pidfd)

    def _over(self, timeout: float | None) -> bool:
        if not self._ended:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            self._ended = bool(poller.poll(None if timeout is None else timeout * 1000))
        return self._ended


def pid_of(pidfd: int) -> int:
    """The process id of `pidfd` (borrowed); -1 once the process was reaped. Source: proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    raise ValueError(f"{pidfd} is no pidfd")
