"""The standby's process and its command line, with stand-ins for QEMU and with real ones."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from curling_fd.errors import StandbyFailed
from curling_fd.qmp.client import QmpClient, open_qmp
from curling_fd.standby import process as process_module
from curling_fd.standby.cmdline import RamBlock, device_ids, guest_memory, parse, standby_argv
from curling_fd.standby.options import FLAGS, WITH_WORD
from curling_fd.standby.process import STDERR_KEPT, StandbyProcess, listens, reap
from tests.lab.roots import Executable

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0

LISTENER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
print("about to listen", file=sys.stderr, flush=True)
sock.listen()
"""


def stand_in(path: Path, then: str = "import time; time.sleep(1000)") -> list[str]:
    """A program that listens at `path` and goes on with `then`."""
    return [sys.executable, "-c", LISTENER + then, str(path)]


def gone(pid_or_fd: int) -> bool:
    """Wait until the process of a pidfd has ended; takes ownership of the fd."""
    poller = select.poll()
    poller.register(pid_or_fd, select.POLLIN)
    ended = bool(poller.poll(PATIENCE * 1000))
    os.close(pid_or_fd)
    return ended


def open_files() -> list[str]:
    """What our descriptors are, but for the listing's own."""
    with os.scandir("/proc/self/fd") as entries:
        return sorted(os.readlink(entry.path) for entry in entries if "/fd" not in os.readlink(entry.path))


# The process.


async def test_it_starts_waits_and_is_closed_without_leaving_anything(tmp_path: Path) -> None:
    before = open_files()
    standby = await StandbyProcess.start(stand_in(tmp_path / "q"), [], str(tmp_path / "q"))
    assert listens(str(tmp_path / "q"))
    assert standby.stderr_tail() == "about to listen"
    assert os.getsid(standby.pid) == standby.pid
    pid = standby.pid
    standby.close()
    standby.close()
    assert not Path(f"/proc/{pid}").exists()
    assert open_files() == before


async def test_it_inherits_the_files_it_is_given_and_no_others(tmp_path: Path) -> None:
    given, other = os.memfd_create("given"), os.memfd_create("other")
    os.set_inheritable(other, True)
    standby = await StandbyProcess.start(stand_in(tmp_path / "q"), [given], str(tmp_path / "q"))
    links = {fd: os.readlink(f"/proc/{standby.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{standby.pid}/fd")}
    standby.close()
    os.close(given)
    os.close(other)
    assert "/memfd:given" in links[str(given)]
    assert not any("/memfd:other" in link for link in links.values())
    assert links["0"] == links["1"] == "/dev/null"


async def test_a_program_that_ends_at_once_is_reported_with_its_words() -> None:
    with pytest.raises(StandbyFailed) as caught:
        await StandbyProcess.start(["sh", "-c", "echo no such machine >&2; exit 3"], [], "/nowhere")
    assert caught.value.problem == "it exited with status 3"
    assert caught.value.stderr == "no such machine"


async def test_a_program_that_is_not_there_is_reported() -> None:
    before = open_files()
    with pytest.raises(StandbyFailed, match="/no/qemu cannot be started: No such file"):
        await StandbyProcess.start(["/no/qemu"], [], "/nowhere")
    assert open_files() == before


async def test_a_program_that_never_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "START_TIMEOUT", 0.05)
    with pytest.raises(StandbyFailed, match="no monitor within"):
        await StandbyProcess.start(["sleep", "1000"], [], "/nowhere")


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    argv = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(StandbyProcess.start, argv, [], "/nowhere")
        pid = await trio.to_thread.run_sync((tmp_path / "pid").read_text)
        nursery.cancel_scope.cancel()
    assert not Path(f"/proc/{pid.strip()}").exists()


async def test_without_a_guard_there_is_no_standby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curling_fd.system.guard.MAIN", Path("/does/not/exist"))
    with pytest.raises(StandbyFailed, match="nobody would end it"):
        await StandbyProcess.start(stand_in(tmp_path / "q"), [], str(tmp_path / "q"))


async def test_its_end_is_noticed_and_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    then = "open(os.path.dirname(sys.argv[1]) + '/go').read(); print('gone', file=sys.stderr)"
    standby = await StandbyProcess.start(stand_in(tmp_path / "q", then), [], str(tmp_path / "q"))
    await trio.to_thread.run_sync((tmp_path / "go").write_text, "now")
    with pytest.raises(StandbyFailed) as caught, trio.fail_after(PATIENCE):
        await standby.wait_failed()
    standby.close()
    assert caught.value.problem == "it exited with status 0"
    assert caught.value.stderr.endswith("gone")


