"""Guards with a daemon that dies or freezes: a helper process stands for the daemon."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from curling_fd.system.guard import ANSWER, LOST_HEARTBEAT, Guard, GuardFailed

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0
"""Seconds until a test gives up on something that takes milliseconds."""

DAEMON = """
import socket
import sys
from curling_fd.system.guard import LOST_HEARTBEAT, Guard
guards = {}
for line in sys.stdin:
    verb, name, *numbers = line.split()
    if verb == "write":
        guards[name] = Guard.start_write(int(numbers[0]), LOST_HEARTBEAT, int(numbers[1]))
    elif verb == "kill":
        guards[name] = Guard.start_kill(int(numbers[0]))
    elif verb == "cut":
        guards[name].cut(socket.socket(fileno=int(numbers[0])))
    elif verb == "acted":
        print(guards[name].acted, flush=True)
        continue
    else:
        getattr(guards[name], verb)()
    print(guards[name].pid, flush=True)
"""


class Daemon:
    """A process that owns guards and does what it is told, line by line. It inherits `fds`."""

    def __init__(self, *fds: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DAEMON],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            cwd=ROOT,
            text=True,
        )

    def tell(self, *words: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Monitor:
    """A connection as the daemon has it (`ours`), and QEMU's end of it."""

    def __init__(self) -> None:
        self.ours, self.qemu = socket.socketpair()
        self.qemu.settimeout(PATIENCE)

    def close(self) -> None:
        self.ours.close()
        self.qemu.close()


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    monitor = Monitor()
    yield monitor
    monitor.close()


@pytest.fixture
def daemon(monitor: Monitor) -> Iterator[Daemon]:
    daemon = Daemon(monitor.ours.fileno())
    yield daemon
    daemon.close()


def silent(connection: socket.socket) -> bool:
    """Whether nothing has come, and the other end is still open."""
    return not select.select([connection], [], [], 0)[0]


