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

from tests.integration.stage import ROUND, Stage, stage
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.stamps import read_shares
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

SIZE = 16 << 20

WRITER = LinuxGuest(pages=256, dirty=16, pause_us=5000, memory="128M", disks=1)


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
