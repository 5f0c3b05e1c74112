"""Stop times by QEMU's own clock: the recorder, and the variants that make QEMU take checkpoints.

A STOP and the RESUME after it, both stamped by QEMU in microseconds, are one stop. All variants protect the
same running guest in turn, with the same epoch: what differs is who the peer is.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE
from typing import Protocol

import trio
from attrs import field, frozen

from bench.figures import median
from curling_fd.capture.engine import EngineOptions
from curling_fd.capture.incremental import open_incremental
from curling_fd.capture.probe import Choice
from curling_fd.capture.reader import migration_socketpair
from curling_fd.capture.settings import migration_settings
from curling_fd.qmp.client import EventStream, QmpClient, open_qmp
from curling_fd.service.examine import examine
from curling_fd.system.buffers import Buffer, BufferPool
from tests.lab.cache import digest, made
from tests.lab.debs import run
from tests.lab.guests import LinuxGuest
from tests.lab.kernel import kernel
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

_FLOOR = Path(__file__).with_name("floor.c")

_SYNCED = re.compile(r"migration_bitmap_sync_end dirty_pages (\d+)")

#: Stops thrown away at the start of a visit, for every variant: the end of the first pass, and the first use
#: of each buffer.
WARM_UP = 6

#: An emulated guest boots in ten seconds and fills a GiB in as many, when nothing else runs.
BOOT_SECONDS = 240

#: Microseconds the guest rests between two bursts of stores.
PAUSE_US = 5000

#: What a capture buffer of the floor and of the engine alone holds.
CAPACITY = 256 << 20

#: Milliseconds after a checkpoint from which on QEMU may ask for the next; the peer decides when it is due.
_REQUEST_DELAY = 1


@frozen
class Load:
    """What the guest does: `pages` stores a round into as many pages, a checkpoint every `epoch` seconds."""

    name: str
    pages: int
    epoch: float


@frozen
class Visit:
    """What one variant did in one round: stop times in milliseconds, and pages per checkpoint."""

    stops: list[float]
    pages: list[float]
    details: dict[str, float] = field(factory=dict)


class Variant(Protocol):
    """A peer for QEMU's checkpoint loop. `name` is its row in the report."""

    name: str

    async def visit(self, bench: Bench, load: Load, count: int) -> Visit:
        """Protect the guest for `count` checkpoints, and leave it running unprotected."""
        ...


@frozen
class Bench:
    """The primary's VM and our monitor on it."""

    vm: LabVm
    qmp: QmpClient
    choice: Choice
    qemu: Executable


@frozen
class DirtyGuest:
    """A guest that stores into its first M of `pages` pages over and over; M is set while it runs.

    It boots the compressed kernel. The uncompressed one, which LinuxGuest boots, lies in the guest's RAM as a
    ROM would, and QEMU copies it there at each reset: a COLO secondary, which is reset at each checkpoint,
    would copy 57 MB every time, as no guest that boots from a disk makes it do.
    """

    pages: int = 32768
    memory: str = "512M"

    def arguments(self) -> list[str]:
        """-kernel, -initrd and -append."""
        linux = LinuxGuest(
            pages=self.pages, dirty=1, pause_us=PAUSE_US, report_ms=1000, threads=1, mode="dirty"
        )
        arguments = linux.arguments()
        booted = kernel()
        files = next(folder for folder in booted.modules.parents if (folder / "boot").is_dir())
        arguments[arguments.index("-kernel") + 1] = str(files / "boot" / f"vmlinuz-{booted.release}")
        return arguments


@asynccontextmanager
async def primary(qemu: Executable, memory: str = "512M", pages: int = 32768) -> AsyncIterator[Bench]:
    """A booted guest under TCG whose program has filled `pages` pages."""
    async with LabVm(guest=DirtyGuest(pages, memory), qemu=qemu) as vm:
        await vm.console.wait_ready(within=BOOT_SECONDS)
        async with open_qmp(vm.operator) as qmp:
            yield Bench(vm, qmp, (await examine(qmp, "incremental")).choice, qemu)


async def record(events: EventStream, count: int, warm_up: int = WARM_UP) -> list[float]:
    """The next `count` stops, in milliseconds, after `warm_up` that do not count."""
    stops: list[float] = []
    stopped: int | None = None
    async for event in events:
        if event.name == "MIGRATION" and event.data.get("status") in ("failed", "completed"):
            raise RuntimeError(f"the migration is {event.data['status']} after {len(stops)} checkpoints")
        if event.name == "STOP":
            stopped = event.timestamp_us
        elif event.name == "RESUME" and stopped is not None:
            stops.append((event.timestamp_us - stopped) / 1000)
            stopped = None
            if len(stops) == warm_up + count:
                return stops[warm_up:]
    raise RuntimeError("QEMU went away")