async def test_a_killed_one_is_told_by_its_signal(tmp_path: Path) -> None:
    standby = await StandbyProcess.start(stand_in(tmp_path / "q"), [], str(tmp_path / "q"))
    os.kill(standby.pid, signal.SIGKILL)
    with pytest.raises(StandbyFailed, match="signal 9 ended it"), trio.fail_after(PATIENCE):
        await standby.wait_failed()
    standby.close()


async def test_one_that_prints_without_end_never_waits_for_us(tmp_path: Path) -> None:
    """Its pipe does not block, and what is kept of it is bounded."""
    flood = """
for _ in range(1000):
    try:
        os.write(2, b"x" * 4096)
    except BlockingIOError:
        pass
open(os.path.dirname(sys.argv[1]) + "/done", "w").close()
import time; time.sleep(1000)
"""
    os.mkfifo(tmp_path / "done")
    standby = await StandbyProcess.start(stand_in(tmp_path / "q", flood), [], str(tmp_path / "q"))
    await trio.to_thread.run_sync((tmp_path / "done").read_text)
    assert standby.stderr_tail() == "x" * STDERR_KEPT
    standby.close()


DAEMON = """
import sys, trio
from curling_fd.standby.process import StandbyProcess

async def main():
    standby = await StandbyProcess.start(sys.argv[2:], [], sys.argv[1])
    print(standby.pid, flush=True)
    for line in sys.stdin:
        getattr(standby, line.strip())()
        print("done", flush=True)

trio.run(main)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    path = tmp_path / "q"
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(path), *stand_in(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        yield process
        process.kill()


def told(daemon: subprocess.Popen[str], verb: str | None = None) -> str:
    assert daemon.stdin is not None
    assert daemon.stdout is not None
    if verb:
        print(verb, file=daemon.stdin, flush=True)
    return daemon.stdout.readline().strip()


def test_a_waiting_standby_dies_with_its_daemon(daemon: subprocess.Popen[str]) -> None:
    standby = os.pidfd_open(int(told(daemon)))
    daemon.kill()
    assert gone(standby)


def test_an_active_vm_outlives_its_daemon(daemon: subprocess.Popen[str]) -> None:
    pid = int(told(daemon))
    assert told(daemon, "release") == "done"
    daemon.kill()
    daemon.wait()
    # Whoever would kill it has been reaped before release() returned; that the process is there is enough.
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        assert stat.read().rpartition(")")[2].split()[0] in "SR"
    os.kill(pid, signal.SIGKILL)


async def test_a_released_vm_that_ends_leaves_no_zombie(tmp_path: Path) -> None:
    standby = await StandbyProcess.start(stand_in(tmp_path / "q"), [], str(tmp_path / "q"))
    pid = standby.pid
    standby.release()
    standby.close()
    assert Path(f"/proc/{pid}").exists()
    end = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert gone(end)
    reap()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("ours", ["-1", "0", "300"])
def test_the_vm_is_not_spared_as_its_daemon_may_be(tmp_path: Path, ours: str) -> None:
    code = DAEMON.replace(
        "async def main():", f"open('/proc/self/oom_score_adj', 'w').write('{ours}')\n\nasync def main():"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "q"), *stand_in(tmp_path / "q")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as daemon:
        pid = told(daemon)
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == (ours if int(ours) >= 0 else "0")
        daemon.kill()


def test_only_a_socket_that_listens_counts(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    assert not listens(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        assert not listens(path)
        sock.listen()
        assert listens(path)
    assert not listens(path)


# The command line, with real QEMUs: a whole migration goes only into the same machine.


@pytest.fixture(params=["system", "trixie", "unstable"])
def qemu(request: pytest.FixtureRequest) -> Executable:
    executable: Executable = request.getfixturevalue(f"{request.param}_qemu")
    return executable


@pytest.mark.qemu
def test_the_options_we_know_are_the_ones_qemu_has(qemu: Executable) -> None:
    text = subprocess.run([*qemu.argv, "-help"], capture_output=True, text=True, check=True).stdout
    with_word, flags = set(), set()
    for line in text.splitlines():
        if found := re.match(r"-{1,2}([a-z0-9][\w-]*)(/-\w+)?( *\S.*)?$", line, re.IGNORECASE):
            # Two blanks or a tab separate an option that stands alone from what is said about it.
            described = found[3] is None or re.match(r"\s{2}|\t", found[3])
            (flags if described else with_word).add(found[1])
    # Help writes these in a way of their own.
    with_word -= {"async-teardown", "h", "nic"}
    flags -= {"M", "dtb", "fda", "hda", "hdc", "nic"}
    assert flags - FLAGS - WITH_WORD == set()
    assert with_word - WITH_WORD - FLAGS == set()
    assert flags & WITH_WORD == set()
    assert with_word & FLAGS == set()


MACHINES: dict[str, list[str]] = {
    "plain": ["-m", "64"],
    "no size": ["-display", "none"],
    "pc with an odd size and devices": [
        "-machine", "pc,usb=off", "-M", "vmport=off", "-m", "67", "-smp", "2", "-vga", "std",
        "-device", "virtio-net-pci,netdev=n0,id=net0", "-netdev", "user,id=n0",
        "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-nographic",
    ],
    "q35 with what it makes on its host": [
        "-machine", "q35", "-m", "size=64M", "-nodefaults",
        "-chardev", "socket,id=c0,path={tmp}/c0,server=on,wait=off", "-device", "isa-serial,chardev=c0",
        "-serial", "unix:{tmp}/c1,server,nowait", "-monitor", "unix:{tmp}/hmp,server=on,wait=off",
        "-chardev", "file,id=log,path={tmp}/log", "-device", "isa-debugcon,iobase=0x402,chardev=log",
        "-vnc", "unix:{tmp}/vnc", "-D", "{tmp}/qemu.log", "-pidfile", "{tmp}/pid",
        "-name", "a,,b,debug-threads=on",
    ],
    "DIMMs of files and of memory": [
        "-machine", "pc", "-m", "size=64M,slots=4,maxmem=1G",
        "-object", "memory-backend-file,id=d0,size=64M,mem-path={tmp}/d0,share=on",
        "-device", "pc-dimm,memdev=d0,id=dimm0",
        "-object", '{"qom-type":"memory-backend-ram","id":"d1","size":67108864}',
        "-device", '{"driver":"pc-dimm","memdev":"d1","id":"dimm1"}',
        "-object", "memory-backend-memfd,id=d2,size=64M,prealloc=on", "-device", "pc-dimm,memdev=d2,id=dimm2",
    ],
    "libvirt's way": [
        "-name", "guest=web,debug-threads=on", "-m", "size=65536k",
        "-machine", "q35,usb=off,memory-backend=pc.ram",
        "-object", '{"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864,"prealloc":true}',
        "-uuid", "c7a5fdbd-cdaf-9455-926a-d65c16db1809", "-no-user-config", "-nodefaults", "-no-shutdown",
        "-device", '{"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","addr":"0x1"}',
        "-device", '{"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.1","addr":"0x0"}',
        "-display", "none", "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
    ],
    "NUMA": [
        "-m", "64", "-smp", "2", "-object", "memory-backend-memfd,id=n0,size=32M,share=on",
        "-object", "memory-backend-ram,id=n1,size=32M", "-numa", "node,cpus=0,memdev=n0",
        "-numa", "node,cpus=1,memdev=n1",
    ],
    "a file of its own": ["-m", "64", "-mem-path", "/dev/shm", "-mem-prealloc"],
}  # fmt: skip


async def blocks_of(qmp: QmpClient) -> dict[str, int]:
    """Name and bytes of every memory block, as QEMU itself lists them."""
    text: Any = await qmp.execute("human-monitor-command", {"command-line": "info ramblock"})
    lines = [line.split() for line in text.splitlines()[1:]]
    return {words[0]: int(words[words.index("KiB") + 2 if "KiB" in words else 4], 16) for words in lines}


async def machine_of(qmp: QmpClient) -> tuple[Any, ...]:
    """What must be the same on both sides."""
    return (
        await qmp.execute("qom-get", {"path": "/machine", "property": "type"}),
        await blocks_of(qmp),
        [
            {key: value for key, value in dimm["data"].items() if key != "memdev"}
            for dimm in await qmp.execute("query-memory-devices")
        ],
    )


async def migrated(source: QmpClient, target: QmpClient, path: Path) -> None:
    """A whole migration; ends when the target has it."""
    wanted = {"capabilities": [{"capability": "events", "state": True}]}
    await source.execute("migrate-set-capabilities", wanted)
    await target.execute("migrate-set-capabilities", wanted)
    with target.events() as arrival, source.events() as departure, trio.fail_after(PATIENCE):
        await target.execute("migrate-incoming", {"uri": f"unix:{path}"})
        await source.execute("migrate", {"uri": f"unix:{path}"})
        for events in (departure, arrival):
            async for event in events:
                assert event.data.get("status") not in ("failed", "cancelled")
                if event.name == "MIGRATION" and event.data["status"] == "completed":
                    break


class Waiting:
    """A standby made from the command line of the process `pid`, as the backup's daemon makes one."""

    def __init__(self, process: StandbyProcess, argv: list[str], fds: Sequence[int]) -> None:
        self.process = process
        self.argv = argv
        self._fds = fds

    @classmethod
    async def start(cls, primary: QmpClient, pid: int, binary: str, directory: Path) -> Waiting:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        blocks = await blocks_of(primary)
        kind: Any = await primary.execute("qom-get", {"path": "/machine", "property": "type"})
        ram = []
        for name in guest_memory(parse(argv), blocks):
            fd = os.memfd_create(name.replace("/", "_"))
            os.ftruncate(fd, blocks[name])
            ram.append(RamBlock(name, blocks[name], fd))
        directory.mkdir()
        derived = standby_argv(
            argv,
            binary=binary,
            ram=ram,
            qmp_path=str(directory / "qmp"),
            directory=str(directory),
            machine=kind.removesuffix("-machine"),
        )
        fds = [block.fd for block in ram]
        return cls(await StandbyProcess.start(derived, fds, str(directory / "qmp")), derived, fds)

    def close(self) -> None:
        self.process.close()
        for fd in self._fds:
            os.close(fd)


