"""A guard: a small process that carries out the daemon's last will.

QEMU stopped in the middle of a checkpoint stays stopped until somebody tells it that the peer is gone, and
a standby whose daemon died must not stay behind. The daemon cannot do either once it is dead or frozen. So
it starts a child beforehand that holds a descriptor of its own and does one thing:

    write   put bytes on a connection, for instance x-colo-lost-heartbeat on the daemon's QMP connection
    kill    SIGKILL the process of a pidfd

and does it when
    the daemon is gone        its end of the control socket is closed, by whatever death
    the daemon is frozen      armed, and not disarmed for the deadline (only `write`)

QEMU that waits for a frozen daemon to read on obeys nobody, for it writes a checkpoint with its main loop
locked. So the guard can be given the socket of the migration as well, and shuts it down before it writes.

Arming and disarming store one word in a page both share: no system call, no wake-up of another process
while the guest stands still. The guard looks at the page once per deadline. Being late is bounded by the
scheduler alone: whoever arms sets a time one deadline ahead, so a guard that slept one deadline cannot have
missed it.

The guard has its own session and ignores SIGTERM, SIGINT and SIGHUP: what stops the daemon must not stop
its guard. A unit that runs the daemon needs KillMode=process for the same reason.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from mmap import mmap
from pathlib import Path

import trio

from curling_fd.system.guard_main import ACTED, DUE, READY

MAIN = Path(__file__).with_name("guard_main.py")

LOST_HEARTBEAT = b'{"execute":"x-colo-lost-heartbeat","id":"curling-guard"}\r\n'
"""The will of a daemon that protects a VM: QEMU ends its checkpoint loop and the guest runs."""

ANSWER = b'"curling-guard"'
"""What QEMU's answer to LOST_HEARTBEAT contains; the guard holds the connection open until it has seen it."""

START_SECONDS = 10.0
RETIRE_SECONDS = 1.0


class GuardFailed(OSError):
    """The guard process did not start."""


class Guard:
    """The daemon's handle of one guard, from `start_write` or `start_kill`. Leaving its `with` retires it.

    `arm`, `disarm` and `acted` may be used from any thread, also after the guard is gone.
    """

    def __init__(self, will: list[str | bytes], fd: int, deadline_ms: int) -> None:
        self._deadline_ns = deadline_ms * 1_000_000
        # Both ends are close-on-exec, so no other child can hold our end open and hide our death.
        self._control, theirs = socket.socketpair()
        page_fd = os.memfd_create("curling-guard")
        try:
            os.ftruncate(page_fd, 4096)
            self._page: memoryview[int] | list[int] = memoryview(mmap(page_fd, 4096)).cast("Q")
            numbers = [str(theirs.fileno()), str(page_fd), str(deadline_ms)]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(MAIN), *numbers, *will],
                pass_fds=(theirs.fileno(), page_fd, fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._control.close()
            raise GuardFailed(f"the guard process did not start: {error}") from error
        finally:
            os.close(page_fd)
            theirs.close()
        self._control.settimeout(START_SECONDS)
        try:
            ready = self._control.recv(1)
        except OSError:
            ready = b""
        if not ready:
            self.close()
            raise GuardFailed("the guard process did not come up")
        self._control.setblocking(False)

    @classmethod
    def start_write(
        cls, fd: int, payload: bytes, deadline_ms: int, *, answer: bytes = ANSWER, snapshot_of: int = 0
    ) -> Guard:
        """Start a guard that writes `payload` to `fd`. Blocks for some 30 ms, until it is up.

        Args:
            fd: the connection; borrowed, the guard has a duplicate, so it stays open until the guard ends.
            payload: the bytes, without NUL.
            deadline_ms: how long after `arm` it acts; at least 1.
            answer: after our death the guard holds the connection open until this comes back, at most 5 s.
            snapshot_of: id of a QEMU whose guest may be left waiting by a snapshot that is cut short.

        Raises:
            GuardFailed: it did not start.
        """
        if deadline_ms < 1:
            raise ValueError("a deadline is at least 1 ms")
        return cls(["write", str(fd), payload, answer, str(snapshot_of)], fd, deadline_ms)

    @classmethod
    def start_kill(cls, pidfd: int) -> Guard:
        """Start a guard that kills the process of `pidfd` (borrowed) when we are gone. Blocks for some 30 ms.

        Raises:
            GuardFailed: it did not start.
        """
        return cls(["kill", str(pidfd)], pidfd, 0)

    def cut(self, sock: socket.socket) -> None:
        """Have the guard shut `sock` down before it writes, in place of the one named before.

        Borrowed; the guard keeps a duplicate until it ends or is told of another, so that `sock` has to be
        shut down, not only closed, for its peer to see the end.
        """
        with contextlib.suppress(OSError):  # a guard that is gone does nothing anyway; see `alive`
            socket.send_fds(self._control, [b"S"], [sock.fileno()])

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the guard is still there; once it is not, nobody carries out the will."""
        return self._page[READY] == 1 and self._process.poll() is None

    @property
    def acted(self) -> bool:
        """Whether the deadline has passed while armed, and the will was carried out."""
        return self._page[ACTED] > 0

    def arm(self) -> None:
        """Act one deadline from now, and after each one that follows, unless disarmed or armed again before.

        Costs less than a microsecond.
        """
        self._page[DUE] = time.monotonic_ns() + self._deadline_ns

    def disarm(self) -> None:
        """Do not act for now; our death still counts."""
        self._page[DUE] = 0

    async def put_off(self) -> None:
        """Put the deadline off again and again while armed, so that it passes when Trio's loop stands still.

        Runs until cancelled. Whoever uses it arms and disarms from Trio's own thread.
        """
        while True:
            if self._page[DUE]:
                self.arm()
            await trio.sleep(self._deadline_ns / 3e9)

    def retire(self) -> None:
        """End the guard without its acting, and reap it. Returns within milliseconds."""
        self.disarm()
        try:
            self._control.send(b"Q")
            self._process.wait(RETIRE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.close()

    def close(self) -> None:
        """Kill the guard if it is still there, reap it and give up our end. Idempotent."""
        # Before our end is closed: a guard that sees that would act.
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._control.close()
        # Not unmapped but let go: a thread may be arming. Afterwards words of our own take what it writes.
        self._page = list(self._page[: READY + 1])

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.retire()
