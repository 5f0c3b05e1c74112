"""The planned move: the guest goes on at the backup, nothing is lost, roles are swapped; and back again."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio

from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.errors import DaemonUnreachable, NotProtected, PeerRefused
from curling_fd.qmp.client import GREETING_TIMEOUT
from curling_fd.varlink.client import Client
from tests.integration.stage import SYNC, VM, stage, wait_gone
from tests.lab.cluster import Node
from tests.lab.console import Console
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm
from tests.lab.witness import frozen_process, qemus, witness

pytestmark = pytest.mark.qemu

#: Seconds until a process that was woken has done some milliseconds' work, on a machine with much to do.
SLACK = 1.0

#: A guest that says each round that it makes.
TALKER = LinuxGuest(pages=256, dirty=16, pause_us=10000, report_ms=0, memory="128M")


async def switch(node: Node) -> dict[str, Any]:
    """Move the VM away from `node`, its primary."""
    with trio.fail_after(SYNC):
        return dict((await node.call("Switch", name=VM))["vm"])


async def switch_in_vain(node: Node) -> None:
    """Ask for a switch whose answer will not come."""
    with pytest.raises(DaemonUnreachable):
        await switch(node)


async def protected(primary: Node, backup: Node) -> int:
    """Wait until the VM is protected between the two, and return its generation."""
    here = await primary.wait_state(VM, "protected", within=SYNC)
    there = await backup.wait_state(VM, "standby", within=SYNC)
    assert here["generation"] == there["generation"]
    return int(here["generation"])


async def happened(node: Node, event: str) -> float:
    """When `event` happened on `node` for the first time, in seconds of the wall clock."""
    with trio.fail_after(SYNC):
        async with await Client.connect(str(node.socket)) as client:
            async for reply in await client.call_more("Events", {"since": 0}):
                if reply["event"]["event"] == event:
                    return float(reply["event"]["time"])
    raise AssertionError("the journal does not end")


@pytest.mark.parametrize("arbiter", ["manual", "file"])
async def test_a_switch_and_the_way_back_lose_nothing(unstable_qemu: Executable, arbiter: str) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=TALKER)
    async with stage(vm, automatic=arbiter == "file") as here:
        await here.protect(3)
        first = await protected(here.primary, here.backup)

        await switch(here.primary)
        assert await vm.wait_exit() == 0
        assert await protected(here.backup, here.primary) == first + 1
        # Its directory is emptied when it becomes the standby's: hold on to what it says there.
        with (here.backup.runtime(VM) / "console.log").open("rb") as at_beta:
            (running,) = qemus(here.backup.runtime(VM))
            await here.console.next_round()

            await switch(here.backup)
            await wait_gone(running)
            assert await protected(here.primary, here.backup) == first + 2
            back = Console(
                here.primary.runtime(VM) / "console.log", here.primary.runtime(VM) / "console.sock"
            )
            await back.next_round()

            said = [(vm.directory / "console.log").read_bytes(), at_beta.read(), back.log.read_bytes()]
        # What one host has not said to the end of a line, the next goes on with.
        rounds = re.findall(rb"curling round=(\d+) corrupt=(\d+) uptime_ms=\d+\r?\n", b"".join(said))
        assert [int(number) for number, _ in rounds] == list(range(1, len(rounds) + 1))
        assert {int(corrupt) for _, corrupt in rounds} == {0}
        assert all(text.count(b"round=") > 1 for text in said)


async def test_a_standby_out_of_reach_leaves_the_guest_where_it_is(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), automatic=False) as here:
        await here.protect(3)
        before = await protected(here.primary, here.backup)
        async with witness(here.vm.operator) as guest:
            (here.backup.runtime(VM) / "qmp.sock").unlink()
            with pytest.raises(PeerRefused, match="The standby QEMU on the backup failed") as caught:
                await switch(here.primary)
            assert caught.value.kind == "StandbyFailed"
            await guest.running()
            # Handed over and refused at once: two messages.
            assert 0 < guest.longest(guest.stops[-1].start_us) <= SLACK
            await here.vm.console.next_round()
            assert await protected(here.primary, here.backup) > before
        assert (await here.backup.show(VM))["role"] == "backup"


async def test_a_frozen_standby_is_given_up_before_the_guest_goes_on(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), automatic=False) as here:
        await here.protect(3)
        (standby,) = qemus(here.backup.runtime(VM))
        async with witness(here.vm.operator) as guest:
            with frozen_process(standby), pytest.raises(PeerRefused, match="The standby QEMU on the backup"):
                await switch(here.primary)
            await guest.running()
            # The standby may have been about to run it as long as it was there (I3).
            given_up = await happened(here.backup, "standby-died")
            last = max(guest.stops, key=lambda stop: (stop.end_us or 0) - stop.start_us)
            assert last.end_us is not None
            assert given_up <= last.end_us / 1e6
            assert (last.end_us - last.start_us) / 1e6 <= GREETING_TIMEOUT + SLACK
            await here.vm.console.next_round()
            await protected(here.primary, here.backup)


async def test_a_primary_daemon_killed_while_it_hands_over_does_not_run_the_guest_again(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), automatic=False) as here:
        await here.protect(3)
        await protected(here.primary, here.backup)
        (standby,) = qemus(here.backup.runtime(VM))
        async with witness(here.vm.operator) as guest, trio.open_nursery() as nursery:
            with frozen_process(standby):
                nursery.start_soon(switch_in_vain, here.primary)
                await here.backup.wait_state(VM, "taking-over")
                assert here.primary.process is not None
                here.primary.kill()
                here.primary.process.wait()
            await here.console.next_round()
            here.primary.start()
            await here.primary.ready()
            await protected(here.backup, here.primary)
            assert guest.stops[-1].end_us is None
        assert not here.vm.running()


async def test_a_vm_that_is_not_protected_is_not_switched(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), automatic=False) as here:
        before = await here.primary.show(VM)
        for node in (here.primary, here.backup):
            with pytest.raises(NotProtected):
                await switch(node)
            done = await trio.to_thread.run_sync(node.ctl, "switch", VM, "--confirm", VM)
            assert done.returncode == ExitCode.REFUSED
            assert "is not protected" in done.stderr
        assert await here.primary.show(VM) == before
        await here.vm.console.next_round()


async def test_curlingctl_switches_and_tells_where_the_vm_runs(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=TALKER), automatic=False) as here:
        await here.protect(1)
        refused = await trio.to_thread.run_sync(here.backup.ctl, "switch", VM, "--confirm", VM)
        assert refused.returncode == ExitCode.REFUSED
        done = await trio.to_thread.run_sync(here.primary.ctl, "switch", VM, "--confirm", VM)
        assert (done.returncode, done.stderr) == (ExitCode.OK, "")
        await protected(here.backup, here.primary)
