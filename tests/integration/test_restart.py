"""A daemon is restarted, and the session goes on: no first pass, the guest not even stopped."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import trio

from tests.integration.stage import SYNC, VM, Stage, stage
from tests.lab.cluster import Node
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm
from tests.lab.witness import qemus

pytestmark = pytest.mark.qemu

TALKER = LinuxGuest(pages=256, dirty=16, pause_us=10000, report_ms=0, memory="128M")


def first_passes(here: Stage) -> int:
    """How many sessions have begun with one."""
    return here.happened(here.primary, "prepared")


async def stopped(node: Node) -> None:
    """Stop the daemon as its service manager does for a restart."""
    assert await node.stop() == 0
    assert node.manager is not None
    assert node.manager.store, f"it left nothing:\n{node.log_text()}"


async def started(node: Node) -> dict[str, Any]:
    """Start the daemon; what it says of the VM as soon as it answers."""
    assert node.manager is not None
    node.start()
    await node.ready()
    assert not node.manager.store, "what was taken up is the daemon's alone"
    return await node.show(VM)


async def rounds(here: Stage, count: int) -> None:
    """See the guest go on for a while, on alpha."""
    await here.vm.wait_round(here.vm.rounds()[-1].number + count, within=SYNC)


@pytest.mark.parametrize("which", ["primary", "backup", "both"])
async def test_after_a_restart_the_same_session_goes_on(unstable_qemu: Executable, which: str) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        nodes = [node for node in (here.primary, here.backup) if which in (node_name(here, node), "both")]
        before = await here.protect(5)
        standby = qemus(here.backup.directory)
        for turn in range(2):
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(stopped, node)
            now = here.vm.rounds()[-1].number
            await rounds(here, 20)
            for node in nodes:
                shown = await started(node)
                assert shown["state"] == ("protected" if node is here.primary else "standby")
                assert shown["generation"] == before["generation"]
                assert shown["engine_reason"] == before["engine_reason"]
                assert here.happened(node, "taken-up") == turn + 1
            after = await here.more_checkpoints(5)
            assert after["statistics"]["committed"] > before["statistics"]["committed"]
            assert here.vm.rounds()[-1].number > now
        assert first_passes(here) == 1
        assert qemus(here.backup.directory) == standby
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


def node_name(here: Stage, node: Node) -> str:
    return "primary" if node is here.primary else "backup"


async def test_a_replica_outlives_the_restart_of_its_daemon_though_the_primary_is_lost(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True, automatic=False) as here:
        await here.protect(5)
        here.lose_alpha()
        await here.backup.wait_state(VM, "suspect")
        await stopped(here.backup)
        assert (await started(here.backup))["state"] == "suspect"
        await here.backup.call("Failover", name=VM, force=False)
        await here.goes_on()


async def test_an_automatic_failover_goes_on_after_a_restart_of_the_backup(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        await here.protect(5)
        await stopped(here.backup)
        here.lose_alpha()
        await started(here.backup)
        await here.taken_over()
        await here.goes_on()


async def test_a_host_lost_while_its_daemon_restarts_is_still_noticed(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        await here.protect(5)
        await stopped(here.primary)
        assert (await here.backup.show(VM))["state"] == "standby"
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


async def test_a_daemon_that_is_stopped_for_good_leaves_the_guest_running(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        await here.protect(5)
        await stopped(here.primary)
        assert here.primary.manager is not None
        async with here.operator() as qmp:
            with qmp.events() as events:
                here.primary.manager.stop()
                with trio.fail_after(SYNC):
                    while (await events.receive()).name != "COLO_EXIT":
                        pass
            await rounds(here, 20)
            assert await qmp.status() == "running"
        await here.backup.wait_state(VM, "suspect")
        # The host answers, so nobody takes the VM over; and the next daemon protects it anew.
        await started(here.primary)
        await here.primary.wait_state(VM, "protected", within=SYNC)
        assert first_passes(here) == 2


async def test_a_crash_after_a_restart_is_seen_by_the_guards_that_were_taken_over(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        await here.protect(5)
        for node in (here.primary, here.backup):
            await stopped(node)
            await started(node)
        await here.more_checkpoints(5)
        async with here.operator() as qmp:
            with qmp.events() as events:
                here.primary.kill(signal.SIGKILL)
                with trio.fail_after(SYNC):
                    while (await events.receive()).name != "COLO_EXIT":
                        pass
        await rounds(here, 20)
        here.backup.kill(signal.SIGKILL)
        await here.only_processes(set())


async def test_a_paused_guest_is_still_paused_after_a_restart(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        await here.protect(5)
        await here.primary.call("Pause", name=VM)
        await stopped(here.primary)
        assert (await started(here.primary))["paused"]
        async with here.operator() as qmp:
            assert await qmp.status() == "paused"
        await here.primary.call("Resume", name=VM)
        await here.more_checkpoints(5)


async def test_a_session_with_whole_migrations_goes_on_too(system_qemu: Executable) -> None:
    async with stage(LabVm(qemu=system_qemu, guest=TALKER), managed=True, longest_epoch="200ms") as here:
        assert (await here.protect(3))["engine"] == "snapshot"
        await stopped(here.primary)
        await rounds(here, 20)
        assert (await started(here.primary))["state"] == "protected"
        await here.more_checkpoints(3)
        assert first_passes(here) == 1
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


async def test_what_cannot_be_read_is_begun_anew(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), managed=True) as here:
        await here.protect(5)
        await stopped(here.primary)
        manager = here.primary.manager
        assert manager is not None
        os.ftruncate(manager.store[f"{VM}/manifest"], 10)
        await started(here.primary)
        await here.primary.wait_state(VM, "protected", within=SYNC)
        assert first_passes(here) == 2
        await rounds(here, 5)
