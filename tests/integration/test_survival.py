"""Whatever is killed, frozen or cut off around it, the guest runs on, and is protected again by itself (I5).

That the guest runs is judged by QEMU's own STOP and RESUME, with QEMU's timestamps, and by the guest's
reports on its console; each report says that every page was right.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from curling_fd.capture.guarding import FROZEN
from curling_fd.errors import CurlingError
from curling_fd.service.config import DaemonConfig
from tests.integration.stage import SYNC, VM, Stage, stage
from tests.lab.cluster import Node
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm
from tests.lab.witness import (
    Witness,
    freeze_in_checkpoint,
    freeze_in_migration,
    frozen_process,
    now_us,
    qemus,
    witness,
)

pytestmark = pytest.mark.qemu

#: Seconds until a process that was woken has done some milliseconds' work, on a machine with much to do.
SLACK = 1.0

#: QEMU does not finish a checkpoint: it is given up after the stop limit, and the guest let go. 2 + 1 s.
GIVEN_UP = DaemonConfig().stop_limit + SLACK

#: The daemon dies: the guard sees its socket closed at once, cuts the migration and writes one line. 0 + 1 s.
DEATH = SLACK

#: The daemon is frozen: its guard does the same when it has not put its deadline off for that long. 1 + 1 s.
FREEZE = FROZEN + SLACK

#: Nothing happens to the capture: a checkpoint of some 10 ms, delayed by other work on the machine. 0 + 1 s.
CHECKPOINT = SLACK

#: The guest says twice that it runs, every 0.2 s: 2 x (0.2 + 1) s.
REPORTS = 2 * (0.2 + SLACK)

#: Nothing asks for a checkpoint within a test.
NEVER = "60s"

QUIET = LinuxGuest(pages=512, dirty=32, pause_us=5000, memory="128M")

#: Its checkpoints are 100 MB: much more than a socket takes while nobody reads.
BUSY = LinuxGuest(pages=25000, dirty=25000, pause_us=10000, mode="dirty", memory="192M")

#: Its migrations are larger than what a socket takes, too, and still come to an end.
LIVELY = LinuxGuest(pages=6000, dirty=6000, pause_us=20000, mode="dirty", memory="128M")


@asynccontextmanager
async def protected(qemu: Executable, guest: LinuxGuest, **keys: str) -> AsyncIterator[tuple[Stage, Witness]]:
    """The guest, protected on alpha, and somebody who watches it."""
    async with stage(LabVm(qemu=qemu, guest=guest), automatic=False, **keys) as here:
        await here.protect(1)
        async with witness(here.vm.operator) as guest_seen:
            yield here, guest_seen
            await guest_seen.running()
        assert all(report.corrupt == 0 for report in here.vm.rounds())


async def goes_on(here: Stage) -> None:
    """See the guest report twice: it runs."""
    await here.vm.console.next_round()
    await here.vm.console.next_round()


async def protected_again(here: Stage) -> None:
    """See that nobody has to ask for it."""
    await here.primary.wait_state(VM, "protected", within=SYNC)
    await here.backup.wait_state(VM, "standby", within=SYNC)


async def try_to_protect(here: Stage) -> None:
    """Ask for protection that will not come about."""
    with pytest.raises(CurlingError):
        await here.primary.call("Protect", name=VM)


async def restart(node: Node) -> None:
    """Start the daemon that was killed."""
    assert node.process is not None
    node.process.wait()
    node.start()
    await node.ready()


def pid_of(node: Node) -> int:
    assert node.process is not None
    return node.process.pid


def standby_pid(here: Stage) -> int:
    """The QEMU that waits on beta."""
    (pid,) = qemus(here.backup.runtime(VM))
    return pid


# The backup's daemon.


async def test_the_guest_outlives_a_killed_backup_daemon(unstable_qemu: Executable) -> None:
    async with protected(unstable_qemu, QUIET) as (here, guest):
        since = now_us()
        here.backup.kill()
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await goes_on(here)
        await restart(here.backup)
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


async def test_the_guest_outlives_a_frozen_backup_daemon(unstable_qemu: Executable) -> None:
    async with protected(unstable_qemu, QUIET) as (here, guest):
        since = now_us()
        with frozen_process(pid_of(here.backup)):
            await here.primary.wait_state(VM, "unprotected", "connecting")
            await goes_on(here)
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


async def test_the_guest_outlives_a_backup_daemon_that_freezes_in_a_checkpoint(
    unstable_qemu: Executable,
) -> None:
    async with protected(unstable_qemu, BUSY) as (here, guest):
        await guest.next_stop()
        since = now_us()
        with frozen_process(pid_of(here.backup)):
            await here.primary.wait_state(VM, "unprotected", "connecting")
            await goes_on(here)
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


# The network.


@pytest.mark.parametrize("side", ["alpha", "beta"])
async def test_the_guest_outlives_the_loss_of_the_network(unstable_qemu: Executable, side: str) -> None:
    async with protected(unstable_qemu, QUIET) as (here, guest):
        since = now_us()
        getattr(here, side).cut()
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await goes_on(here)
        getattr(here, side).heal()
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


async def test_the_guest_outlives_the_loss_of_the_network_in_a_checkpoint(unstable_qemu: Executable) -> None:
    async with protected(unstable_qemu, BUSY) as (here, guest):
        since = (await guest.next_stop()).start_us
        here.alpha.cut()
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await goes_on(here)
        here.alpha.heal()
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


# The primary's own daemon.


async def test_the_guest_outlives_a_primary_daemon_killed_between_checkpoints(
    unstable_qemu: Executable,
) -> None:
    async with protected(unstable_qemu, QUIET, longest_epoch=NEVER) as (here, guest):
        since = now_us()
        here.primary.kill()
        await here.backup.wait_state(VM, "suspect")
        await goes_on(here)
        assert guest.longest(since) <= DEATH
        await restart(here.primary)
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


async def test_the_guest_does_not_even_stop_for_a_primary_daemon_frozen_between_checkpoints(
    unstable_qemu: Executable,
) -> None:
    async with protected(unstable_qemu, QUIET, longest_epoch=NEVER) as (here, guest):
        with frozen_process(pid_of(here.primary)):
            await here.backup.wait_state(VM, "suspect")
            await goes_on(here)
            assert not guest.stops
        since = now_us()
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await protected_again(here)
        assert guest.longest(since) <= CHECKPOINT


async def test_the_guest_outlives_a_primary_daemon_killed_in_a_checkpoint(unstable_qemu: Executable) -> None:
    async with protected(unstable_qemu, BUSY) as (here, guest):
        assert here.primary.process is not None
        await freeze_in_checkpoint(here.primary.process, guest)
        since = now_us()
        here.primary.kill()
        await guest.running()
        assert 0 < guest.longest(since) <= DEATH
        await goes_on(here)
        await restart(here.primary)
        await protected_again(here)
        assert guest.longest(since) <= DEATH


async def test_the_guest_outlives_a_primary_daemon_frozen_in_a_checkpoint(unstable_qemu: Executable) -> None:
    async with protected(unstable_qemu, BUSY) as (here, guest):
        assert here.primary.process is not None
        stop = await freeze_in_checkpoint(here.primary.process, guest)
        await guest.running()
        assert 0 < guest.longest(stop.start_us) <= FREEZE
        await goes_on(here)
        here.primary.kill(signal.SIGCONT)
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await protected_again(here)
        assert (await here.primary.show(VM))["engine"] == "incremental"
        assert guest.longest(stop.start_us) <= FREEZE


async def test_the_guest_outlives_a_primary_daemon_frozen_at_the_end_of_a_first_pass(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=BUSY), automatic=False) as here:
        assert here.primary.process is not None
        async with witness(here.vm.operator) as guest, trio.open_nursery() as nursery:
            nursery.start_soon(try_to_protect, here)
            stop = await freeze_in_checkpoint(here.primary.process, guest)
            assert stop == guest.stops[0]
            await guest.running()
            assert 0 < guest.longest(stop.start_us) <= FREEZE
            await goes_on(here)
            here.primary.kill(signal.SIGCONT)


# The standby.


async def test_the_guest_outlives_a_killed_standby(unstable_qemu: Executable) -> None:
    async with protected(unstable_qemu, QUIET) as (here, guest):
        before, since = standby_pid(here), now_us()
        os.kill(before, signal.SIGKILL)
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await goes_on(here)
        await protected_again(here)
        assert standby_pid(here) != before
        assert guest.longest(since) <= CHECKPOINT


async def test_a_frozen_standby_does_not_keep_the_guest_from_being_protected(
    unstable_qemu: Executable,
) -> None:
    async with protected(unstable_qemu, QUIET) as (here, guest):
        since = now_us()
        with frozen_process(standby_pid(here)):
            await here.more_checkpoints()
            await goes_on(here)
        assert (await here.backup.show(VM))["state"] == "standby"
        assert guest.longest(since) <= CHECKPOINT


# Memory.


async def test_a_qemu_that_would_ask_in_an_hour_is_made_to_ask(unstable_qemu: Executable) -> None:
    """As one does whose host's clock is set back by an hour."""
    async with stage(LabVm(qemu=unstable_qemu, guest=BUSY)) as here:
        await here.protect()
        async with here.operator() as operator:
            await operator.execute("migrate-set-parameters", {"x-checkpoint-delay": 3_600_000})
        await here.more_checkpoints(20)
        assert here.happened(here.primary, "prepared") == 1


