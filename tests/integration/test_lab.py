"""The lab itself: guests that report and obey, QEMU builds, hosts that can be lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.lab.cache import made
from tests.lab.guests import BootSectorGuest, LinuxGuest
from tests.lab.hosts import Host, two_hosts
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

EVERY_DEVICE = ("VGA", "virtio-net-pci", "virtio-rng-pci", "virtio-balloon-pci", "pvpanic-pci")


@pytest.fixture(params=["system", "trixie", "unstable"])
def qemu(request: pytest.FixtureRequest) -> Executable:
    executable: Executable = request.getfixturevalue(f"{request.param}_qemu")
    return executable


def test_the_builds_are_of_the_generations_their_names_promise(
    system_qemu: Executable, trixie_qemu: Executable, unstable_qemu: Executable
) -> None:
    assert system_qemu.version >= (7, 2)
    assert trixie_qemu.version[:2] == (10, 0)
    assert unstable_qemu.version >= (11, 0)


@pytest.mark.qemu
async def test_a_linux_guest_checks_its_memory_and_obeys(qemu: Executable) -> None:
    async with LabVm(qemu=qemu, guest=LinuxGuest(pages=1024)) as vm:
        await vm.console.wait_ready()
        first = await vm.wait_round(2)
        await vm.send("d 100")
        await vm.send("s 2000")
        later = await vm.console.next_round()
        assert later.number > first.number
        assert later.uptime_ms > first.uptime_ms
        assert later.corrupt == 0
        await vm.send("p")
        assert await vm.wait_exit() == 0


@pytest.mark.qemu
async def test_a_flipped_bit_is_counted_once() -> None:
    async with LabVm(guest=LinuxGuest(pages=512, dirty=1, report_ms=0)) as vm:
        await vm.console.wait_ready()
        await vm.send("x 500")
        await vm.console.wait_line("bad page=500 ")
        for _ in range(3):
            assert (await vm.console.next_round()).corrupt == 1


@pytest.mark.qemu
@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_a_guest_with_two_cpus_and_every_device_reboots(machine: str) -> None:
    vm = LabVm(guest=LinuxGuest(pages=512), machine=machine, smp=2, devices=EVERY_DEVICE, memory="257M")
    async with vm:
        await vm.console.wait_line("curling ready pages=512 threads=2")
        await vm.wait_round(2)
        await vm.send("r")
        await vm.console.wait_ready(2)
        assert (await vm.console.next_round()).corrupt == 0


@pytest.mark.qemu
async def test_a_panic_reaches_qemu() -> None:
    async with LabVm(guest=LinuxGuest(pages=16), devices=["pvpanic-pci"]) as vm:
        await vm.console.wait_ready()
        async with await trio.open_unix_socket(str(vm.operator)) as monitor:
            await monitor.send_all(b'{"execute": "qmp_capabilities"}\n')
            await vm.send("c")
            with trio.fail_after(60):
                received = b""
                while b"GUEST_PANICKED" not in received:
                    received += await monitor.receive_some()


@pytest.mark.qemu
async def test_dirty_mode_counts_rounds_without_checking() -> None:
    async with LabVm(guest=LinuxGuest(pages=3000, dirty=3000, mode="dirty", pause_us=0)) as vm:
        await vm.console.wait_line("curling ready pages=3000 threads=1 mode=dirty")
        assert (await vm.wait_round(100)).corrupt == 0


@pytest.mark.qemu
@pytest.mark.kvm
@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_a_boot_sector_guest_checks_its_memory_and_obeys_under_kvm(
    qemu: Executable, machine: str
) -> None:
    async with LabVm(qemu=qemu, guest=BootSectorGuest(), machine=machine, accel="kvm") as vm:
        await vm.console.wait_ready()
        assert (await vm.wait_round(5)).corrupt == 0
        await vm.send("r")
        await vm.console.wait_ready(2)
        await vm.send("p")
        assert await vm.wait_exit() == 0


@pytest.mark.qemu
async def test_a_boot_sector_guest_boots_from_a_floppy_as_well() -> None:
    async with LabVm(guest=BootSectorGuest(floppy=True)) as vm:
        assert (await vm.wait_round(5)).corrupt == 0


@pytest.mark.qemu
async def test_a_qemu_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    vm = LabVm(guest=BootSectorGuest(), extra=["-device", "no-such-device"])
    with pytest.raises(RuntimeError, match="no-such-device"):
        async with vm:
            pytest.fail("it started")
    assert not vm.directory.exists()


@pytest.mark.qemu
async def test_a_vm_of_a_root_folder_is_our_child_and_looks_like_any_qemu(unstable_qemu: Executable) -> None:
    async with LabVm(qemu=unstable_qemu, guest=BootSectorGuest()) as vm:
        process = trio.Path(f"/proc/{vm.pid}")
        program = os.fsdecode((await (process / "cmdline").read_bytes()).split(b"\0")[0])
        assert program.endswith("/qemu-system-x86_64")
        assert str(await (process / "exe").readlink()) == program
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(vm.qmp))
            peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            assert int.from_bytes(peer[:4], sys.byteorder) == vm.pid
            assert json.loads(client.recv(4096))["QMP"]["version"]["qemu"]["major"] >= 11


@pytest.mark.qemu
async def test_the_loss_of_a_host_takes_its_vm_and_no_other(host_pair: tuple[Host, Host]) -> None:
    alpha, beta = host_pair
    async with (
        LabVm(guest=BootSectorGuest(), host=alpha) as lost,
        LabVm(guest=BootSectorGuest(), host=beta) as kept,
    ):
        await kept.wait_round(1)
        assert alpha.kill_all() == {lost.pid}
        assert await lost.wait_exit() == -signal.SIGKILL
        assert (await kept.console.next_round()).corrupt == 0


def test_hosts_reach_each_other_until_the_link_is_cut(host_pair: tuple[Host, Host]) -> None:
    alpha, beta = host_pair
    with beta.entered():
        listener = socket.create_server((beta.address, 0))
    with listener:
        address = listener.getsockname()

        def connect() -> None:
            with alpha.entered():
                # A packet that is sent before the link is quite up is sent again after a second.
                socket.create_connection(address, timeout=30).close()

        connect()
        alpha.cut()
        with pytest.raises(OSError, match="unreachable"):
            connect()
        alpha.heal()
        connect()


def test_a_host_starts_children_of_ours_in_a_group_of_their_own(host_pair: tuple[Host, Host]) -> None:
    alpha, beta = host_pair
    ours = Path("/proc/thread-self/ns/net").readlink()
    with alpha.popen(["sleep", "1000"]) as process:
        assert os.getpgid(process.pid) == process.pid
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[3] == str(os.getpid())
        assert alpha.pids() == {process.pid}
        assert beta.pids() == set()
        assert Path("/proc/thread-self/ns/net").readlink() == ours
        alpha.kill_all()
    assert process.returncode == -signal.SIGKILL


def test_hosts_leave_no_process_namespace_or_folder_behind() -> None:
    with two_hosts() as (alpha, beta):
        process = alpha.popen(["sleep", "1000"])
    assert process.wait() == -signal.SIGKILL
    for host in (alpha, beta):
        assert not Path("/run/netns", host.namespace).exists()
        assert not host.directory.exists()


def test_a_terminated_program_cleans_up_its_hosts() -> None:
    program = (
        "import trio\n"
        "from tests.lab.hosts import termination_as_interrupt, two_hosts\n"
        "async def main():\n"
        "    print(hosts[0].namespace, flush=True)\n"
        "    await trio.sleep_forever()\n"
        "with termination_as_interrupt(), two_hosts() as hosts:\n"
        "    trio.run(main)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        namespace = Path("/run/netns", process.stdout.readline().decode().strip())
        assert namespace.exists()
        process.terminate()
    assert not namespace.exists()


def test_a_killed_program_is_cleaned_up_after_by_the_next() -> None:
    program = (
        "import os, signal, subprocess\n"
        "from tests.lab.hosts import two_hosts\n"
        "with two_hosts() as hosts:\n"
        "    hosts[0].popen(['sleep', '1000'], stdout=subprocess.DEVNULL)\n"
        "    print(hosts[0].namespace, hosts[0].directory, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    name, directory = done.stdout.split()
    namespace = Path("/run/netns", name)
    assert namespace.exists()
    with two_hosts():
        assert not namespace.exists()
        assert not Path(directory).exists()


@pytest.mark.qemu
async def test_a_vm_dies_with_the_program_that_started_it() -> None:
    program = (
        "import os, signal, trio\n"
        "from tests.lab.guests import BootSectorGuest\n"
        "from tests.lab.vm import LabVm\n"
        "async def main():\n"
        "    async with LabVm(guest=BootSectorGuest()) as vm:\n"
        "        print(vm.pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        fd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(fd)
    os.close(fd)


def test_the_cache_makes_an_entry_once_and_keeps_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURLING_CACHE", str(tmp_path))

    def fail(target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        made("kind/entry", fail)
    assert [path.name for path in (tmp_path / "kind").iterdir()] == []
    assert made("kind/entry", lambda target: target.touch()).is_file()
    assert made("kind/entry", fail).is_file()
