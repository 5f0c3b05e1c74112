"""Replicated disks: after a failover they are of the same moment as the guest's memory (I4).

The guest writes stamped blocks, and compares each with its memory before it is overwritten (guest_disk.c); an
image is looked at from outside by `read_shares`.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from curling_fd.errors import AlreadyProtected
from curling_fd.varlink.client import Client
from tests.integration.stage import ROUND, SYNC, TAKEN, TAKEOVER, VM, Stage, stage
from tests.integration.test_restart import started, stopped
from tests.lab.cluster import Node
from tests.lab.console import Console
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.stamps import read_shares
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

SIZE = 16 << 20

#: How often a host is lost after other things have happened; 200 for a proof: CURLING_KILLS=200.
TURNS = int(os.environ.get("CURLING_KILLS", "2"))
SEED = int(os.environ.get("CURLING_SEED", str(random.randrange(1 << 31))))

WRITER = LinuxGuest(pages=256, dirty=16, pause_us=5000, memory="128M", disks=1)

#: Leaves most of its disk alone for a while.
CALM = evolve(WRITER, disk_gap_us=10000)


def make_image(path: Path, form: str, size: int = SIZE) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(path), str(size)], check=True)


def drive(path: Path, form: str, number: int = 0) -> list[str]:
    """The options for a disk."""
    image = f"file={path},format={form},if=none,id=drive{number},discard=unmap"
    return ["-drive", image, "-device", f"virtio-blk-pci,drive=drive{number},id=disk{number}"]


@asynccontextmanager
async def with_disk(
    qemu: Executable, tmp_path: Path, form: str = "raw", guest: LinuxGuest = WRITER, **keys: Any
) -> AsyncIterator[tuple[Stage, Path, Path]]:
    """A VM with a disk on alpha, and a copy on beta that is to be."""
    here, there = tmp_path / "alpha.img", tmp_path / "beta.img"
    for path in (here, there):
        make_image(path, form)
    vm = LabVm(qemu=qemu, guest=guest, extra=drive(here, form))
    replace = {str(here): str(there), str(there): str(here)}
    # Comparing and copying are much work for a machine that has others.
    daemon = {"failure_timeout": "3s"}
    async with stage(vm, daemon=daemon, standby={"replace": replace}, **keys) as found:
        yield found, here, there


def plain(image: Path, form: str) -> Path:
    """The content of an image, as a file of its own."""
    raw = image.with_suffix(".plain")
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(image), str(raw)], check=True)
    return raw


def numbers(lines: list[str]) -> list[tuple[int, int]]:
    """What the guest said of its first disk: the number it had got to, and blocks found wrong."""
    found = (re.search(r"curling disk=vda writer=0 number=(\d+) bad=(\d+)", line) for line in lines)
    return [(int(match[1]), int(match[2])) for match in found if match]


async def reaches(console: Console, number: int) -> None:
    """Wait until the guest has got to that number on its first disk."""
    while True:
        start = len(console.lines())
        line = await console.wait_line("curling disk=vda writer=0 number=", start=start, within=ROUND)
        if numbers([line])[0][0] >= number:
            return


async def checks_its_disks(here: Stage, writers: int = 1) -> None:
    """The guest on beta looks at every block, and finds all as its memory says."""
    start = len(here.console.lines())
    await here.console.send("v")
    for writer in range(writers):
        checked = f"curling disk=vda writer={writer} checked="
        line = await here.console.wait_line(checked, start=start, within=ROUND)
        assert line.endswith(" bad=0"), here.console.tail()
    assert not [line for line in here.console.lines() if "curling bad disk" in line or "failed" in line]


async def powered_off(here: Stage) -> None:
    """End the VM on beta in an orderly way: a killed QEMU takes what it knows of a qcow2 image with it."""
    await here.console.send("p")
    await here.no_standby()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
async def test_a_disk_is_of_the_same_moment_as_the_memory_after_a_failover(
    unstable_qemu: Executable, tmp_path: Path, form: str
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    async with with_disk(unstable_qemu, tmp_path, form) as (here, _, there):
        await here.protect(3)
        await here.more_checkpoints(random.Random(seed).randrange(1, 20))
        here.lose_alpha()
        await here.taken_over()
        last = numbers(here.vm.console.lines())[-1][0]
        await here.goes_on()
        await checks_its_disks(here)
        await checks_its_disks(here)
        await powered_off(here)
        (share,) = read_shares(plain(there, form))
        assert not share.wrong
        assert share.number >= last


async def copies(node: Node, count: int) -> list[dict[str, Any]]:
    """What `node` said of the last of so many copies of the VM's disks."""
    found: list[dict[str, Any]] = []
    with trio.fail_after(SYNC):
        async with await Client.connect(str(node.socket)) as client:
            async for reply in await client.call_more("Events", {"since": 0}):
                if reply["event"]["event"] == "disk-copy":
                    found.append(reply["event"]["fields"])
                if len(found) == count:
                    return found
    raise AssertionError("the journal does not end")


async def came_back(node: Node) -> None:
    """Start a daemon again that was stopped or killed."""
    assert node.process is not None
    node.process.wait()
    node.start()
    await node.ready()