class Floor:
    """floor.c: the cheapest peer there can be."""

    name = "floor"

    async def visit(self, bench: Bench, load: Load, count: int) -> Visit:
        ours, theirs = migration_socketpair()
        wanted = WARM_UP + count
        program = made(f"bench/floor-{digest(_FLOOR)}", _compile)
        command = [str(program), str(ours.fileno()), str(int(load.epoch * 1e6)), str(wanted), str(CAPACITY)]
        with bench.qmp.events() as events, theirs, ours:
            async with _colo(bench, _REQUEST_DELAY):
                await bench.qmp.hand_over("curling-bench", theirs.fileno())
                theirs.close()
                with subprocess.Popen(command, pass_fds=[ours.fileno()], stdin=PIPE, stdout=PIPE) as process:
                    try:
                        ours.close()
                        await bench.qmp.execute("migrate", {"uri": "fd:curling-bench"})
                        await _until_colo(events)
                        assert process.stdin is not None and process.stdout is not None
                        process.stdin.write(b"c")
                        process.stdin.flush()
                        stops = await record(events, count)
                        lines = [process.stdout.readline().split() for _ in range(wanted)]
                        await lose(bench.qmp)
                    finally:
                        process.kill()
        taken = [[float(word) for word in line] for line in lines[WARM_UP:]]
        peer_ms = median([line[3] / 1e6 for line in taken])
        return Visit(stops, [line[0] for line in taken], {"peer_ms": peer_ms})


class Stock:
    """QEMU as it comes: a second QEMU as COLO secondary on a UNIX socket, checkpoints by its own timer."""

    name = "stock"

    async def visit(self, bench: Bench, load: Load, count: int) -> Visit:
        extra = ["-incoming", "defer"]
        secondary = LabVm(guest=bench.vm.guest, qemu=bench.qemu, extra=extra, name="secondary")
        async with secondary, open_qmp(secondary.operator) as other:
            uri = f"unix:{secondary.directory}/migration.sock"
            await _set(other, {"x-colo": True, "return-path": bench.choice.return_path})
            await other.execute("migrate-incoming", {"uri": uri})
            with bench.qmp.events() as events:
                async with _colo(bench, int(load.epoch * 1000)):
                    await bench.qmp.execute("migrate", {"uri": uri})
                    await _until_colo(events)
                    # QEMU tells no page count while it is in the loop: one line per checkpoint has it.
                    await _trace(bench.qmp, True)
                    seen = len(bench.vm.stderr())
                    stops = await record(events, count)
                    await _trace(bench.qmp, False)
                    await lose(bench.qmp)
        sums = [int(number) for number in _SYNCED.findall(bench.vm.stderr()[seen:])]
        # QEMU adds them up and starts again from nothing about once a second.
        pages = [float(now - before if now > before else now) for before, now in pairwise(sums)]
        return Visit(stops, pages[-count:])


class Discard:
    """A sink that throws the first pass away."""

    def __init__(self) -> None:
        self._pool = BufferPool("bench-pass", 2, 4 << 20)

    async def acquire(self) -> Buffer:
        return await self._pool.acquire()

    def give_back(self, buffer: Buffer) -> None:
        self._pool.release(buffer)

    async def ship(self, buffer: Buffer, length: int, pages: int) -> None:
        self._pool.release(buffer)

    def close(self) -> None:
        self._pool.close()


class EngineAlone:
    """The engine `incremental` in this process; what it captured is thrown away."""

    name = "engine"

    async def visit(self, bench: Bench, load: Load, count: int) -> Visit:
        sink, buffer = Discard(), Buffer("bench-checkpoint", CAPACITY, prefault=CAPACITY)
        pages: list[float] = []
        peer: list[float] = []

        async def protect() -> None:
            options = EngineOptions(_REQUEST_DELAY, stop_limit=10.0)
            async with open_incremental(bench.qmp, bench.choice, options) as engine:
                await engine.first_pass(sink)
                due = trio.current_time()
                for _ in range(WARM_UP + count):
                    await engine.ready()
                    await trio.sleep_until(due)
                    due = trio.current_time() + load.epoch
                    captured = await engine.checkpoint(buffer)
                    pages.append(captured.pages)
                    peer.append(captured.seconds * 1000)

        stops: list[float] = []
        try:
            with bench.qmp.events() as events:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(protect)
                    stops += await record(events, count)
            await lose(bench.qmp)
        finally:
            sink.close()
            buffer.close()
        return Visit(stops, pages[WARM_UP:], {"peer_ms": median(peer[WARM_UP:])})


@asynccontextmanager
async def _colo(bench: Bench, delay_ms: int) -> AsyncIterator[None]:
    wanted = {"events": True, "x-colo": True, "return-path": bench.choice.return_path}
    async with migration_settings(bench.qmp, wanted, {"x-checkpoint-delay": delay_ms}):
        yield


async def _set(qmp: QmpClient, wanted: dict[str, bool]) -> None:
    entries = [{"capability": name, "state": state} for name, state in wanted.items()]
    await qmp.execute("migrate-set-capabilities", {"capabilities": entries})


async def _trace(qmp: QmpClient, on: bool) -> None:
    await qmp.execute("trace-event-set-state", {"name": "migration_bitmap_sync_end", "enable": on})


async def _until_colo(events: EventStream) -> None:
    async for event in events:
        if event.name == "MIGRATION":
            if event.data["status"] == "colo":
                return
            if event.data["status"] in ("failed", "completed", "cancelled"):
                raise RuntimeError(f"the migration is {event.data['status']}")


async def lose(qmp: QmpClient) -> None:
    """End the checkpoint loop, and wait until the guest is an ordinary one again."""
    with qmp.events() as events:
        if (await qmp.execute("query-migrate"))["status"] == "colo":
            await qmp.execute("x-colo-lost-heartbeat")
        if (await qmp.execute("query-migrate"))["status"] == "colo":
            async for event in events:
                if event.data.get("status") in ("completed", "failed"):
                    return


def _compile(target: Path) -> None:
    run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(_FLOOR)])