def gone(pidfd: int) -> bool:
    """Wait until the process of `pidfd` has ended; takes ownership of the fd."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    ended = bool(poller.poll(PATIENCE * 1000))
    os.close(pidfd)
    return ended


def test_a_killed_daemons_will_is_written_and_held_until_it_is_answered(
    monitor: Monitor, daemon: Daemon
) -> None:
    guard = os.pidfd_open(int(daemon.tell("write", "g", monitor.ours.fileno(), 60_000)))
    monitor.ours.close()
    assert silent(monitor.qemu)
    daemon.process.kill()
    assert monitor.qemu.recv(1000) == LOST_HEARTBEAT
    assert silent(monitor.qemu)
    monitor.qemu.send(b'{"timestamp": {}, "event": "RESUME"}\r\n{"return": {}, "id": ' + ANSWER + b"}\r\n")
    assert gone(guard)
    assert monitor.qemu.recv(1) == b""


def test_a_frozen_daemons_will_is_written_at_the_deadline(monitor: Monitor, daemon: Daemon) -> None:
    daemon.tell("write", "g", monitor.ours.fileno(), 100)
    daemon.tell("arm", "g")
    daemon.process.send_signal(signal.SIGSTOP)
    assert monitor.qemu.recv(1000) == LOST_HEARTBEAT
    daemon.process.send_signal(signal.SIGCONT)
    assert daemon.tell("acted", "g") == "True"


def test_a_guard_that_acted_on_a_deadline_stays_for_the_next(monitor: Monitor, daemon: Daemon) -> None:
    daemon.tell("write", "g", monitor.ours.fileno(), 20)
    daemon.tell("arm", "g")
    # And it acts once more after each deadline for as long as nobody disarms it.
    for _ in range(3):
        assert monitor.qemu.recv(len(LOST_HEARTBEAT)) == LOST_HEARTBEAT
    daemon.tell("disarm", "g")
    daemon.process.kill()
    while monitor.qemu.recv(len(LOST_HEARTBEAT)) != LOST_HEARTBEAT:
        pass


def test_a_will_is_written_again_while_qemu_refuses(monitor: Monitor, daemon: Daemon) -> None:
    guard = os.pidfd_open(int(daemon.tell("write", "g", monitor.ours.fileno(), 60_000)))
    daemon.process.kill()
    for _ in range(2):
        assert monitor.qemu.recv(1000) == LOST_HEARTBEAT
        monitor.qemu.send(b'{"error": {"class": "GenericError"}, "id": ' + ANSWER + b"}\r\n")
    assert monitor.qemu.recv(1000) == LOST_HEARTBEAT
    monitor.qemu.send(b'{"return": {}, "id": ' + ANSWER + b"}\r\n")
    assert gone(guard)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_migration_is_cut_before_the_will_is_written(monitor: Monitor, number: signal.Signals) -> None:
    migration = Monitor()
    daemon = Daemon(monitor.ours.fileno(), migration.ours.fileno())
    try:
        daemon.tell("write", "g", monitor.ours.fileno(), 100)
        daemon.tell("cut", "g", migration.ours.fileno())
        daemon.tell("arm", "g")
        migration.ours.close()
        daemon.process.send_signal(number)
        assert monitor.qemu.recv(len(LOST_HEARTBEAT)) == LOST_HEARTBEAT
        migration.qemu.setblocking(False)
        assert migration.qemu.recv(1) == b""
    finally:
        daemon.close()
        migration.close()


def test_a_disarmed_guard_leaves_a_frozen_daemon_alone(monitor: Monitor) -> None:
    clock = Monitor()
    daemon = Daemon(monitor.ours.fileno(), clock.ours.fileno())
    try:
        daemon.tell("write", "disarmed", monitor.ours.fileno(), 20)
        daemon.tell("write", "clock", clock.ours.fileno(), 200)
        for _ in range(3):
            daemon.tell("arm", "disarmed")
            daemon.tell("disarm", "disarmed")
        daemon.tell("arm", "clock")
        daemon.process.send_signal(signal.SIGSTOP)
        # The second guard's deadline is ten of the first one's away.
        assert clock.qemu.recv(1000) == LOST_HEARTBEAT
        assert silent(monitor.qemu)
    finally:
        daemon.close()
        clock.close()


def test_arming_again_puts_the_deadline_off(monitor: Monitor) -> None:
    with Guard.start_write(monitor.ours.fileno(), LOST_HEARTBEAT, 60_000) as guard:
        for _ in range(1000):
            guard.arm()
        guard.disarm()
        assert not guard.acted
        assert silent(monitor.qemu)


def test_signals_that_stop_daemons_do_not_stop_guards(monitor: Monitor, daemon: Daemon) -> None:
    guard = int(daemon.tell("write", "g", monitor.ours.fileno(), 60_000))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(guard, number)
    assert os.getsid(guard) == guard
    daemon.process.kill()
    assert monitor.qemu.recv(1000) == LOST_HEARTBEAT


def test_a_killed_daemons_standby_is_killed() -> None:
    victim = subprocess.Popen(["sleep", "1000"])
    pidfd = os.pidfd_open(victim.pid)
    daemon = Daemon(pidfd)
    try:
        daemon.tell("kill", "g", pidfd)
        assert victim.poll() is None
        daemon.process.kill()
        assert victim.wait(PATIENCE) == -signal.SIGKILL
    finally:
        daemon.close()
        victim.kill()
        victim.wait()
        os.close(pidfd)


def test_a_retired_guard_kills_nobody() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
        pidfd = os.pidfd_open(victim.pid)
        guard = Guard.start_kill(pidfd)
        os.close(pidfd)
        guard.retire()
        assert victim.communicate(b"alive")[0] == b"alive"


def test_a_retired_guard_is_gone_and_leaves_nothing(monitor: Monitor) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        guard = Guard.start_write(monitor.ours.fileno(), LOST_HEARTBEAT, 1000)
        assert guard.alive
        guard.arm()
        guard.retire()
        guard.retire()
        assert not guard.alive
        assert not Path(f"/proc/{guard.pid}").exists()
        guard.arm()
    assert silent(monitor.qemu)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_frozen_guard_can_still_be_retired(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curling_fd.system.guard.RETIRE_SECONDS", 0.05)
    guard = Guard.start_write(monitor.ours.fileno(), LOST_HEARTBEAT, 1000)
    os.kill(guard.pid, signal.SIGSTOP)
    guard.retire()
    assert not Path(f"/proc/{guard.pid}").exists()
    assert silent(monitor.qemu)


def test_a_guard_that_was_killed_says_so(monitor: Monitor) -> None:
    guard = Guard.start_write(monitor.ours.fileno(), LOST_HEARTBEAT, 1000)
    pidfd = os.pidfd_open(guard.pid)
    os.kill(guard.pid, signal.SIGKILL)
    assert gone(pidfd)
    assert not guard.alive
    guard.retire()


def test_a_child_of_the_daemon_does_not_hide_its_death(monitor: Monitor) -> None:
    """A child that inherits descriptors, as a standby does, must not inherit our end of the connection."""
    with Guard.start_write(monitor.ours.fileno(), LOST_HEARTBEAT, 1000):
        listing = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, check=True, text=True
        )
        assert "socket:" not in listing.stdout
        assert "curling-guard" not in listing.stdout


def test_a_guard_that_cannot_start_says_so(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for executable in ("/bin/false", "/does/not/exist"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(GuardFailed):
            Guard.start_write(monitor.ours.fileno(), LOST_HEARTBEAT, 1000)
    assert sorted(os.listdir("/proc/self/fd")) == before