async def test_after_an_outage_only_what_was_written_meanwhile_is_copied(
    unstable_qemu: Executable, tmp_path: Path
) -> None:
    async with with_disk(unstable_qemu, tmp_path, guest=CALM) as (here, _, _):
        await here.protect(3)
        (whole,) = await copies(here.primary, 1)
        assert whole["looked_at_bytes"] == SIZE
        await here.backup.stop()
        await here.primary.wait_state(VM, "unprotected", within=SYNC)
        start = numbers(here.vm.console.lines())[-1][0]
        await reaches(here.vm.console, start + 50)
        await came_back(here.backup)
        await here.primary.wait_committed(VM, 3, within=SYNC)
        _, again = await copies(here.primary, 2)
        written = numbers(here.vm.console.lines())[-1][0] - start
        # One in eight is about eight blocks.
        assert again["looked_at_bytes"] <= written * 15 / 8 * 2 * 4096 < SIZE
        assert again["sent_bytes"] <= again["looked_at_bytes"] * 1.1
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()
        await checks_its_disks(here)


async def test_a_lost_host_that_comes_back_gets_its_disk_put_right(
    unstable_qemu: Executable, tmp_path: Path
) -> None:
    async with with_disk(unstable_qemu, tmp_path, guest=CALM) as (here, _, _):
        await here.protect(3)
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()
        here.alpha.heal()
        await came_back(here.primary)
        await here.backup.wait_committed(VM, 5, within=SYNC)
        (again,) = await copies(here.backup, 1)
        assert again["looked_at_bytes"] == SIZE > 2 * again["sent_bytes"]
        await checks_its_disks(here)
        here.beta.kill_all()
        await here.primary.call("Failover", name=VM, force=True)
        await here.primary.wait_state(VM, *TAKEN, within=TAKEOVER)
        console = Console(here.primary.runtime(VM) / "console.log", here.primary.runtime(VM) / "console.sock")
        await console.send("v")
        line = await console.wait_line("curling disk=vda writer=0 checked=", within=ROUND)
        assert line.endswith(" bad=0"), console.tail()


async def test_a_planned_switch_there_and_back_takes_the_disk_along(
    unstable_qemu: Executable, tmp_path: Path
) -> None:
    async with with_disk(unstable_qemu, tmp_path, automatic=False) as (here, _, _):
        await here.protect(3)
        await here.primary.call("Switch", name=VM)
        await here.backup.wait_committed(VM, 5, within=SYNC)
        await checks_its_disks(here)
        await here.backup.call("Switch", name=VM)
        await here.primary.wait_committed(VM, 5, within=SYNC)
        console = Console(here.primary.runtime(VM) / "console.log", here.primary.runtime(VM) / "console.sock")
        await console.send("v")
        line = await console.wait_line("curling disk=vda writer=0 checked=", within=ROUND)
        assert line.endswith(" bad=0"), console.tail()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
async def test_a_restart_of_either_daemon_keeps_the_disks_in_step(
    unstable_qemu: Executable, tmp_path: Path, form: str
) -> None:
    async with with_disk(unstable_qemu, tmp_path, form, managed=True) as (here, _, _):
        await here.protect(3)
        for node in (here.primary, here.backup):
            await stopped(node)
            await started(node)
            await here.more_checkpoints(5)
        # No new copy was made.
        assert here.happened(here.primary, "disk-copy") == 1
        assert here.happened(here.primary, "taken-up") == 1
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()
        await checks_its_disks(here)


#: What is done to the daemons, and to the link between them.
DISTURBANCES = ("kill backup", "stop backup", "kill primary", "cut")


async def disturb(here: Stage, what: str, chance: random.Random) -> None:
    match what:
        case "kill backup":
            here.backup.kill()
            await came_back(here.backup)
        case "stop backup":
            await here.backup.stop()
            await came_back(here.backup)
        case "kill primary":
            here.primary.kill()
            await came_back(here.primary)
        case "cut":
            here.alpha.cut()
            await trio.sleep(chance.random() * 5)  # silence counts after 3 s
            here.alpha.heal()


@pytest.mark.parametrize("turn", range(TURNS))
async def test_whatever_happened_before_the_disk_is_of_one_moment_after_a_failover(
    unstable_qemu: Executable, tmp_path: Path, turn: int
) -> None:
    """Daemons and the link break at random moments: in the first copy, in a resync, between checkpoints."""
    seed = SEED + turn
    print(f"CURLING_SEED={seed} CURLING_KILLS=1")
    chance = random.Random(seed)
    form = chance.choice(("raw", "qcow2"))
    guest = evolve(WRITER, writers=2, disk_gap_us=chance.choice((0, 3000, 20000)))
    # With the arbiter `manual` nobody takes over but on our word.
    async with with_disk(unstable_qemu, tmp_path, form, guest=guest, automatic=False) as (here, _, there):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(protect_in_the_end, here)
            for _ in range(chance.randrange(4)):
                await trio.sleep(chance.random() * 3)
                await disturb(here, chance.choice(DISTURBANCES), chance)
        await here.more_checkpoints(chance.randrange(1, 10))
        await trio.sleep(chance.random() / 4)
        here.lose_alpha()
        await here.backup.wait_state(VM, "suspect", within=SYNC)
        await here.backup.call("Failover", name=VM, force=False)
        await here.goes_on()
        await checks_its_disks(here, writers=2)
        await powered_off(here)
        shares = read_shares(plain(there, form), writers=(0, 1))
        assert [share.wrong for share in shares] == [(), ()]


async def protect_in_the_end(here: Stage) -> None:
    """Have the VM protected, however often that breaks off."""
    with trio.fail_after(SYNC):
        while True:
            try:
                await here.primary.call("Protect", name=VM)
                return
            except AlreadyProtected:
                await here.primary.wait_state(VM, "protected", within=SYNC)
                return
            except Exception:
                await trio.sleep(0.2)
