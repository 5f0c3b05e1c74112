"""A lab host: an emulated machine with an SVM, a disk that outlives its power, and a line to its agent."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import define, field

from tests.lab.console import Console
from tests.lab.debs import run
from tests.lab.roots import Executable, qemu_binary

from .control import Agent, connected
from .image import Image

_POLL_SECONDS = 0.02
#: With two, each in a thread of its own, QEMU now and then runs code that the other has just changed as it
#: was before: kernels patch themselves while they run (static keys), and end in `Oops: int3`.
_CPUS = 1

_VERSION = (7, 2)

#: A QEMU that has closed its sockets is gone within this.
_END_SECONDS = 5.0


@define(eq=False)
class Host:
    """One machine. Its consoles and its journal are files below `records`, appended to over all its boots.

    Args:
        number: 1 or 2; its addresses and MACs end with it.
        image: what it boots; never written to.
        payload: the second disk, read-only.
        sockets: folder for sockets and the disk; short, for sun_path.
        records: folder for what is kept.
        shared: folder of this machine that every host has as /srv/arbiter.
    """

    name: str
    number: int
    image: Image
    payload: Path
    sockets: Path
    records: Path
    shared: Path
    memory: str = "2048"
    boots: int = 0
    agent: Agent = field(init=False)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def link_address(self) -> str:
        """On the network between the hosts: README's own addresses."""
        return f"192.0.2.{self.number}"

    @property
    def front_address(self) -> str:
        """On the network of clients and guests."""
        return f"198.51.100.{self.number}"

    @property
    def disk(self) -> Path:
        return self.sockets / f"{self.name}.qcow2"

    @property
    def pid(self) -> int | None:
        """The process that is this machine, or None while it has no power."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def console_log(self) -> Path:
        return self.records / f"{self.name}.console.log"

    @property
    def journal_log(self) -> Path:
        return self.records / f"{self.name}.journal.json"

    @property
    def guest_console(self) -> Console:
        """What a guest that runs here prints. Read-only: its socket is inside the host."""
        return Console(
            self.records / f"{self.name}.guest.log", Path("/nonexistent"), lambda: self.pid is not None
        )

    def make_disk(self) -> None:
        """A disk that is the image's, and from then on has what this host wrote."""
        options = f"backing_file={self.image.disk},backing_fmt=raw"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(self.disk)])

    async def power_on(self) -> None:
        """Start the machine; it boots by itself. Returns when its sockets are there."""
        assert self.pid is None, f"{self.name} is on"
        for socket in (self._agent_socket, self._serial_socket, self._qmp_socket):
            socket.unlink(missing_ok=True)
        self.boots += 1
        # Killed with the process that started it, however that ends.
        command = ["setpriv", "--pdeathsig", "KILL", "--", *self._command()]
        with (self.records / f"{self.name}.qemu.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while not self._qmp_socket.exists():
            if self.pid is None:
                words = (self.records / f"{self.name}.qemu.log").read_text(errors="replace")
                raise RuntimeError(f"QEMU of {self.name} did not start:\n{words}")
            await trio.sleep(_POLL_SECONDS)

    def lose_power(self) -> str:
        """SIGKILL: what is not on the disk is gone. Returns how it is known, once it is dead."""
        assert self._process is not None and self._process.poll() is None, f"{self.name} has no power to lose"
        pid = self._process.pid
        self._process.kill()
        status = self._process.wait()
        assert status == -signal.SIGKILL, f"QEMU of {self.name} had ended by itself: {status}"
        assert not Path(f"/proc/{pid}").exists()
        return f"{self.name} lost its power: process {pid} was killed (wait status {status}) and is gone"

    def own_end(self) -> str | None:
        """How the machine ended by itself, a reset included, or None if it lost its power.

        To be asked when the line to its agent is lost.
        """
        if self._process is None:
            return None
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self.name} runs without its agent"
        if status == -signal.SIGKILL:
            return None
        log = self.records / f"{self.name}.cpu.log"
        last = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        return f"{self.name} ended by itself (wait status {status}); the end of {log.name}:\n{last}"

    def close(self) -> None:
        """End the machine, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @asynccontextmanager
    async def connected(self, *, within: float = 240) -> AsyncIterator[Agent]:
        """The line to its agent, for the length of a block; waits while it boots."""
        async with connected(self.name, self._agent_socket, within=within) as agent:
            self.agent = agent
            yield agent

    @property
    def _agent_socket(self) -> Path:
        return self.sockets / f"{self.name}.agent"

    @property
    def _serial_socket(self) -> Path:
        return self.sockets / f"{self.name}.serial"

    @property
    def _qmp_socket(self) -> Path:
        return self.sockets / f"{self.name}.qmp"

    def _command(self) -> list[str]:
        cmdline = (
            "console=ttyS0 root=/dev/vda rw panic=-1 quiet net.ifnames=0 "
            # QEMU loses a timer's interrupt now and then, for a CPU that halts. If one comes every 4 ms that
            # does no harm; if it was to come once, the host stands still until another comes.
            "nohz=off highres=off "
            "no_timer_check nokaslr cryptomgr.notests mitigations=off "
            f"systemd.hostname={self.name} systemd.machine_id={self.number:032x} "
            f"lab.eth0={self.link_address}/24 lab.br0={self.front_address}/24 "
            f"{self.image.cmdline}"
        )
        command = [*_qemu().argv, "-name", f"lab-{self.name}", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512"]
        command += ["-cpu", "EPYC,+svm", "-smp", str(_CPUS), "-m", self.memory, "-no-reboot"]
        command += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", cmdline]
        # A disk with a cache of its own, as real ones have: what was not flushed is lost with the power.
        command += ["-drive", f"file={self.disk},format=qcow2,if=virtio,cache=writeback,discard=unmap"]
        command += ["-drive", f"file={self.payload},format=raw,if=virtio,readonly=on"]
        command += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
        serial = f"socket,id=serial,path={self._serial_socket},server=on,wait=off"
        command += [
            "-chardev",
            f"{serial},logfile={self.console_log},logappend=on",
            "-serial",
            "chardev:serial",
        ]
        command += ["-device", "virtio-serial-pci,max_ports=8"]
        agent = f"socket,id=agent,path={self._agent_socket},server=on,wait=off"
        journal = f"file,id=journal,path={self.journal_log},append=on"
        guest = f"file,id=guest,path={self.records}/{self.name}.guest.log,append=on"
        for name, chardev in (("agent", agent), ("journal", journal), ("guest", guest)):
            command += ["-chardev", chardev, "-device", f"virtserialport,chardev={name},name=lab.{name}"]
        for index, network in enumerate(("link", "front")):
            path = self.sockets / f"{network}.{self.name}.sock"
            stream = f"stream,id={network},server=off,addr.type=unix,addr.path={path}"
            mac = f"52:54:00:00:{index:02x}:{self.number:02x}"
            command += ["-netdev", stream, "-device", f"virtio-net-pci,netdev={network},mac={mac}"]
        command += ["-d", "cpu_reset", "-D", str(self.records / f"{self.name}.cpu.log")]
        share = f"local,path={self.shared},mount_tag=arbiter,security_model=mapped-xattr"
        command += ["-virtfs", share, "-qmp", f"unix:{self._qmp_socket},server=on,wait=off"]
        return command


def _qemu() -> Executable:
    """Debian 12's, wherever the lab runs.

    Guests of hosts that QEMU 10.0 emulates stand still for ever now and then: their CPU faults on the same
    instruction again and again, though its page is there.
    """
    system = qemu_binary()
    return system if system.version[:2] == _VERSION else qemu_binary("bookworm")
