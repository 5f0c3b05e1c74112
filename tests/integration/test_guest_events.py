"""What a guest and its operator do while it is protected: reboot, reset, pause, power off, panic, a QEMU killed."""

from __future__ import annotations

import random
import signal
from collections.abc import AsyncIterator

import pytest
import trio

from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.qmp.protocol import Event
from tests.integration.stage import ROUND, SYNC, TAKEN, VM, Stage, stage
from tests.lab.guests import BootSectorGuest, LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

LINUX = LinuxGuest(pages=512, dirty=64, memory="128M")
FAST = {"longest_epoch": "10ms", "shortest_epoch": "10ms"}
PANIC = ("pvpanic-pci",)


async def until(events: EventStream, name: str) -> Event:
    """The next event of that name."""
    with trio.fail_after(60):
        async for event in events:
            if event.name == name:
                return event
    raise AssertionError(f"QEMU went away before {name}")


# Reboots.


async def test_a_reboot_and_a_reset_do_not_end_protection(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=LINUX, smp=2), **FAST) as here:
        before = await here.protect()
        await here.vm.send("r")
        await here.vm.console.wait_ready(2, within=SYNC)
        await here.more_checkpoints()
        async with here.operator() as operator:
            with operator.events() as events:
                await operator.execute("system_reset")
                await until(events, "RESET")
        await here.vm.console.wait_ready(3, within=SYNC)
        start = len(here.vm.console.lines())
        await here.vm.console.wait_round(2, start=start, within=ROUND)
        after = await here.more_checkpoints()
        assert after["state"] == "protected"
        assert after["statistics"]["checkpoints"] > before["statistics"]["checkpoints"]
        assert here.happened(here.primary, "committed") == 1  # the same session all the time
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


@pytest.mark.kvm
async def test_a_reset_in_the_middle_of_the_firmware_is_survived_too() -> None:
    async with stage(LabVm(accel="kvm", guest=BootSectorGuest()), **FAST) as here:
        await here.protect()
        async with here.operator() as operator:
            for _ in range(5):
                await operator.execute("system_reset")
                await here.more_checkpoints(3)
        await here.vm.console.wait_ready(2, within=SYNC)
        await here.vm.wait_round(2)
        await here.more_checkpoints()
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


# Pauses.


async def pauses_hold(here: Stage, operator: QmpClient) -> None:
    """See that the guest stands still though checkpoints would have been due, and that Curling knows."""
    shown = await here.primary.show(VM)
    assert shown["paused"]
    assert shown["state"] == "protected"
    with operator.events() as events:
        rounds = len(here.vm.rounds())
        committed = shown["statistics"]["committed"]
        # Many epochs long, by the only clock there is while nothing happens.
        with trio.move_on_after(EPOCHS * 0.01):
            async for event in events:
                pytest.fail(f"{event.name} of a paused guest")
    assert await operator.status() == "paused"
    shown = await here.primary.show(VM)
    assert shown["statistics"]["committed"] <= committed + 1
    assert len(here.vm.rounds()) <= rounds + 1
