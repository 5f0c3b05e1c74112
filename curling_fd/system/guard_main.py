"""The guard's own process. Run by path, on the bare standard library, so that it starts in about 15 ms.

    python -I -S guard_main.py CONTROL PAGE DEADLINE_MS write FD PAYLOAD ANSWER
    python -I -S guard_main.py CONTROL PAGE DEADLINE_MS kill PIDFD

CONTROL, PAGE, FD and PIDFD are inherited descriptors. `curling_fd.system.guard` has the other half and says
what all this is for.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from mmap import mmap

DUE, ACTED, READY = 0, 1, 2
"""Words of the shared page: the monotonic nanosecond to act at (0: disarmed), how often we did, are we up."""

WRITE_SECONDS = 1.0
ANSWER_SECONDS = 5.0
"""How long the will's write may take, and how long its connection is held open for the answer."""


def write_will(fd: int, payload: bytes) -> bool:
    """Write `payload` to `fd` (borrowed), giving up after WRITE_SECONDS."""
    os.set_blocking(fd, False)
    until = time.monotonic() + WRITE_SECONDS
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    while payload:
        try:
            payload = payload[os.write(fd, payload) :]
        except BlockingIOError:
            left = until - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                return False
        except OSError:
            return False
    return True


def hold_until_answered(fd: int, answer: bytes) -> None:
    """Read `fd` (borrowed) until `answer` passes by.

    QEMU throws away a command it has not begun when its connection closes, so we keep it open until then.
    """
    until = time.monotonic() + ANSWER_SECONDS
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    seen = b""
    while (left := until - time.monotonic()) > 0 and poller.poll(left * 1000):
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            continue
        except OSError:
            return
        seen = seen[-len(answer) :] + data
        if not data or answer in seen:
            return


def kill(pidfd: int) -> None:
    """Kill the process of `pidfd` (borrowed) if it still runs."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass


def main(argv: list[str]) -> None:
    """Wait for the daemon's end or its deadline, and act."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control, page_fd, deadline_ms = int(argv[1]), int(argv[2]), int(argv[3])
    kind, target = argv[4], int(argv[5])
    page = memoryview(mmap(page_fd, 4096)).cast("Q")
    os.close(page_fd)
    with open("/proc/self/comm", "w") as comm:
        comm.write("curling-guard")

    def act() -> None:
        # Before the deed: a daemon that wakes up meanwhile must not believe that nothing happened.
        page[ACTED] += 1
        if kind == "write":
            write_will(target, os.fsencode(argv[6]))
        else:
            kill(target)

    page[READY] = 1
    os.write(control, b"R")
    poller = select.poll()
    poller.register(control, select.POLLIN)
    done = 0
    while True:
        # Whoever arms sets a time at least one deadline ahead, so while disarmed we can sleep that long.
        due = page[DUE]
        wait = deadline_ms if due in (0, done) else max(0, due - time.monotonic_ns()) / 1e6
        if poller.poll(wait + 1 if deadline_ms else None):
            try:
                message = os.read(control, 1)
            except ConnectionResetError:
                # The daemon went before it had read our R.
                message = b""
            if not message:
                act()
                if kind == "write":
                    hold_until_answered(target, os.fsencode(argv[7]))
            return
        due = page[DUE]
        if due not in (0, done) and time.monotonic_ns() >= due:
            done = due
            act()


if __name__ == "__main__":
    main(sys.argv)
    os._exit(0)
