"""Output commit (I2) on real QEMU: no packet of an epoch that is not committed is ever seen on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.integration.stage import VM, Stage, stage
from tests.lab.front import CARD, CLIENT_ADDRESS, GUEST_ADDRESS, Front
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

TALKER = LinuxGuest(
    pages=64,
    dirty=8,
    pause_us=20000,
    memory="128M",
    ip=f"{GUEST_ADDRESS}/24",
    send_to=CLIENT_ADDRESS,
    send_gap_us=1000,
)

#: Datagrams that are many epochs' worth.
MANY = 500


@asynccontextmanager
async def talking(qemu: Executable, guest: LinuxGuest = TALKER) -> AsyncIterator[tuple[Stage, Front]]:
    """A guest on alpha that sends numbers, and a client that sees them; not protected yet."""
    async with stage(LabVm(qemu=qemu, guest=guest, extra=CARD), with_front=True) as here:
        assert here.front is not None
        async with trio.open_nursery() as nursery:
            await nursery.start(here.front.watch, ["alpha", "beta"])
            await here.front.more("alpha", 10)
            yield here, here.front
            nursery.cancel_scope.cancel()


async def test_without_a_fault_every_packet_leaves_once_and_in_order(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        first = wire.seen[0].number
        await here.protect(20)
        assert (await here.primary.show(VM))["output"] == "filter"
        await wire.more("alpha", MANY)
        await here.primary.call("Unprotect", name=VM)
        await wire.more("alpha", 10)
        numbers = wire.numbers("alpha")
        assert numbers == list(range(first, first + len(numbers)))


async def test_a_planned_switch_loses_no_packet_and_sends_none_twice(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        first = wire.seen[0].number
        await here.protect(20)
        with trio.fail_after(60):
            await here.primary.call("Switch", name=VM)
        await wire.more("beta", MANY)
        numbers = wire.numbers("alpha") + wire.numbers("beta")
        assert numbers == list(range(first, first + len(numbers)))


async def test_what_the_lost_host_sent_is_what_the_guest_remembers(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        await here.protect(20)
        await wire.more("alpha", MANY)
        here.lose_alpha()
        await wire.more("beta", MANY)
        assert max(wire.numbers("alpha")) < min(wire.numbers("beta"))
        await here.goes_on()