def comparable(argv: list[str]) -> list[list[str]]:
    """A standby's options without what differs by host: its directory, its fds, and a lab QEMU's own -L."""
    words = [re.sub(r"/proc/self/fd/\d+|/(there|back)(?=/)", "", word) for word in argv]
    return [option.words() for option in parse(words).options if option.name != "L"]


@pytest.mark.qemu
@pytest.mark.parametrize("machine", MACHINES)
async def test_a_whole_migration_goes_into_the_standby_and_on_into_the_next(
    qemu: Executable, machine: str, tmp_path: Path
) -> None:
    options = [word.replace("{tmp}", str(tmp_path)) for word in MACHINES[machine]]
    argv = [*qemu.argv, "-accel", "tcg", *options, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    if "-nographic" not in argv and "-display" not in argv:
        argv += ["-display", "none"]
    primary = await StandbyProcess.start(argv, [], str(tmp_path / "qmp"))
    standbys: list[Waiting] = []
    try:
        async with open_qmp(tmp_path / "qmp") as first:
            there = await Waiting.start(first, primary.pid, qemu.path, tmp_path / "there")
            standbys.append(there)
            async with open_qmp(tmp_path / "there/qmp") as second:
                assert await machine_of(second) == await machine_of(first)
                peripheral: Any = await first.execute("qom-list", {"path": "/machine/peripheral"})
                assert {child["name"] for child in peripheral} - {"type"} == device_ids(argv)
                await migrated(first, second, tmp_path / "stream")
                primary.close()
                # As after a failover: it is a primary now, and a standby is made from its own command line.
                assert (await second.execute("query-status"))["status"] == "paused"
                await second.execute("cont")
                back = await Waiting.start(second, there.process.pid, qemu.path, tmp_path / "back")
                standbys.append(back)
                async with open_qmp(tmp_path / "back/qmp") as third:
                    assert await machine_of(third) == await machine_of(second)
                    await migrated(second, third, tmp_path / "stream2")
        assert comparable(back.argv) == comparable(there.argv)
    finally:
        primary.close()
        for standby in standbys:
            standby.close()


@pytest.mark.qemu
async def test_a_dimm_after_an_odd_one_gets_the_same_address(qemu: Executable, tmp_path: Path) -> None:
    """A file is aligned to 4 KiB and other memory to 2 MiB, and the standby has nothing but files."""
    argv = [
        *qemu.argv, "-S", "-accel", "tcg", "-display", "none", "-m", "size=64M,slots=4,maxmem=1G",
        "-object", f"memory-backend-file,id=d0,size={(64 << 20) + 4096},mem-path={tmp_path}/d0,share=on",
        "-device", "pc-dimm,memdev=d0,slot=0",
        "-object", "memory-backend-ram,id=d1,size=64M", "-device", "pc-dimm,memdev=d1,slot=1",
        "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off",
    ]  # fmt: skip
    primary = await StandbyProcess.start(argv, [], str(tmp_path / "qmp"))
    async with open_qmp(tmp_path / "qmp") as first:
        standby = await Waiting.start(first, primary.pid, qemu.path, tmp_path / "there")
        async with open_qmp(tmp_path / "there/qmp") as second:
            assert await machine_of(second) == await machine_of(first)
    primary.close()
    standby.close()
