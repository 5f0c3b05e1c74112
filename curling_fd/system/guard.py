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

A guard outlives a restart of the daemon whose sockets systemd keeps: with the daemon's end of its control
socket kept as well, the daemon is not gone. `left` is what to keep, `inherit` takes it up again.

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

from curling_fd.system.guard_main import ACTED, DUE, HOLD, PID, READY
from curling_fd.system.process import Inherited, Process

MAIN = Path(__file__).with_name("guard_main.py")

LOST_HEARTBEAT = b'{"execute":"x-colo-lost-heartbeat","id":"curling-guard"}\r\n'
"""The will of a daemon that protects a VM: QEMU ends its checkpoint loop and the guest runs."""

ANSWER = b'"curling-guard"'
"""What QEMU's answer to LOST_HEARTBEAT contains; the guard holds the connection open until it has seen it."""

START_SECONDS = 10.0
RETIRE_SECONDS = 1.0


_left: list[Process] = []
"""Guards that live on without us, but are our children as long as we live."""


class GuardFailed(OSError):
    """The guard process did not start."""


class Guard:
    """The daemon's handle of one guard: from `start_write`, `start_kill` or `inherit`. Leaving its `with`
    retires it, unless it was `left`.

    `arm`, `disarm` and `acted` may be used from any thread, also after the guard is gone.

    Args:
        control: our end of the control socket; owned.
        page: the memfd of the shared page; owned.
        process: the guard's process.
    """

    def __init__(self, control: socket.socket, page: int, process: Process, deadline_ms: int) -> None:
        self._deadline_ns = deadline_ms * 1_000_000
        self._control = control
        self._control.setblocking(False)
        self._page_fd = page
        self._page: memoryview[int] | list[int] = memoryview(mmap(page, 4096)).cast("Q")
        self._process = process
        self._left = False

    @classmethod
    def _start(cls, will: list[str | bytes], fd: int, deadline_ms: int) -> Guard:
        # Both ends are close-on-exec, so no other child can hold our end open and hide our death.
        control, theirs = socket.socketpair()
        page = os.memfd_create("curling-guard")
        try:
            os.ftruncate(page, 4096)
            numbers = [str(theirs.fileno()), str(page), str(deadline_ms)]
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(MAIN), *numbers, *will],
                pass_fds=(theirs.fileno(), page, fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            control.close()
            os.close(page)
            raise GuardFailed(f"the guard process did not start: {error}") from error
        finally:
            theirs.close()
        guard = cls(control, page, process, deadline_ms)
        control.settimeout(START_SECONDS)
        try:
            ready = control.recv(1)
        except OSError:
            ready = b""
        if not ready:
            guard.close()
            raise GuardFailed("the guard process did not come up")
        control.setblocking(False)
        return guard

    @classmethod
    def inherit(cls, control: int, page: int, deadline_ms: int) -> Guard:
        """Take up the guard that the daemon before us has `left`.

        Args:
            control, page: the two descriptors, owned from here on.
            deadline_ms: the one it was started with.

        Raises:
            GuardFailed: it is not there any more.
        """
        sock = socket.socket(fileno=control)
        try:
            with mmap(page, 4096) as words:
                pid = memoryview(words).cast("Q")[PID]
            pidfd = os.pidfd_open(pid)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if not sock.recv(1, socket.MSG_PEEK):
                    os.close(pidfd)
                    raise OSError("its end of the control socket is closed")
        except (OSError, ValueError) as error:
            sock.close()
            os.close(page)
            raise GuardFailed(f"the guard process is gone: {error}") from error
        return cls(sock, page, Inherited(pidfd), deadline_ms)

    @classmethod
    def start_write(
        cls,
        fd: int,
        payload: bytes,
        deadline_ms: int,
        *,
        answer: bytes = ANSWER,
        snapshot_of: int = 0,
        starts_paused: bool = True,
    ) -> Guard:
        """Start a guard that writes `payload` to `fd`. Blocks for some 30 ms, until it is up.

        Args:
            fd: the connection; borrowed, the guard has a duplicate, so it stays open until the guard ends.
            payload: the bytes, without NUL.
            deadline_ms: how long after `arm` it acts; at least 1.
            answer: after our death the guard holds the connection open until this comes back, at most 5 s.
            starts_paused: the will starts a guest also if it is on `hold`, which is then stopped again; else
                the will of a guest on hold is not carried out.
            snapshot_of: id of a QEMU whose guest may be left waiting by a snapshot that is cut short.

        Raises:
            GuardFailed: it did not start.
        """
        if deadline_ms < 1:
            raise ValueError("a deadline is at least 1 ms")
        paused = "stop" if starts_paused else "leave"
        return cls._start(["write", str(fd), payload, answer, str(snapshot_of), paused], fd, deadline_ms)

    @classmethod
    def start_kill(cls, pidfd: int) -> Guard:
        """Start a guard that kills the process of `pidfd` (borrowed) when we are gone. Blocks for some 30 ms.

        Raises:
            GuardFailed: it did not start.
        """
        return cls._start(["kill", str(pidfd)], pidfd, 0)

    def cut(self, sock: socket.socket) -> None:
        """Have the guard shut `sock` down before it writes, in place of the one named before.

        Borrowed; the guard keeps a duplicate until it ends or is told of another, so that `sock` has to be
        shut down, not only closed, for its peer to see the end.
        """
        with contextlib.suppress(OSError):  # a guard that is gone does nothing anyway; see `alive`
            socket.send_fds(self._control, [b"S"], [sock.fileno()])

    @property
    def fds(self) -> dict[str, int]:
        """What `inherit` needs, by the names of its arguments; borrowed."""
        return {"control": self._control.fileno(), "page": self._page_fd}

    def leave(self) -> None:
        """Let `close` leave it as it is: somebody else holds duplicates of `fds`."""
        self.disarm()
        self._left = True
        _left.append(self._process)

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the guard is still there; once it is not, nobody carries out the will."""
        return self._page_fd >= 0 and self._page[READY] == 1 and self._process.poll() is None

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

    def hold(self, paused: bool) -> None:
        """An operator has `paused` the guest: after our death it is to stand still all the same."""
        self._page[HOLD] = paused

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
        if self._left:
            self.close()
            return
        self.disarm()
        try:
            self._control.send(b"Q")
            self._process.wait(RETIRE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.close()

    def close(self) -> None:
        """Kill the guard if it is still there, reap it and give up our end. Idempotent."""
        if self._page_fd < 0:
            return
        if not self._left:
            # Before our end is closed: a guard that sees that would act.
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        if isinstance(self._process, Inherited):
            self._process.close()
        self._control.close()
        page, self._page_fd = self._page_fd, -1
        os.close(page)
        # Not unmapped but let go: a thread may be arming. Afterwards words of our own take what it writes.
        self._page = list(self._page[: HOLD + 1])

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.retire()
