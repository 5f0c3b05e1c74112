"""After an outage protection comes back by itself: visible, not faster than allowed, with roles swapped."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import trio

from curling_fd.capture.settings import UNTHROTTLED
from curling_fd.varlink.client import Client
from tests.integration.stage import SYNC, VM, stage
from tests.lab.cluster import Node
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

MIB = 1 << 20

#: A guest with something to send that writes little.
CALM = LinuxGuest(pages=12000, dirty=64, pause_us=10000, memory="128M")

#: Its checkpoints are 100 MB each.
BUSY = LinuxGuest(pages=25000, dirty=25000, pause_us=10000, mode="dirty", memory="192M")


async def protect(node: Node) -> list[dict[str, Any]]:
    """Protect the VM; what was shown of its first pass meanwhile."""
    shown = []
    with trio.fail_after(SYNC):
        async with await Client.connect(str(node.socket)) as client:
            async for reply in await client.call_more("Protect", {"name": VM}):
                if reply["vm"]["progress"]:
                    shown.append(reply["vm"]["progress"])
    return shown


async def events(node: Node, *names: str, count: int) -> list[dict[str, Any]]:
    """The first `count` events of these names on `node`."""
    found: list[dict[str, Any]] = []
    with trio.fail_after(SYNC):
        async with await Client.connect(str(node.socket)) as client:
            async for reply in await client.call_more("Events", {"since": 0}):
                if reply["event"]["event"] in names:
                    found.append(reply["event"])
                if len(found) == count:
                    return found
    raise AssertionError("the journal does not end")


@pytest.mark.parametrize("engine", ["incremental", "precopy"])
async def test_a_first_pass_keeps_to_its_limit_and_checkpoints_need_not(
    unstable_qemu: Executable, engine: str
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=CALM)
    async with stage(vm, automatic=False, engine=engine, resync_bandwidth="32MiB/s") as here:
        shown = await protect(here.primary)
        assert {progress["limit"] for progress in shown} == {32 * MIB}
        sent, took = shown[-1]["done_bytes"], (await here.primary.show(VM))["statistics"]["first_pass_ms"]
        assert sent > 40 * MIB
        # The last 300 ms, the guest stopped, are as fast as can be.
        assert took / 1000 >= (sent / (32 * MIB) - 0.3) * 0.8
        (told,) = await events(here.primary, "first-pass", count=1)
        assert told["message"].endswith("/s (limit 32 MiB/s)")
        async with here.operator() as qmp:
            assert (await qmp.execute("query-migrate-parameters"))["max-bandwidth"] == UNTHROTTLED


async def test_a_guest_that_writes_faster_than_the_limit_is_protected_all_the_same(
    unstable_qemu: Executable,
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=BUSY)
    async with stage(vm, automatic=False, engine="incremental", resync_bandwidth="64MiB/s") as here:
        await protect(here.primary)
        (raised,) = await events(here.primary, "limit-raised", count=1)
        assert raised["message"].endswith("its limit is 128 MiB/s now")
        # At 64 MiB/s one of them would take longer than the 300 ms that the guest may be stopped.
        shown = await here.more_checkpoints(3)
        assert shown["statistics"]["bytes_last"] > 64 * MIB * 0.3


async def test_a_backup_that_comes_back_is_used_again_and_is_asked_less_and_less_until_then(
    unstable_qemu: Executable,
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=CALM)
    async with stage(vm, automatic=False, resync_bandwidth="64MiB/s") as here:
        await here.protect(3)
        here.backup.kill()
        attempts = await events(here.primary, "protect", count=5)
        times = [attempt["time"] for attempt in attempts[1:]]
        gaps = [after - before for before, after in pairwise(times)]
        assert all(gap >= least for gap, least in zip(gaps, (1.0, 2.0, 4.0), strict=True)), gaps
        shown = await here.primary.show(VM)
        assert shown["state"] in ("unprotected", "connecting")

        assert here.backup.process is not None
        here.backup.process.wait()
        here.backup.start()
        await here.backup.ready()
        await here.primary.wait_state(VM, "protected", within=SYNC)
        await here.backup.wait_state(VM, "standby", within=SYNC)
        assert len(await events(here.primary, "first-pass", count=2)) == 2
        await here.vm.console.next_round()


async def test_a_lost_host_that_comes_back_becomes_the_backup_by_itself(unstable_qemu: Executable) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=CALM)
    async with stage(vm, resync_bandwidth="32MiB/s") as here:
        await here.protect(3)
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()

        assert here.primary.process is not None
        here.primary.process.wait()
        here.alpha.heal()
        here.primary.start()
        await here.primary.ready()
        now = await here.backup.wait_state(VM, "protected", within=SYNC)
        back = await here.primary.wait_state(VM, "standby", within=SYNC)
        assert (now["role"], back["role"]) == ("primary", "backup")
        assert now["generation"] == back["generation"]
        (told,) = await events(here.backup, "first-pass", count=1)
        assert told["message"].endswith("(limit 32 MiB/s)")
        await here.console.next_round()
