"""Replicated disks: after a failover they are of the same moment as the guest's memory (I4).

The guest writes stamped blocks, and compares each with its memory before it is overwritten (guest_disk.c); an
image is looked at from outside by `read_shares`.
"""

from __future__ import annotations

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

from curling_fd.varlink.client import Client
from tests.integration.stage import ROUND, SYNC, TAKEN, TAKEOVER, VM, Stage, stage
from tests.lab.cluster import Node
from tests.lab.console import Console
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.stamps import read_shares
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

SIZE = 16 << 20

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
    async with stage(vm, standby={"replace": replace}, **keys) as found:
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


async def checks_its_disks(here: Stage) -> None:
    """The guest on beta looks at every block, and finds all as its memory says."""
    start = len(here.console.lines())
    await here.console.send("v")
    line = await here.console.wait_line("curling disk=vda writer=0 checked=", start=start, within=ROUND)
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
