"""What guest and operator do to a protected VM: reboots, pauses and ends. Also a QEMU that is killed."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from curling_fd.qmp.client import EventStream, QmpClient, open_qmp
from curling_fd.qmp.protocol import Event
from curling_fd.varlink.client import Client
from tests.integration.stage import ROUND, SYNC, VM, Stage, stage, wait_gone
from tests.lab.guests import BootSectorGuest, Guest, LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

LINUX = LinuxGuest(pages=512, dirty=64, memory="128M")
FAST: dict[str, Any] = {"longest_epoch": "10ms", "shortest_epoch": "10ms"}


async def until(events: EventStream, name: str) -> Event:
    """The next event of that name."""
    with trio.fail_after(60):
        async for event in events:
            if event.name == name:
                return event
    raise AssertionError(f"QEMU went away before {name}")


def queued(events: EventStream) -> Iterator[Event]:
    """Those that have come."""
    with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:
            yield events.receive_nowait()


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


async def stands_still(here: Stage, operator: QmpClient, *, state: str = "protected", looks: int = 4) -> None:
    """See that the guest stands still while checkpoints would have been due, at least ten for each look."""
    with operator.events() as events:
        rounds, committed = len(here.vm.rounds()), set()
        async with await Client.connect(str(here.primary.socket)) as client:
            watch = await client.call_more("Watch", {"name": VM, "interval_ms": 100})
            for _ in range(looks):
                shown = (await anext(watch))["vms"][0]
                assert shown["paused"]
                assert not state or shown["state"] == state
                committed.add(shown["statistics"]["committed"])
        assert await operator.status() == "paused"
        assert not [event for event in queued(events) if event.name in ("STOP", "RESUME")]
    assert max(committed) <= min(committed) + 2  # what was under way
    assert len(here.vm.rounds()) <= rounds + 1  # it was printed, and not yet read


async def a_moment(operator: QmpClient, chance: random.Random) -> None:
    """Let some part of an epoch pass."""
    for _ in range(chance.randrange(40)):
        await operator.status()


ENGINES = [
    pytest.param("unstable", "tcg", LINUX, "incremental", id="11-incremental"),
    pytest.param(
        "system", "kvm", BootSectorGuest(), "incremental", id="7.2-incremental", marks=pytest.mark.kvm
    ),
    pytest.param("system", "tcg", LINUX, "snapshot", id="7.2-snapshot"),
    pytest.param("unstable", "tcg", LINUX, "precopy", id="11-precopy"),
]


@pytest.mark.parametrize(("qemu", "accel", "guest", "engine"), ENGINES)
async def test_a_paused_guest_stays_paused_until_it_is_resumed(
    qemu: str, accel: str, guest: Guest, engine: str, request: pytest.FixtureRequest
) -> None:
    chance = random.Random(1)
    vm = LabVm(qemu=request.getfixturevalue(f"{qemu}_qemu"), accel=accel, guest=guest)
    async with stage(vm, engine=engine, **FAST) as here:
        await here.protect(3)
        async with here.operator() as operator:
            for _ in range(3):
                await a_moment(operator, chance)
                await here.primary.call("Pause", name=VM)
                await stands_still(here, operator)
                await here.primary.call("Resume", name=VM)
                await here.more_checkpoints(2)
            held = 0
            while held < 3:
                held += await _pause_by_monitor(here, operator, chance)
                await here.more_checkpoints(2)
        assert here.happened(here.primary, "committed") == 1
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


async def _pause_by_monitor(here: Stage, operator: QmpClient, chance: random.Random) -> bool:
    """Pause and resume past Curling. False if QEMU forgot it, as it does while a checkpoint is taken."""
    await a_moment(operator, chance)
    with operator.events() as events:
        before = time.time_ns() // 1000
        await operator.execute("stop")
        after = time.time_ns() // 1000
        heeded = await operator.status() == "paused"
        committed = (await here.primary.show(VM))["statistics"]["committed"]
        with trio.fail_after(60):
            while True:
                shown = await here.primary.show(VM)
                if shown["paused"]:
                    break
                if shown["statistics"]["committed"] > committed + 2:
                    told = list(queued(events))
                    lost = heeded and not _overlaps(told, before, after)
                    assert not lost, f"a pause ordered from {before} to {after} was lost: {told}"
                    return False
        # The checkpoint that was under way may have started it; Curling has then paused it again.
        await here.primary.call("Pause", name=VM)
    await stands_still(here, operator)
    await operator.execute("cont")
    return True


def _overlaps(events: list[Event], start: int, end: int) -> bool:
    """Whether `events` tell of a stop that was not over at `start`, and had begun at `end`.

    QEMU says STOP when all CPUs stand still, on a busy host milliseconds after it began to stop them: a stop
    counts from the event before it.
    """
    began = before = start
    for event in events:
        if event.name == "STOP":
            began = before
        elif event.name == "RESUME" and began <= end and start <= event.timestamp_us:
            return True
        before = event.timestamp_us
    return False


@pytest.mark.kvm
async def test_a_guest_that_was_paused_is_paused_after_a_failover() -> None:
    async with stage(LabVm(accel="kvm", guest=BootSectorGuest()), **FAST) as here:
        await here.protect()
        await here.primary.call("Pause", name=VM)
        async with here.operator() as operator:
            await stands_still(here, operator)
        here.lose_alpha()
        taken = await here.taken_over()
        assert taken["paused"]
        async with open_qmp(here.backup.runtime(VM) / "operator.sock") as operator:
            assert await operator.status() == "paused"
            await here.backup.wait_state(VM, "unprotected")  # its own protection has been tried
            assert await operator.status() == "paused"
            assert here.console.rounds() == []
            await here.backup.call("Resume", name=VM)
            assert await operator.status() == "running"
        assert not (await here.backup.show(VM))["paused"]
        await here.goes_on()


@pytest.mark.kvm
async def test_a_guest_that_was_paused_stays_so_when_protection_ends() -> None:
    async with (
        stage(LabVm(accel="kvm", guest=BootSectorGuest()), **FAST) as here,
        here.operator() as operator,
    ):
        await here.protect()
        await here.primary.call("Pause", name=VM)
        await stands_still(here, operator)
        await here.primary.call("Unprotect", name=VM)
        assert await operator.status() == "paused"
        await operator.execute("cont")
        await here.protect()
        await here.primary.call("Pause", name=VM)
        await stands_still(here, operator)
        here.backup.kill()
        await here.primary.wait_state(VM, "unprotected")
        await stands_still(here, operator, state="")
        await here.backup.stop()
        here.backup.start()
        await here.primary.call("Resume", name=VM)
        await here.primary.wait_committed(VM, 10)
        assert (await here.vm.console.next_round()).corrupt == 0


async def test_a_guest_that_was_paused_stands_still_also_when_the_daemon_is_killed(
    unstable_qemu: Executable,
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=LINUX), **FAST) as here:
        await here.protect()
        await here.primary.call("Pause", name=VM)
        async with here.operator() as operator:
            with operator.events() as events:
                here.primary.kill()
                with trio.fail_after(SYNC):
                    while (await events.receive()).name != "RESUME":
                        pass  # QEMU starts it at the end of its checkpoint loop
                    while (await events.receive()).name != "STOP":
                        pass
            assert await operator.status() == "paused"


async def test_a_guest_that_was_paused_between_snapshots_stays_so_when_the_daemon_is_killed() -> None:
    async with stage(LabVm(guest=LINUX), **FAST) as here:
        await here.protect(3)
        await here.primary.call("Pause", name=VM)
        async with here.operator() as operator:
            assert await operator.status() == "paused"
            assert here.primary.process is not None
            guards = here.alpha.pids() - {here.primary.process.pid, operator.pid}
            here.primary.kill()
            for pid in guards:
                await wait_gone(pid)
            assert await operator.status() == "paused"


@pytest.mark.kvm
async def test_a_guest_that_was_paused_is_switched_without_being_started() -> None:
    async with stage(LabVm(accel="kvm", guest=BootSectorGuest()), **FAST) as here:
        await here.protect()
        await here.primary.call("Pause", name=VM)
        async with here.operator() as operator:
            await stands_still(here, operator)
        last = here.vm.rounds()[-1]
        await here.primary.call("Switch", name=VM)
        assert (await here.taken_over())["paused"]
        assert here.vm.rounds()[-1] == last
        assert here.console.rounds() == []
        await here.backup.call("Resume", name=VM)
        await here.goes_on()
        await here.backup.wait_committed(VM, 10)  # protected by the other host now


# Ends.


async def ends_cleanly(here: Stage, before: dict[str, Any], how: str) -> None:
    """See protection end on both hosts, and nobody take the VM for lost."""
    ended = await here.primary.wait_state(VM, "ended", within=SYNC)
    assert how in ended["reason"]
    dropped = await here.backup.wait_state(VM, "idle")
    assert how in dropped["reason"]
    await here.no_standby()
    for node in (here.primary, here.backup):
        shown = await node.show(VM)
        # The primary claims the next one where the backup takes long to say that it has heard of the end.
        assert shown["generation"] - before["generation"] in ((0, 1) if node is here.primary else (0,))
        assert not any(here.happened(node, event) for event in ("won", "ordered", "handed-over", "link-lost"))


NO_SHUTDOWN = pytest.mark.parametrize("extra", [(), ("-no-shutdown",)], ids=["", "no-shutdown"])


@NO_SHUTDOWN
async def test_a_guest_that_powers_off_has_not_failed(
    unstable_qemu: Executable, extra: tuple[str, ...]
) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=LINUX, extra=extra), **FAST) as here:
        before = await here.protect()
        await here.vm.send("p")
        await ends_cleanly(here, before, "powered off")
        await has_ended(here)


async def test_a_guest_that_powers_off_behind_a_dead_cable_is_not_started_by_the_backup(
    unstable_qemu: Executable,
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=LINUX)
    # Longer than the guest takes to power off.
    async with stage(vm, daemon={"failure_timeout": "10s"}, **FAST) as here:
        await here.protect()
        here.alpha.cut()
        await here.vm.send("p")
        await here.primary.wait_state(VM, "ended", within=SYNC)
        await here.backup.wait_state(VM, "idle", within=SYNC)
        assert here.happened(here.backup, "lost")
        assert here.console.rounds() == []


@NO_SHUTDOWN
async def test_a_guest_that_panics_has_not_failed(unstable_qemu: Executable, extra: tuple[str, ...]) -> None:
    # Slowly: a QEMU that keeps its panicked guest aborts if a checkpoint begins at that very moment.
    vm = LabVm(qemu=unstable_qemu, guest=LINUX, extra=extra, devices=["pvpanic-pci"])
    async with stage(vm, longest_epoch="1s") as here:
        before = await here.protect(3)
        await here.vm.send("c")
        await ends_cleanly(here, before, "panicked")
        await has_ended(here)


async def has_ended(here: Stage) -> None:
    """See QEMU gone or, if it was told to stay, its guest stand still."""
    if "-no-shutdown" not in here.vm.extra:
        assert await here.vm.wait_exit() == 0
    else:
        async with here.operator() as operator:
            # From `shutdown` the checkpoint that was under way may have started it; then it was paused.
            assert await operator.status() in ("shutdown", "guest-panicked", "paused")


async def test_a_guest_that_powers_off_in_a_snapshot_has_not_failed() -> None:
    async with stage(LabVm(guest=LINUX), **FAST) as here:
        before = await here.protect(3)
        assert before["engine"] == "snapshot"
        await here.vm.send("p")
        await ends_cleanly(here, before, "powered off")
        await has_ended(here)


@pytest.mark.kvm
@pytest.mark.parametrize("end", ["quit", "SIGTERM", "reboot"])
async def test_a_qemu_that_is_told_to_end_has_not_failed(end: str) -> None:
    vm = LabVm(accel="kvm", guest=BootSectorGuest(), extra=["-no-reboot"])
    async with stage(vm, **FAST) as here:
        before = await here.protect()
        if end == "quit":
            async with here.operator() as operator:
                await operator.execute("quit")
        elif end == "SIGTERM":
            here.vm.kill(signal.SIGTERM)
        else:
            await here.vm.send("r")
        await ends_cleanly(here, before, {"reboot": "guest", "quit": "host-qmp-quit"}.get(end, "host-signal"))
        await has_ended(here)


KILLED = [
    pytest.param("kvm", BootSectorGuest(), "incremental", id="incremental", marks=pytest.mark.kvm),
    pytest.param("tcg", LINUX, "snapshot", id="snapshot"),
]


@pytest.mark.parametrize(("accel", "guest", "engine"), KILLED)
async def test_a_qemu_that_is_killed_alone_is_replaced_by_the_backup(
    accel: str, guest: Guest, engine: str
) -> None:
    async with stage(LabVm(accel=accel, guest=guest), engine=engine, **FAST) as here:
        before = await here.protect(5)
        here.vm.kill()
        taken = await here.taken_over()
        assert taken["generation"] > before["generation"]
        assert "QEMU died" in here.backup.log_text()
        given = await here.primary.wait_state(VM, "idle", "preparing", "filling", "standby")
        assert given["generation"] == taken["generation"]
        await here.goes_on()
        after = await here.backup.wait_committed(VM, 3, within=SYNC)  # the other way round
        assert after["role"] == "primary"
        assert (await here.primary.wait_state(VM, "standby"))["role"] == "backup"
