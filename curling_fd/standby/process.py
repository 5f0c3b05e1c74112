"""The process of a standby QEMU: it dies with its daemon, until it has become the active VM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import trio

from curling_fd.errors import StandbyFailed
from curling_fd.system.guard import Guard, GuardFailed
from curling_fd.system.memory import killed_for_memory
from curling_fd.system.process import UNKNOWN, Inherited, Process

#: Bytes of what QEMU printed that are kept for people.
STDERR_KEPT = 8192

#: Seconds a QEMU may take to open its monitor, and then to answer there: its devices may need drivers loaded.
START_TIMEOUT = 20.0

_POLL_SECONDS = 0.01

#: Seconds a killed QEMU is waited for.
_KILL_SECONDS = 1.0

_released: list[Process] = []
"""QEMUs that live on without us, but are still our children to reap."""


class StandbyProcess:
    """A QEMU that waits. Made by `start` or `inherit`; `close` or `release` ends our hold of it.

    Args:
        stderr: our end of the pipe it prints to; owned, like `pidfd`.
    """

    def __init__(self, process: Process, stderr: int, pidfd: int, guard: Guard | None = None) -> None:
        self._process = process
        self._stderr = stderr
        self._tail = b""
        self._pidfd = pidfd
        self._guard = guard
        self._left = False
        self._killed_before = killed_for_memory()
        self.released = False

    @classmethod
    async def start(cls, argv: Sequence[str], fds: Sequence[int], qmp_path: str) -> Self:
        """Start `argv` and wait until its monitor at `qmp_path` listens.

        Args:
            fds: inherited by it under their own numbers; borrowed.

        Raises:
            StandbyFailed: it could not be started, or ended at once; with what it printed.
        """
        reap()
        stderr, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # QEMU's end does not block either: what nobody reads is lost, and no guest ever waits for us.
            process = subprocess.Popen(
                argv,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=writer,
                start_new_session=True,
            )
        except OSError as error:
            os.close(stderr)
            raise StandbyFailed(f"{argv[0]} cannot be started: {error.strerror}") from None
        finally:
            os.close(writer)
        standby = cls(process, stderr, os.pidfd_open(process.pid))
        try:
            await standby._guarded()
            with trio.move_on_after(START_TIMEOUT):
                while not listens(qmp_path):
                    if process.poll() is not None:
                        raise standby._ended()
                    await trio.sleep(_POLL_SECONDS)
                return standby
            raise StandbyFailed(f"it opened no monitor within {START_TIMEOUT:g} s", standby.stderr_tail())
        except BaseException:
            standby.close()
            raise

    @classmethod
    def inherit(cls, fds: Mapping[str, int]) -> Self:
        """The QEMU that another process has left.

        Args:
            fds: what `leave` returned there; owned from here on.

        Raises:
            StandbyFailed: its guard is gone, which ends it.
        """
        try:
            guard = Guard.inherit(fds["control"], fds["page"], 0)
        except GuardFailed as error:
            os.close(fds["pidfd"])
            os.close(fds["stderr"])
            raise StandbyFailed(f"the guard of the waiting QEMU: {error}") from None
        return cls(Inherited(os.dup(fds["pidfd"])), fds["stderr"], fds["pidfd"], guard)

    def leave(self) -> dict[str, int]:
        """Let `close` leave it waiting; the descriptors that `inherit` needs, borrowed until then."""
        assert self._guard is not None
        self._guard.leave()
        self._left = True
        return {**self._guard.fds, "pidfd": self._pidfd, "stderr": self._stderr}

    async def _guarded(self) -> None:
        _be_an_ordinary_victim(self._process.pid)
        try:
            # A thread's work: it takes some 30 ms, and more on a busy host.
            self._guard = await trio.to_thread.run_sync(Guard.start_kill, self._pidfd)
        except GuardFailed as error:
            raise StandbyFailed(f"nobody would end it with curlingd: {error}") from None

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    async def wait_failed(self) -> None:
        """Return never; meanwhile keep what QEMU prints. For one task at a time.

        Raises:
            StandbyFailed: the process ended.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen_to_stderr)
            await trio.lowlevel.wait_readable(self._pidfd)
            nursery.cancel_scope.cancel()
        raise self._ended()

    def stderr_tail(self) -> str:
        """The end of what QEMU printed."""
        self._read_stderr()
        return self._tail.decode("utf-8", "replace").strip()

    def release(self) -> None:
        """It is the active VM: it goes on when this daemon ends."""
        self.released = True
        if self._guard is not None:
            self._guard.retire()

    def close(self) -> None:
        """End the process, unless it was released or left, and give up our hold of it. Idempotent."""
        if self._pidfd < 0:
            return
        if not self._left and not self.released:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                # One that hangs in the kernel must not make us hang.
                self._process.wait(_KILL_SECONDS)
        if self._guard is not None:
            self._guard.retire()
        if isinstance(self._process, Inherited):
            self._process.close()
        elif self._process.poll() is None:
            _released.append(self._process)
        if not self._left:
            self._read_stderr()
        pidfd, self._pidfd = self._pidfd, -1
        stderr, self._stderr = self._stderr, -1
        os.close(pidfd)
        os.close(stderr)

    async def _listen_to_stderr(self) -> None:
        while self._read_stderr():
            await trio.lowlevel.wait_readable(self._stderr)

    def _read_stderr(self) -> bool:
        """Take what is there; False once QEMU can print no more."""
        while self._stderr >= 0:
            try:
                data = os.read(self._stderr, 65536)
            except BlockingIOError:
                return True
            if not data:
                break
            self._tail = (self._tail + data)[-STDERR_KEPT:]
        return False

    def _ended(self) -> StandbyFailed:
        status = self._process.wait()
        if killed_for_memory() > self._killed_before:
            how = "the kernel killed it, because curlingd's control group or this host is out of memory"
        elif status == UNKNOWN:
            how = "it ended"
        else:
            how = f"it exited with status {status}" if status >= 0 else f"signal {-status} ended it"
        return StandbyFailed(how, self.stderr_tail())


def reap() -> None:
    """Take the exit status of released VMs that have ended, so that no zombie stays."""
    _released[:] = [process for process in _released if process.poll() is None]


def listens(path: str) -> bool:
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


def _be_an_ordinary_victim(pid: int) -> None:
    """Undo for QEMU what the unit does for curlingd: when memory is short, a VM is not to be spared.

    Raising the score back to 0 needs no privilege. A QEMU that has ended meanwhile has none.
    """
    if int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii")) < 0:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("0", encoding="ascii")
