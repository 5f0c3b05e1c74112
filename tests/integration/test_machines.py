"""Machines of many kinds, each protected, lost and found again at the backup."""

from __future__ import annotations

import pytest
import trio

from curling_fd.qmp.client import QmpClient, open_qmp
from tests.integration.stage import VM, stage
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

DEVICES = ("VGA", "virtio-net-pci,netdev=net0", "virtio-rng-pci", "virtio-balloon-pci,id=balloon0")
NETWORK = ("-netdev", "user,id=net0")

#: Neither a power of two nor a whole number of MiB.
MEMORY_KIB = 204 * 1024 + 456
BALLOON = 180 << 20


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("qemu", "machine"),
    [
        pytest.param("unstable", "pc", id="11-pc"),
        pytest.param("unstable", "q35", id="11-q35"),
        pytest.param("system", "q35", id="7.2-q35"),
    ],
)
async def test_a_machine_with_many_devices_and_an_odd_size_goes_on(
    qemu: str, machine: str, request: pytest.FixtureRequest
) -> None:
    executable: Executable = request.getfixturevalue(f"{qemu}_qemu")
    vm = LabVm(
        qemu=executable,
        guest=LinuxGuest(pages=1024, dirty=64, ip="10.0.2.15/24"),
        machine=machine,
        smp=2,
        memory=f"{MEMORY_KIB}K",
        devices=DEVICES,
        extra=NETWORK,
    )
    async with stage(vm, output="none") as here:
        await here.vm.console.wait_line("curling ready pages=1024 threads=2")
        shown = await here.protect(5)
        assert shown["ram_bytes"] == MEMORY_KIB * 1024
        async with here.operator() as operator:
            await operator.execute("balloon", {"value": BALLOON})
            await deflated(operator)
        await here.more_checkpoints(10)
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()
        async with open_qmp(here.backup.runtime(VM) / "operator.sock") as operator:
            assert (await operator.execute("query-balloon"))["actual"] == BALLOON
            assert len(await operator.execute("query-cpus-fast")) == 2


async def deflated(operator: QmpClient) -> None:
    """Wait until the guest has given up what it was asked for."""
    with operator.events() as events, trio.fail_after(60):
        while (await operator.execute("query-balloon"))["actual"] != BALLOON:
            async for event in events:
                if event.name == "BALLOON_CHANGE":
                    break
