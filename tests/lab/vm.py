"""A QEMU with a guest in it, for as long as an `async with` block runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import trio
from attrs import define, field

from .console import Console, Round
from .guests import Guest, LinuxGuest
from .hosts import Host, scratch_folder
from .roots import Executable, qemu_binary


@define(eq=False)
class LabVm:
    """A VM as an administrator would have started it; nothing in its command line knows of Curling.

    It dies with the process that started it, however that ends. Every path of this VM on the host is below
    `directory`: qmp.sock, operator.sock (a second monitor, for what an operator does beside Curling),
    console.sock, console.log and stderr. Kernel, initramfs and firmware are files that all hosts have in the
    same place.

    Args:
        guest: What it runs.
        qemu: Which QEMU; the system's by default.
        machine: "pc", "q35", or a versioned machine type.
        accel: "tcg" or "kvm".
        memory: As for -m; the guest's own wish by default.
        smp: Number of CPUs.
        devices: Each one an argument of -device.
        extra: More of the command line.
        host: Whose process it is; this machine's own by default.
        directory: Of this VM alone. By default a new one in the host's directory, removed at the end.
        name: For -name.
    """

    guest: Guest = field(factory=LinuxGuest)
    qemu: Executable | None = None
    machine: str = "pc"
    accel: str = "tcg"
    memory: str | None = None
    smp: int = 1
    devices: Sequence[str] = ()
    extra: Sequence[str] = ()
    host: Host | None = None
    directory: Path = field(default=Path())
    name: str = "lab"
    argv: list[str] = field(factory=list, init=False)
    console: Console = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)
    _owns_directory: bool = field(default=False, init=False)

    @property
    def qmp(self) -> Path:
        """The socket of the monitor that Curling is to be given."""
        return self.directory / "qmp.sock"

    @property
    def operator(self) -> Path:
        """The socket of the other monitor."""
        return self.directory / "operator.sock"

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    async def __aenter__(self) -> Self:
        # Both may have to be made first, which can take minutes.
        qemu = await trio.to_thread.run_sync(qemu_binary) if self.qemu is None else self.qemu
        boot = await trio.to_thread.run_sync(self.guest.arguments)
        if self.directory == Path():
            if self.host:
                self.directory = Path(tempfile.mkdtemp(prefix="vm-", dir=self.host.directory))
            else:
                self.directory = scratch_folder()
            self._owns_directory = True
        self.console = Console(self.directory / "console.log", self.directory / "console.sock", self.running)
        self.argv = [*qemu.argv, *self._machine_arguments(), *boot, *self.extra]
        with (self.directory / "stderr").open("wb") as stderr:
            start = self.host.popen if self.host else subprocess.Popen
            command = ["setpriv", "--pdeathsig", "KILL", "--", *self.argv]
            self._process = start(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
        try:
            await self._wait_for_monitor()
        except BaseException:
            self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            error.add_note(f"QEMU's own words:\n{self.stderr()}\nThe console:\n{self.console.tail()}")
        self._clean_up()

    def running(self) -> bool:
        """Whether QEMU's process is there."""
        return self._process.poll() is None

    def stderr(self) -> str:
        """What QEMU has printed."""
        return (self.directory / "stderr").read_text(errors="replace")

    async def wait_exit(self, *, within: float = 60) -> int:
        """Wait until QEMU has ended; its exit code, negative when a signal ended it."""
        fd = os.pidfd_open(self.pid) if self.running() else None
        if fd is not None:
            try:
                with trio.fail_after(within):
                    await trio.lowlevel.wait_readable(fd)
            finally:
                trio.lowlevel.notify_closing(fd)
                os.close(fd)
        return self._process.wait()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send QEMU a signal."""
        self._process.send_signal(number)

    def rounds(self) -> list[Round]:
        """All the guest has reported."""
        return self.console.rounds()

    async def wait_round(self, number: int, *, within: float = 60) -> Round:
        """The first report of round `number` or a later one."""
        return await self.console.wait_round(number, within=within)

    async def send(self, command: str) -> None:
        """Give the guest a command and wait until it has taken it; see guest.c."""
        await self.console.send(command)

    def _machine_arguments(self) -> list[str]:
        here = self.directory
        console = f"socket,id=console,path={here}/console.sock,server=on,wait=off,logfile={here}/console.log"
        arguments = ["-name", self.name, "-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-machine", self.machine, "-accel", self.accel]
        if self.accel == "kvm":
            arguments += ["-cpu", "qemu64"]
        arguments += ["-m", self.memory or self.guest.memory, "-smp", str(self.smp)]
        arguments += ["-chardev", console, "-serial", "chardev:console"]
        arguments += ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
        arguments += ["-qmp", f"unix:{self.operator},server=on,wait=off"]
        for device in self.devices:
            arguments += ["-device", device]
        return arguments

    async def _wait_for_monitor(self) -> None:
        """Return when a monitor obeys: its socket, and even its greeting, is there before the machine is."""
        while self.running():
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_unix_socket(str(self.operator)) as monitor:
                    await monitor.send_all(b'{"execute": "qmp_capabilities"}\n')
                    received = b""
                    while chunk := await monitor.receive_some():
                        received += chunk
                        if b'"return"' in received:
                            return
            await trio.sleep(0.005)
        raise RuntimeError(f"QEMU did not start: {' '.join(self.argv)}\n{self.stderr()}")

    def _clean_up(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
