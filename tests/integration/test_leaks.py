"""Nothing is left behind by a thousand checkpoints, nor by moving a VM there and back fifty times."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from attrs import frozen

from tests.integration.stage import SYNC, VM, stage
from tests.lab.cluster import Node
from tests.lab.console import Console
from tests.lab.guests import BootSectorGuest, LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

CHECKPOINTS = 1000
SWITCHES = 50

QUIET = LinuxGuest(pages=256, dirty=8, pause_us=20000, memory="128M")

#: Seconds; far above the 10 s of an idle thread.
SETTLED_WITHIN = 60.0


@frozen
class Belongings:
    """What a daemon and its host have: kinds of things, and how many of each.

    Attributes:
        descriptors: by what they are; a memfd with its name, and its size in bytes.
        threads: of the daemon. While it works these come and go: an idle one ends after 10 s.
        processes: all of the host's, by name; children that nobody waited for are `NAME (dead)`.
        namespaces: that any of them is in.
        files: below the daemon's directory.
    """

    descriptors: Counter[str]
    threads: int
    processes: Counter[str]
    namespaces: frozenset[str]
    files: frozenset[str]

    def excess(self, before: Belongings, *, working: bool) -> dict[str, object]:
        """What there is more of than `before`, or other than then; but for threads, if it is `working`."""
        found = {
            "descriptors": self.descriptors - before.descriptors,
            "threads": 0 if working else max(0, self.threads - before.threads),
            "processes": self.processes - before.processes,
            "namespaces": self.namespaces - before.namespaces,
            "files": self.files - before.files,
        }
        return {name: more for name, more in found.items() if more}


def belongings(node: Node) -> Belongings:
    """Look at everything of `node`."""
    assert node.process is not None
    assert node.host is not None
    daemon = Path(f"/proc/{node.process.pid}")
    descriptors: Counter[str] = Counter()
    for fd in (daemon / "fd").iterdir():
        with suppress(FileNotFoundError):
            kind = re.sub(r":\[\d+\]$", "", os.readlink(fd))
            size = f" of {fd.stat().st_size} bytes" if kind.startswith("/memfd:") else ""
            descriptors[kind + size] += 1
    pids = node.host.pids() | _children(node.process.pid)
    return Belongings(
        descriptors,
        len(list((daemon / "task").iterdir())),
        Counter(name for name in map(_name, pids) if name),
        frozenset().union(*(_namespaces(pid) for pid in pids)),
        frozenset(str(path.relative_to(node.directory)) for path in node.directory.rglob("*")),
    )


def _children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def _name(pid: int) -> str | None:
    with suppress(OSError):
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        return f"{name} (dead)" if rest.split()[0] in "ZX" else name
    return None


def _namespaces(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/ns").iterdir():
            found.add(os.readlink(entry))
    return found


async def nothing_more_than(before: dict[str, Belongings], *nodes: Node, working: bool = False) -> None:
    """Wait until no node has anything it had not `before`."""
    excess: dict[str, object] = {}
    with trio.move_on_after(SETTLED_WITHIN):
        while True:
            excess = {
                node.name: belongings(node).excess(before[node.name], working=working) for node in nodes
            }
            if not any(excess.values()):
                return
            await trio.sleep(0.1)
    raise AssertionError(f"left behind: {excess}")


async def switch(primary: Node, backup: Node) -> None:
    """Move the VM, and wait until it is protected the other way round."""
    with trio.fail_after(SYNC):
        await primary.call("Switch", name=VM)
    await backup.wait_state(VM, "protected", within=SYNC)
    await primary.wait_state(VM, "standby", within=SYNC)


async def unprotect(primary: Node, backup: Node) -> None:
    """End protection, and wait until the backup has heard of it."""
    await primary.call("Unprotect", name=VM)
    await backup.wait_state(VM, "idle")


def both(*nodes: Node) -> dict[str, Belongings]:
    """What each of them has now."""
    return {node.name: belongings(node) for node in nodes}


async def test_a_thousand_checkpoints_leave_nothing_behind(unstable_qemu: Executable) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=QUIET)
    async with stage(vm, automatic=False, shortest_epoch="5ms", longest_epoch="5ms") as here:
        nodes = (here.primary, here.backup)
        await here.protect(1)
        await unprotect(*nodes)
        idle = both(*nodes)
        await here.protect(50)
        protected = both(*nodes)
        shown = await here.more_checkpoints(CHECKPOINTS)
        assert shown["state"] == "protected"
        await nothing_more_than(protected, *nodes, working=True)
        await unprotect(*nodes)
        await nothing_more_than(idle, *nodes)
        assert (await vm.console.next_round()).corrupt == 0


async def test_fifty_switches_leave_nothing_behind(unstable_qemu: Executable) -> None:
    async with stage(LabVm(qemu=unstable_qemu, guest=BootSectorGuest()), automatic=False) as here:
        await here.protect(1)
        ends = (here.primary, here.backup)
        for _ in range(2):
            await switch(*ends)
            ends = ends[::-1]
        before = both(*ends)
        first = (await here.primary.show(VM))["generation"]
        for _ in range(SWITCHES):
            await switch(*ends)
            ends = ends[::-1]
        assert (await here.primary.show(VM))["generation"] == first + SWITCHES
        await nothing_more_than(before, *ends)
        now = here.primary.runtime(VM)
        assert (await Console(now / "console.log", now / "console.sock").next_round()).corrupt == 0
