"""When a guest stood still, seen from outside: QEMU's STOP and RESUME, on a monitor Curling does not use."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import define, field, frozen

from curling_fd.qmp.client import EventStream, QmpClient, open_qmp

_PATIENCE = 60.0
_POLL_SECONDS = 0.001

#: The number of the system call on x86-64.
_SENDMSG = "46"


@frozen
class Stop:
    """One stop of a guest, by QEMU's clock in microseconds; `end_us` is None while it lasts."""

    start_us: int
    end_us: int | None


@define(eq=False)
class Witness:
    """All stops of a guest since `witness` began to watch it."""

    qmp: QmpClient
    stops: list[Stop] = field(factory=list)
    _news: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot)

    async def next_stop(self) -> Stop:
        """The next time the guest stops from now on."""
        seen = len(self.stops)
        with trio.fail_after(_PATIENCE):
            while len(self.stops) == seen:
                await self._news.park()
        return self.stops[seen]

    async def running(self, *, within: float = _PATIENCE) -> None:
        """Wait until no stop is left without its end."""
        with trio.fail_after(within):
            while self.stops and self.stops[-1].end_us is None:
                await self._news.park()

    def longest(self, since_us: int) -> float:
        """Seconds of the longest stop, of what was after `since_us`; one that lasts counts up to now."""
        ends = [(stop, stop.end_us or now_us()) for stop in self.stops]
        lasted = [end - max(stop.start_us, since_us) for stop, end in ends if end > since_us]
        return max(lasted, default=0) / 1e6

    async def follow(self, events: EventStream) -> None:
        """Take in what QEMU reports, until it goes away."""
        async for event in events:
            if event.name == "STOP":
                self.stops.append(Stop(event.timestamp_us, None))
            elif event.name == "RESUME" and self.stops and self.stops[-1].end_us is None:
                self.stops[-1] = Stop(self.stops[-1].start_us, event.timestamp_us)
            self._news.unpark_all()


@asynccontextmanager
async def witness(monitor: Path) -> AsyncIterator[Witness]:
    """Watch the guest behind `monitor`."""
    async with open_qmp(monitor) as qmp, trio.open_nursery() as nursery:
        with qmp.events() as events:
            watching = Witness(qmp)
            nursery.start_soon(watching.follow, events)
            yield watching
            nursery.cancel_scope.cancel()


def now_us() -> int:
    """The clock of QEMU's events."""
    return time.time_ns() // 1000


def freeze(pid: int) -> None:
    """SIGSTOP a process and wait until the last of its threads stands still."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    while any(_state(task) not in "TtZX" for task in tasks.iterdir()):
        time.sleep(0)


@contextmanager
def frozen_process(pid: int) -> Iterator[None]:
    """Freeze a process for the duration of a block, in which it may be killed."""
    freeze(pid)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def freeze_in_checkpoint(daemon: subprocess.Popen[bytes], guest: Witness) -> Stop:
    """Freeze the primary's daemon while the guest stands still for a checkpoint; which stop that is.

    For a guest whose checkpoints are larger than what a socket holds: QEMU cannot finish without the daemon.
    """
    while True:
        stop = await guest.next_stop()
        freeze(daemon.pid)
        while guest.stops[-1].end_us is None:
            if _writes(guest.qmp.pid):
                return stop
            await trio.sleep(_POLL_SECONDS)
        daemon.send_signal(signal.SIGCONT)


async def freeze_in_migration(daemon: subprocess.Popen[bytes], guest: Witness) -> None:
    """Freeze the primary's daemon when a migration has stopped the guest, and wait until QEMU waits for it.

    For a guest whose migrations are larger than what a socket holds.
    """
    await guest.next_stop()
    freeze(daemon.pid)
    with trio.fail_after(_PATIENCE):
        while True:
            if _writes(guest.qmp.pid):
                return
            await trio.sleep(_POLL_SECONDS)


def qemus(directory: Path) -> set[int]:
    """The QEMUs that have something below `directory` on their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if entry.name.isdigit() and b"\0-machine\0" in words and os.fsencode(directory) in words:
                found.add(int(entry.name))
    return found


def _writes(pid: int) -> bool:
    """Whether a thread of `pid` waits for somebody to read what it sends."""
    calls = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            calls.append((task / "syscall").read_text().split()[0])
    return _SENDMSG in calls


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
