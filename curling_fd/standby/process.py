"""The process of a standby QEMU: it dies with its daemon, until it has become the active VM."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Self

import trio

from curling_fd.errors import StandbyFailed
from curling_fd.system.guard import Guard

#: Bytes of what QEMU printed that are kept for people.
STDERR_KEPT = 8192

#: Seconds a QEMU may take to open its monitor.
START_TIMEOUT = 20.0

_POLL_SECONDS = 0.01


class StandbyProcess:
    """A QEMU that waits. Made by `start`; `close` or `release` ends our hold of it."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, stderr: int, guard: Guard) -> None:
        self._process = process
        self._pidfd = pidfd
        self._stderr = stderr
        self._guard = guard
        self.released = False

    @classmethod
    async def start(cls, argv: Sequence[str], fds: Sequence[int], qmp_path: str) -> Self:
        """Start `argv` and wait until its monitor at `qmp_path` listens.

        Args:
            fds: inherited by it under their own numbers; borrowed.

        Raises:
            StandbyFailed: it could not be started, or ended at once; with what it printed.
        """
        # A file without a name: QEMU may print as much as it likes and never waits for us to read it.
        stderr = os.memfd_create("curling-standby-stderr", os.MFD_CLOEXEC)
        try:
            process = subprocess.Popen(
                argv,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            os.close(stderr)
            raise StandbyFailed(f"{argv[0]} cannot be started: {error.strerror}") from None
        pidfd = os.pidfd_open(process.pid)
        standby = cls(process, pidfd, stderr, Guard.start_kill(pidfd))
        try:
            with trio.move_on_after(START_TIMEOUT):
                while not _listens(qmp_path):
                    if process.poll() is not None:
                        raise standby._ended()
                    await trio.sleep(_POLL_SECONDS)
                return standby
            raise StandbyFailed(f"it opened no monitor within {START_TIMEOUT:g} s", standby.stderr_tail())
        except BaseException:
            standby.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_failed(self) -> None:
        """Return never.

        Raises:
            StandbyFailed: the process ended.
        """
        await trio.lowlevel.wait_readable(self._pidfd)
        raise self._ended()

    def stderr_tail(self) -> str:
        """The end of what QEMU printed."""
        size = os.fstat(self._stderr).st_size
        start = max(0, size - STDERR_KEPT)
        return os.pread(self._stderr, STDERR_KEPT, start).decode("utf-8", "replace").strip()

    def release(self) -> None:
        """It is the active VM: it goes on when this daemon ends."""
        self.released = True
        self._guard.retire()

    def close(self) -> None:
        """End the process, unless it was released, and give up our hold of it."""
        if self._pidfd < 0:
            return
        if not self.released:
            self._guard.retire()
            if self._process.poll() is None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._process.wait()
        pidfd, self._pidfd = self._pidfd, -1
        os.close(pidfd)
        os.close(self._stderr)

    def _ended(self) -> StandbyFailed:
        status = self._process.wait()
        how = f"it exited with status {status}" if status >= 0 else f"signal {-status} ended it"
        return StandbyFailed(how, self.stderr_tail())


def _listens(path: str) -> bool:
    """Does the UNIX socket at `path` take connections? Asked without making one: a monitor has one client."""
    if not os.path.exists(path):
        return False
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.rstrip("\n").split(None, 7)
            # The flag __SO_ACCEPTCON (0x10000): it listens.
            if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & 0x10000:
                return True
    return False


