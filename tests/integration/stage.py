"""What tests of protected VMs start from: a VM on alpha, beta as its backup, and what may happen to them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import trio
from attrs import define

from curling_fd.qmp.client import QmpClient, open_qmp
from tests.lab.cluster import Node, cluster, start_all
from tests.lab.console import Console, Round
from tests.lab.front import TAP, Front, front
from tests.lab.hosts import Host, two_hosts
from tests.lab.manager import ServiceManager
from tests.lab.vm import LabVm

VM = "lab"

#: Bounds, in seconds: far above what is needed, for what they bound waits for events.
BOOT = 120.0
SYNC = 120.0
TAKEOVER = 60.0
ROUND = 60.0

#: Where the backup has taken the VM over; its own protection is tried next, and has no host to go to.
TAKEN = ("active", "connecting", "unprotected")


@define(eq=False)
class Stage:
    """Two hosts with their daemons, and the VM `lab` on the first."""

    vm: LabVm
    alpha: Host
    beta: Host
    primary: Node
    backup: Node
    front: Front | None = None

    async def protect(self, checkpoints: int = 10) -> dict[str, Any]:
        """Protect the VM and wait for that many committed checkpoints; what `Show` says then."""
        with trio.fail_after(SYNC):
            await self.primary.call("Protect", name=VM)
        return await self.primary.wait_committed(VM, checkpoints, within=SYNC)

    async def more_checkpoints(self, count: int = 5) -> dict[str, Any]:
        """Wait until `count` more checkpoints are committed than are now."""
        now = (await self.primary.show(VM))["statistics"]["committed"]
        return await self.primary.wait_committed(VM, now + count, within=SYNC)

    def happened(self, node: Node, event: str) -> int:
        """How often the journal of `node` has that event of the VM."""
        return node.log_text().count(f" {VM}: {event}: ")

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[QmpClient]:
        """A second monitor of the VM on alpha."""
        async with open_qmp(self.vm.operator) as qmp:
            yield qmp

    def lose_alpha(self) -> None:
        """The loss of power: the cables are dead and every process of the host is gone."""
        self.alpha.cut()
        if self.front is not None:
            self.front.cut(self.alpha)
        self.alpha.kill_all()

    @property
    def console(self) -> Console:
        """The console of the VM on beta, once it runs there."""
        here = self.backup.runtime(VM)
        return Console(here / "console.log", here / "console.sock")

    async def no_standby(self) -> None:
        """Wait until nothing but the daemon runs on beta: no standby, no guard."""
        assert self.backup.process is not None
        await self.only_processes({self.backup.process.pid})

    async def only_processes(self, pids: set[int]) -> None:
        """Wait until those are all that run on beta."""
        with trio.fail_after(60):
            while True:
                if self.beta.pids() == pids:
                    return
                await trio.sleep(0.01)

    async def taken_over(self) -> dict[str, Any]:
        """Wait until beta has taken the VM over; what `Show` says there then."""
        return await self.backup.wait_state(VM, *TAKEN, within=TAKEOVER)

    async def goes_on(self, *, rounds: int = 5) -> Round:
        """See the guest go on at beta from where it was, every page of it right; its first report there."""
        last = self.vm.rounds()[-1]
        first = await self.console.next_round(within=ROUND)
        # One that was started anew would count from 1; one from the future there is not.
        assert first.number > 1
        after = await self.console.wait_round(max(last.number, first.number) + rounds, within=ROUND)
        assert max(report.corrupt for report in [*self.vm.rounds(), *self.console.rounds()]) == 0
        assert after.uptime_ms > first.uptime_ms
        return first


async def wait_gone(pid: int) -> None:
    """Wait until the process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with trio.fail_after(SYNC):
        await trio.lowlevel.wait_readable(fd)
    os.close(fd)


@asynccontextmanager
async def stage(
    vm: LabVm,
    *,
    automatic: bool = True,
    managed: bool = False,
    with_front: bool = False,
    taps: Sequence[str] = (TAP,),
    daemon: Mapping[str, Any] | None = None,
    **keys: Any,
) -> AsyncIterator[Stage]:
    """Boot `vm` on alpha, with a daemon on both hosts that knows it.

    Args:
        automatic: with the arbiter `file`, so that the backup takes over by itself.
        daemon: keys of curlingd.toml on both hosts.
        with_front: there are `taps`, and a client that sees what the guest sends.
        managed: each daemon has a service manager, which keeps descriptors for it.
        keys: of the VM's file on both hosts; `engine` and the epochs, for instance.
    """
    with ExitStack() as stack:
        alpha, beta = stack.enter_context(two_hosts())
        wire = stack.enter_context(front((alpha, beta), taps)) if with_front else None
        async with cluster((alpha, beta), **(daemon or {})) as (primary, backup):
            vm.host, vm.name = alpha, VM
            async with vm:
                if automatic:
                    shared = alpha.directory.parent / "arbiter"
                    shared.mkdir()
                    keys |= {"arbiter": "file", "arbiter_directory": str(shared)}
                keys = {"longest_epoch": "100ms", **keys}
                primary.configure_vm(VM, qmp=str(vm.qmp), peer=backup.link, **keys)
                backup.configure_vm(VM, peer=primary.link, **keys)
                if managed:
                    for node in (primary, backup):
                        node.manager = ServiceManager(node.directory / "notify.sock")
                try:
                    await start_all(primary, backup)
                    await vm.console.wait_ready(within=BOOT)
                    await vm.wait_round(2, within=BOOT)
                    yield Stage(vm, alpha, beta, primary, backup, wire)
                except Exception as error:
                    error.add_note(f"alpha:\n{primary.log_text()}\nbeta:\n{backup.log_text()}")
                    raise