async def test_the_guest_outlives_a_checkpoint_that_is_too_large(unstable_qemu: Executable) -> None:
    guest_with_room = LinuxGuest(pages=4096, dirty=16, pause_us=5000, memory="128M")
    async with protected(unstable_qemu, guest_with_room, max_checkpoint="4MiB") as (here, guest):
        since = now_us()
        await here.vm.send("d 4096")
        shown = await here.primary.wait_state(VM, "unprotected")
        assert "more than the 4 MiB it may have" in shown["reason"]
        await goes_on(here)
        await here.vm.send("d 16")
        await protected_again(here)
        assert (await here.primary.show(VM))["engine"] == "incremental"
        assert guest.longest(since) <= GIVEN_UP


# Engines that migrate the whole VM again and again: there the guest may also wait for a page that is to be
# saved first, of which QEMU says nothing.


@pytest.mark.parametrize("engine", ["snapshot", "precopy"])
async def test_the_guest_outlives_a_primary_daemon_killed_in_a_whole_migration(
    system_qemu: Executable, engine: str
) -> None:
    async with protected(system_qemu, LIVELY, engine=engine) as (here, guest):
        assert here.primary.process is not None
        await freeze_in_migration(here.primary.process, guest)
        since = now_us()
        here.primary.kill()
        await guest.running()
        await goes_on(here)
        assert guest.longest(since) <= DEATH
        await restart(here.primary)
        await protected_again(here)


@pytest.mark.parametrize("engine", ["snapshot", "precopy"])
async def test_the_guest_outlives_a_primary_daemon_frozen_in_a_whole_migration(
    system_qemu: Executable, engine: str
) -> None:
    async with protected(system_qemu, LIVELY, engine=engine) as (here, guest):
        assert here.primary.process is not None
        await freeze_in_migration(here.primary.process, guest)
        since = now_us()
        await goes_on(here)
        await guest.running()
        assert guest.longest(since) <= FREEZE
        assert now_us() - since <= (FREEZE + REPORTS) * 1e6
        here.primary.kill(signal.SIGCONT)
        await here.primary.wait_state(VM, "unprotected", "connecting")
        await protected_again(here)
        assert (await here.primary.show(VM))["engine"] == engine
