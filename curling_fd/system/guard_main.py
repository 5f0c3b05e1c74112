"""The guard's own process. Run by path, on the bare standard library, so that it starts in about 15 ms.

    python -I -S guard_main.py CONTROL PAGE DEADLINE_MS write FD PAYLOAD ANSWER QEMU PAUSED
    python -I -S guard_main.py CONTROL PAGE DEADLINE_MS kill PIDFD

CONTROL, PAGE, FD and PIDFD are inherited descriptors; QEMU is a process id, or 0. PAUSED says what becomes of
a guest that an operator has paused: `leave` it alone, or `stop` it again, for the will starts it. CONTROL
brings one byte: Q to end, S with a socket that is to be shut down before the will is written.
`curling_fd.system.guard` has the other half and says what all this is for.
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import os
import select
import signal
import sys
import time
from mmap import mmap

OURS = b"curling-guard"
"""What the ids of the will's commands begin with."""

NOT_YET = (b'"error"', b'"setup"', b'"active"', b'"device"', b'"failing"', b'"cancelling"')
"""What an answer contains when the will is to be written again: refusals, and states of a migration."""

DUE, ACTED, READY, PID, HOLD = 0, 1, 2, 3, 4
"""Words of the shared page: the monotonic nanosecond to act at (0: disarmed), how often we did, are we up,
our process id, and whether an operator has paused the guest."""

STATUS = b'{"execute":"query-status","id":"curling-guard-status"}\r\n'
STOP = b'{"execute":"stop","id":"curling-guard-stop"}\r\n'


WRITE_SECONDS = 1.0
ANSWER_SECONDS = 5.0
AGAIN_SECONDS = 0.02
"""How long the will's write may take, how long its connection is held open for the answer, and the pause
before it is written again."""


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


def write_until_obeyed(fd: int, payload: bytes, answer: bytes) -> None:
    """Write `payload` to `fd` (borrowed), again while QEMU refuses or is not done: it may be too early."""
    until = time.monotonic() + ANSWER_SECONDS
    while write_will(fd, payload):
        said = answers_from(fd, answer, until)
        if not any(word in said for word in NOT_YET) or time.monotonic() >= until:
            return
        time.sleep(AGAIN_SECONDS)


def stop_again(fd: int) -> None:
    """Stop the guest behind the monitor `fd` (borrowed) as soon as QEMU has started it."""
    until = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until and write_will(fd, STATUS):
        if b'"running": true' in answers_from(fd, b'"curling-guard-status"', until):
            if write_will(fd, STOP):
                answers_from(fd, b'"curling-guard-stop"', until)
            return
        time.sleep(AGAIN_SECONDS)


def answers_from(fd: int, last: bytes, until: float) -> bytes:
    """Read `fd` (borrowed) until the answer to our `last` command passes by; all answers to ours.

    QEMU throws away a command it has not begun when its connection closes, so we keep it open until then.
    """
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    said = line = b""
    while (left := until - time.monotonic()) > 0 and poller.poll(left * 1000):
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            continue
        except OSError:
            break
        if not data:
            break
        *lines, line = (line + data).split(b"\n")
        said += b"".join(whole for whole in lines if OURS in whole)
        if last in said:
            break
    return said


def free_guest(pid: int) -> None:
    """Let the guest of the QEMU `pid` write to its memory, whatever became of the snapshot."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from curling_fd.system.userfault import release

    try:
        release(pid)
    except OSError:
        pass


def receive(control: _socket.socket) -> tuple[bytes, int | None]:
    """A byte from the daemon, empty when it is gone, and the descriptor that came along, which is ours."""
    try:
        message, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(4))
    except ConnectionResetError:
        # The daemon went before it had read our R.
        return b"", None
    return message, int.from_bytes(ancillary[0][2][:4], sys.byteorder) if ancillary else None


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

    cut: _socket.socket | None = None

    def act(*, orphaned: bool) -> None:
        # Before the deed: a daemon that wakes up meanwhile must not believe that nothing happened.
        page[ACTED] += 1
        if cut is not None:
            try:
                cut.shutdown(_socket.SHUT_RDWR)
            except OSError:
                pass
        if kind == "kill":
            kill(target)
            return
        payload, answer, qemu = os.fsencode(argv[6]), os.fsencode(argv[7]), int(argv[8])
        if qemu:
            free_guest(qemu)  # QEMU itself may wait with it
        if not orphaned:
            write_will(target, payload)
            return
        paused = bool(page[HOLD])
        if paused and argv[9] == "leave":
            return
        write_until_obeyed(target, payload, answer)
        if paused:
            stop_again(target)
        if qemu:
            free_guest(qemu)

    page[PID] = os.getpid()
    page[READY] = 1
    daemon = _socket.socket(fileno=control)
    daemon.send(b"R")
    poller = select.poll()
    poller.register(control, select.POLLIN)
    armed = next_act = 0
    while True:
        due = page[DUE]
        if due != armed:
            armed = next_act = due
        # Whoever arms sets a time at least one deadline ahead, so while disarmed we can sleep that long.
        wait = max(0, next_act - time.monotonic_ns()) / 1e6 if armed else deadline_ms
        if poller.poll(wait + 1 if deadline_ms else None):
            message, fd = receive(daemon)
            if fd is not None:
                cut = _socket.socket(fileno=fd)
                continue
            if not message:
                act(orphaned=True)
            return
        if armed and page[DUE] == armed and time.monotonic_ns() >= next_act:
            # Once more after each deadline: the first may have come too early for QEMU to obey.
            next_act = time.monotonic_ns() + deadline_ms * 1_000_000
            act(orphaned=False)


if __name__ == "__main__":
    main(sys.argv)
    os._exit(0)
