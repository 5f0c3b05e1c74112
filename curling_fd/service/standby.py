"""A standby: a QEMU like the primary's that waits with the replica as its memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio

from curling_fd.errors import MachineMismatch, NotEnoughMemory, QmpBusy, QmpError, StandbyFailed
from curling_fd.qmp.client import open_qmp
from curling_fd.replica.image import Replica
from curling_fd.service.backup import STAGING
from curling_fd.service.config import VmConfig
from curling_fd.service.takeover import activate
from curling_fd.standby.cmdline import RamBlock, standby_argv
from curling_fd.standby.process import START_TIMEOUT, StandbyProcess
from curling_fd.system.buffers import Buffer
from curling_fd.system.memory import available
from curling_fd.vmstate.records import Block

#: Bytes a QEMU takes besides the guest's memory.
_QEMU_ITSELF = 64 << 20

#: Seconds for a QEMU whose monitor went away to end.
_LAST_WORDS = 2.0


#: Programs that are run because a primary names them; another has to be named in the configuration here.
_QEMU_NAME = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")


class Standby:
    """A waiting QEMU. Owns its process, the RAM images it maps, and its directory.

    It is started twice: first to rehearse, with memory that its writes do not change, and again to wait, once
    it has shown that it can load a checkpoint of this VM. Made by `start_standby`.
    """

    def __init__(
        self,
        directory: Path,
        images: Sequence[tuple[Block, Buffer]],
        command: Callable[[bool], list[str]] | None = None,
        process: StandbyProcess | None = None,
    ) -> None:
        self.images = images
        self._directory = directory
        self._command = command
        self._process = process
        self._left = False

    @classmethod
    def inherit(
        cls, directory: Path, blocks: Sequence[Block], images: Sequence[int], process: Mapping[str, int]
    ) -> Standby:
        """The standby, rehearsed, that another process has left.

        Args:
            images: memfds of `blocks`; owned from here on, as are the descriptors of `process`.

        Raises:
            StandbyFailed: it is gone.
        """
        buffers = [
            (block, Buffer(f"curling-ram-{block.name}", block.size, prefault=0, fd=fd))
            for block, fd in zip(blocks, images, strict=True)
        ]
        try:
            return cls(directory, buffers, process=StandbyProcess.inherit(process))
        except StandbyFailed:
            for _, buffer in buffers:
                buffer.close()
            raise

    def leave(self) -> tuple[list[int], dict[str, int]]:
        """Let `close` leave it waiting; what `inherit` needs, borrowed until then."""
        self._left = True
        return [buffer.fd for _, buffer in self.images], self.process.leave()

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def qmp_path(self) -> Path:
        return self._directory / "qmp.sock"

    @property
    def process(self) -> StandbyProcess:
        assert self._process is not None, "not started"
        return self._process

    async def start(self, *, shared: bool) -> None:
        """Start the QEMU, in place of the one there was.

        Args:
            shared: what it writes to its memory is written to the images.

        Raises:
            StandbyFailed: it did not start; with what it printed.
        """
        assert self._command is not None, "it was inherited"
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True)
        fds = [buffer.fd for _, buffer in self.images]
        self._process = await StandbyProcess.start(self._command(shared), fds, str(self.qmp_path))

    async def rehearse(self, replica: Replica) -> None:
        """Load `replica` as a failover would, and run nothing; then wait again, untouched.

        Raises:
            StandbyFailed: a failover would have failed so; with what QEMU printed.
        """
        try:
            await activate(self.qmp_path, replica, paused=True)
        except StandbyFailed as error:
            raise StandbyFailed(error.problem, self.process.stderr_tail()) from None
        await self.start(shared=True)
        try:
            async with open_qmp(self.qmp_path, patience=START_TIMEOUT):
                pass  # it has opened its devices: at a failover it answers at once
        except QmpError as error:
            raise StandbyFailed(str(error), self.process.stderr_tail()) from None

    def release(self) -> None:
        """It is the active VM now, and outlives us; the images stay mapped in it."""
        self.process.release()

    def close(self) -> None:
        """End the process, unless it was released or left, and free what is ours."""
        lives_on = self._left or (self._process is not None and self._process.released)
        if self._process is not None:
            self._process.close()
        for _, buffer in self.images:
            buffer.close()
        if not lives_on:
            shutil.rmtree(self._directory, ignore_errors=True)


async def start_standby(
    config: VmConfig,
    directory: Path,
    *,
    argv: Sequence[str],
    machine: str,
    version: tuple[int, ...],
    memory: Sequence[Block],
    staging: int,
    taps: Mapping[int, str],
) -> Standby:
    """Start a QEMU from the primary's command line and see that it is the same machine.

    Args:
        directory: made for it; what an earlier standby left there is removed.
        staging: bytes of each staging buffer that this VM can fill.
        taps: of the primary's QEMU, by its descriptors.

    Returns:
        It has yet to `rehearse`.

    Raises:
        PrecheckFailed: why there can be no standby here.
    """
    binary = config.standby.qemu or find_program(argv[0])
    _check_memory(memory_needed(sum(block.size for block in memory), staging))
    await trio.to_thread.run_sync(_check_machine, binary, machine)
    images: list[tuple[Block, Buffer]] = []
    standby: Standby | None = None

    def command(shared: bool) -> list[str]:
        return standby_argv(
            argv,
            binary=binary,
            ram=[RamBlock(block.name, block.size, buffer.fd, shared) for block, buffer in images],
            qmp_path=str(directory / "qmp.sock"),
            directory=str(directory),
            machine=machine,
            replace=config.standby.replace,
            extra=config.standby.extra_args,
            taps=taps,
        )

    try:
        for block in memory:
            images.append((block, Buffer(f"curling-ram-{block.name}", block.size, prefault=0)))
        standby = Standby(directory, images, command)
        await standby.start(shared=False)
        await _check(standby, machine, version)
        return standby
    except BaseException:
        if standby is not None:
            standby.close()
        else:
            for _, buffer in images:
                buffer.close()
        raise


def find_program(named: str) -> str:
    """The QEMU here that the primary names: its path if there is a QEMU at it, else one of that name.

    Raises:
        StandbyFailed: what it names is no QEMU, or there is none.
    """
    name = Path(named).name
    if not _QEMU_NAME.fullmatch(name):
        raise StandbyFailed(f"{named}, which the primary runs, is no name of a QEMU; set `standby.qemu`")
    found = shutil.which(named) or shutil.which(name)
    if found is None:
        raise StandbyFailed(f"there is no {named} on this host")
    return found


def memory_needed(ram: int, staging: int) -> int:
    """Bytes that the backup of a guest with `ram` bytes needs, its staging buffers having `staging` each."""
    return ram + STAGING * staging + _QEMU_ITSELF


def _check_memory(needed: int) -> None:
    free = available()
    if free < needed:
        raise NotEnoughMemory(needed, free)


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
        async with open_qmp(standby.qmp_path, patience=START_TIMEOUT) as qmp:
            ours = qmp.greeting.version
            if ours[:2] < tuple(version[:2]):
                raise MachineMismatch("QEMU version", _dotted(version), _dotted(ours))
            found = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
            if str(found).removesuffix("-machine") != machine:
                raise MachineMismatch("machine type", machine, str(found))
    except QmpBusy:  # with us
        why = f"its monitor did not answer within {START_TIMEOUT:g} s"
        raise StandbyFailed(why, standby.process.stderr_tail()) from None
    except QmpError as error:
        # A QEMU that does not like its command line opens its monitor first and says why when it ends.
        with trio.move_on_after(_LAST_WORDS):
            await standby.process.wait_failed()
        raise StandbyFailed(f"its monitor: {error}", standby.process.stderr_tail()) from None


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
