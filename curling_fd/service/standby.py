"""Starting a standby: a QEMU like the primary's that waits with the replica as its memory."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import trio
from attrs import define

from curling_fd.errors import MachineMismatch, NotEnoughMemory, QmpError, StandbyFailed
from curling_fd.qmp.client import open_qmp
from curling_fd.service.backup import STAGING
from curling_fd.service.config import VmConfig
from curling_fd.standby.cmdline import RamBlock, standby_argv
from curling_fd.standby.process import StandbyProcess
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import Block

#: Bytes a QEMU takes besides the guest's memory.
_QEMU_ITSELF = 64 << 20


@define
class Standby:
    """A waiting QEMU. Owns its process, the RAM images it maps, and its directory."""

    process: StandbyProcess
    images: list[tuple[Block, Buffer]]
    directory: Path

    @property
    def qmp_path(self) -> Path:
        return self.directory / "qmp.sock"

    def release(self) -> None:
        """It is the active VM now, and outlives us; the images stay mapped in it."""
        self.process.release()

    def close(self) -> None:
        """End the process, unless it was released, and free what is ours."""
        released = self.process.released
        self.process.close()
        for _, buffer in self.images:
            buffer.close()
        self.images.clear()
        if not released:
            shutil.rmtree(self.directory, ignore_errors=True)


async def start_standby(
    config: VmConfig,
    directory: Path,
    *,
    argv: Sequence[str],
    machine: str,
    version: tuple[int, ...],
    memory: Sequence[Block],
    staging: int,
) -> Standby:
    """Start a QEMU from the primary's command line and see that it is the same machine.

    Args:
        directory: made for it; what an earlier standby left there is removed.
        staging: bytes of each staging buffer that this VM can fill.

    Raises:
        PrecheckFailed: why there can be no standby here.
    """
    binary = config.standby.qemu or argv[0]
    _check_memory(sum(block.size for block in memory) + STAGING * staging + _QEMU_ITSELF)
    await trio.to_thread.run_sync(_check_machine, binary, machine)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700, parents=True)
    images: list[tuple[Block, Buffer]] = []
    process: StandbyProcess | None = None
    try:
        for block in memory:
            images.append((block, Buffer(f"curling-ram-{block.name}", block.size, prefault=0)))
        ram = [RamBlock(block.name, block.size, buffer.fd) for block, buffer in images]
        command = standby_argv(
            argv,
            binary=binary,
            ram=ram,
            qmp_path=str(directory / "qmp.sock"),
            directory=str(directory),
            machine=machine,
            replace=config.standby.replace,
            extra=config.standby.extra_args,
        )
        process = await StandbyProcess.start(
            command, [buffer.fd for _, buffer in images], str(directory / "qmp.sock")
        )
        standby = Standby(process, images, directory)
        await _check(standby, machine, version)
        return standby
    except BaseException:
        if process is not None:
            process.close()
        for _, buffer in images:
            buffer.close()
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _check_memory(needed: int) -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                if available < needed:
                    raise NotEnoughMemory(needed, available)


def _check_machine(binary: str, machine: str) -> None:
    """Does the QEMU here know the machine type?"""
    try:
        done = subprocess.run([binary, "-machine", "help"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StandbyFailed(f"{binary} cannot be run: {error}") from None
    known = [line.split()[0] for line in done.stdout.splitlines()[1:] if line.strip()]
    if machine not in known:
        raise MachineMismatch("machine type", machine, f"unknown to {binary}")


async def _check(standby: Standby, machine: str, version: tuple[int, ...]) -> None:
    try:
        async with open_qmp(standby.qmp_path) as qmp:
            ours = qmp.greeting.version
            if ours[:2] < tuple(version[:2]):
                raise MachineMismatch("QEMU version", _dotted(version), _dotted(ours))
            found = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
            if str(found).removesuffix("-machine") != machine:
                raise MachineMismatch("machine type", machine, str(found))
    except QmpError as error:
        raise StandbyFailed(f"its monitor: {error}", standby.process.stderr_tail()) from None


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
