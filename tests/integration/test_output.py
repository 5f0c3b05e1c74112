"""Output commit (I2) on real QEMU: no packet of an epoch that is not committed is ever seen on the wire."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.integration.stage import VM, Stage, stage
from tests.lab.connections import COUNTER, SINK, STREAM, Progress, connected, download, increment, upload
from tests.lab.debs import run
from tests.lab.front import CARD, CLIENT_ADDRESS, GUEST_ADDRESS, TAP, Front
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

SERVER = LinuxGuest(pages=64, dirty=8, pause_us=20000, memory="128M", ip=f"{GUEST_ADDRESS}/24", serve=1)

#: Numbers of eight bytes, in one connection.
BULK = 4_000_000

#: How often a host is killed at a random moment, 200 for a proof; and what the moments are drawn from.
KILLS = int(os.environ.get("CURLING_KILLS", "5"))
SEED = int(os.environ.get("CURLING_SEED", "1"))


@asynccontextmanager
async def talking(qemu: Executable, **keys: Any) -> AsyncIterator[tuple[Stage, Front]]:
    """A guest on alpha that sends numbers, and a client that sees them; not protected yet."""
    async with stage(LabVm(qemu=qemu, guest=TALKER, extra=CARD), with_front=True, **keys) as here:
        assert here.front is not None
        async with trio.open_nursery() as nursery:
            await nursery.start(here.front.watch, ["alpha", "beta"])
            await here.front.more("alpha", 10)
            yield here, here.front
            nursery.cancel_scope.cancel()


async def test_without_a_fault_every_packet_leaves_once_and_in_order(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        await here.protect(20)
        assert (await here.primary.show(VM))["output"] == "filter"
        await wire.more("alpha", MANY)
        await here.primary.call("Unprotect", name=VM)
        await wire.more("alpha", 10)
        in_order(wire, "alpha")


async def test_a_planned_switch_loses_no_packet_and_sends_none_twice(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        first = wire.seen[0].number
        await here.protect(20)
        with trio.fail_after(60):
            await here.primary.call("Switch", name=VM)
        await wire.more("beta", MANY)
        # What alpha's card still had it lets go of once beta has the VM, however late that is seen here.
        due = list(range(first, wire.numbers("beta")[0]))
        with trio.move_on_after(10):
            await wire.more("alpha", len(due) - len(wire.numbers("alpha")))
        assert wire.numbers("alpha") == due
        numbers = wire.numbers("beta")
        assert numbers == list(range(due[-1] + 1, due[-1] + 1 + len(numbers)))


async def test_what_the_lost_host_sent_is_what_the_guest_remembers(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        await here.protect(20)
        await wire.more("alpha", MANY)
        here.lose_alpha()
        await wire.more("beta", MANY)
        assert max(wire.numbers("alpha")) < min(wire.numbers("beta"))
        await here.goes_on()


async def test_packets_stay_held_while_no_daemon_is_there_and_none_is_lost(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu) as (here, wire):
        await here.protect(20)
        primary = here.primary
        assert primary.process is not None
        primary.kill()
        await trio.to_thread.run_sync(primary.process.wait)
        with trio.move_on_after(1):  # the guard lets the guest go on, but nothing leaves
            await here.vm.wait_round(here.vm.rounds()[-1].number + 20)
        silent = wire.numbers("alpha")
        await here.vm.wait_round(here.vm.rounds()[-1].number + 20)
        assert wire.numbers("alpha") == silent
        primary.start()
        await primary.ready()
        await primary.wait_state(VM, "protected", within=60)
        await wire.more("alpha", MANY)
        in_order(wire, "alpha")


async def test_a_restart_of_the_daemon_neither_loses_nor_leaks(unstable_qemu: Executable) -> None:
    async with talking(unstable_qemu, managed=True) as (here, wire):
        await here.protect(20)
        assert here.primary.manager is not None
        await here.primary.stop()
        here.primary.start()
        await here.primary.ready()
        await here.more_checkpoints(20)
        assert here.happened(here.primary, "taken-up") == 1
        await wire.more("alpha", MANY)
        in_order(wire, "alpha")


async def test_a_frozen_primary_that_lost_its_vm_lets_nothing_out_when_it_wakes(
    unstable_qemu: Executable,
) -> None:
    async with talking(unstable_qemu) as (here, wire):
        await here.protect(20)
        await wire.more("alpha", MANY)
        here.alpha.cut()
        here.primary.kill(signal.SIGSTOP)
        await here.taken_over()
        await wire.more("beta", MANY)
        here.primary.kill(signal.SIGCONT)
        await here.primary.wait_state(VM, "fenced", "idle", within=60)
        await wire.more("beta", MANY)
        assert max(wire.numbers("alpha")) < min(wire.numbers("beta"))


async def test_whenever_a_host_is_killed_nothing_of_an_uncommitted_epoch_was_on_the_wire(
    unstable_qemu: Executable,
) -> None:
    chance = random.Random(SEED)
    async with talking(unstable_qemu) as (here, wire):
        await here.protect(1)
        ends = [(here.alpha, here.primary), (here.beta, here.backup)]
        for kill in range(1, KILLS + 1):
            (host, node), (other, successor) = ends
            packets, alone = chance.randint(1, 400), chance.uniform(0, 0.05)
            wire.seen.clear()
            await wire.more(host.name, packets)
            host.cut()
            # What is sent from here on is of no epoch that the other host has.
            await trio.sleep(alone)
            host.kill_all()
            wire.cut(host)
            await successor.wait_state(VM, "active", "connecting", "unprotected", within=60)
            # All that was on the wire has been read when what came long after it has been.
            await wire.more(other.name, 50)
            last, first = max(wire.numbers(host.name)), min(wire.numbers(other.name))
            assert last < first, f"kill {kill} of seed {SEED}, after {packets} packets and {alone:.4f} s"
            wire.heal(host)
            host.heal()
            assert node.process is not None
            node.process.wait()
            node.start()
            await node.ready()
            await successor.wait_state(VM, "protected", within=60)
            in_order(wire, other.name)
            ends.reverse()
        print(f"{KILLS} hosts killed, seed {SEED}: nothing of an uncommitted epoch was on the wire")


async def test_the_network_is_told_where_a_silent_guest_is_and_its_tap_is_made(
    unstable_qemu: Executable,
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=SERVER, extra=CARD)
    async with stage(vm, with_front=True) as here:
        assert here.front is not None
        client = here.front.client
        with here.beta.entered():
            run(["ip", "link", "delete", TAP])
        await here.protect(5)
        async with connected(client, GUEST_ADDRESS, COUNTER) as counter:
            assert await increment(counter, Progress()) == 1
            await here.front.leads_to("alpha")
            await told(here, GUEST_ADDRESS)
            here.lose_alpha()
            await here.taken_over()
            await here.front.leads_to("beta")
            assert await increment(counter, Progress()) == 2
        with here.beta.entered():
            assert f"curling: {VM}" in run(["ip", "-d", "link", "show", TAP])


async def test_a_tap_made_for_the_standby_outlives_a_restart_of_the_daemon(unstable_qemu: Executable) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=SERVER, extra=CARD)
    async with stage(vm, with_front=True, managed=True) as here:
        assert here.front is not None
        with here.beta.entered():
            run(["ip", "link", "delete", TAP])
        await here.protect(5)
        async with connected(here.front.client, GUEST_ADDRESS, COUNTER) as counter:
            assert await increment(counter, Progress()) == 1
            await here.backup.stop()
            here.backup.start()
            await here.backup.ready()
            await here.more_checkpoints(20)
            assert here.happened(here.backup, "taken-up") == 1
            here.lose_alpha()
            await here.taken_over()
            assert await increment(counter, Progress()) == 2


async def test_connections_of_clients_survive_the_host(unstable_qemu: Executable) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=SERVER, extra=CARD)
    async with stage(vm, with_front=True) as here:
        assert here.front is not None
        client = here.front.client
        await here.protect(5)
        made = {name: Progress() for name in ("download", "upload", "counter")}
        with trio.fail_after(180):
            async with (
                connected(client, GUEST_ADDRESS, COUNTER) as counter,
                connected(client, GUEST_ADDRESS, STREAM) as stream,
                connected(client, GUEST_ADDRESS, SINK) as sink,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(download, stream, BULK, made["download"])
                nursery.start_soon(upload, sink, BULK, made["upload"])
                after, number = 50, 0
                while after:
                    number += 1
                    assert await increment(counter, made["counter"]) == number, (
                        "none lost, none counted twice"
                    )
                    if here.vm.running():
                        if (
                            number > 20
                            and min(made[name].steps for name in ("download", "upload")) > BULK // 8
                        ):
                            here.lose_alpha()
                    else:
                        after -= 1
        assert min(each.longest for each in made.values()) > 0.5, "each was under way when the host was lost"
        assert (await here.backup.show(VM))["generation"] == 2
        await here.goes_on()


async def told(here: Stage, address: str) -> None:
    """Wait until the backup knows an address of the guest's."""
    kept = here.backup.directory / "run" / f"{VM}.network.json"
    with trio.fail_after(60):
        while True:
            if address in kept.read_text():
                return
            await trio.sleep(0.02)


def in_order(wire: Front, host: str) -> None:
    """Everything from `host` came once and in order."""
    numbers = wire.numbers(host)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
