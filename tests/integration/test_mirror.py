"""QEMU mirrors a disk to our endpoint: what it sends, when, and what it does when we go away."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, field

from curling_fd.disk.endpoint import DiskEndpoint, Ending
from curling_fd.disk.intake import Payload
from curling_fd.errors import NbdError
from curling_fd.nbd.server import Export
from curling_fd.qmp.client import EventStream, QmpClient, open_qmp
from tests.lab.guests import BootSectorGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

SIZE = 8 << 20
#: Seconds; far above what is needed, for what it bounds waits for an answer.
PATIENCE = 60.0


@define
class Copy:
    """A sink that keeps a copy of the disk."""

    content: bytearray = field(factory=lambda: bytearray(SIZE))
    calls: list[tuple[str, int, int]] = field(factory=list)
    entered: trio.Event | None = None
    let_go: trio.Event = field(factory=trio.Event)

    def write(self, offset: int, length: int, payload: Payload) -> None:
        self._wait()
        payload.read_into(memoryview(self.content)[offset : offset + length])
        self.calls.append(("write", offset, length))

    def zero(self, offset: int, length: int) -> None:
        self._wait()
        self.content[offset : offset + length] = bytes(length)
        self.calls.append(("zero", offset, length))

    def trim(self, offset: int, length: int) -> None:
        self._wait()
        self.content[offset : offset + length] = bytes(length)
        self.calls.append(("trim", offset, length))

    def hold(self) -> trio.Event:
        """Make the next change wait for `let_go`, after it has set what this returns."""
        self.entered = trio.Event()
        return self.entered

    def _wait(self) -> None:
        if self.entered is not None:
            trio.from_thread.run_sync(self.entered.set)
            self.entered = None
            trio.from_thread.run(self.let_go.wait)


@define
class Mirror:
    """A QEMU with a disk that is mirrored to `endpoint`."""

    vm: LabVm
    qmp: QmpClient
    image: Path
    copy: Copy
    endpoint: DiskEndpoint
    events: EventStream
    ending: Ending | NbdError | None = None
    ended: trio.Event = field(factory=trio.Event)

    async def io(self, command: str) -> str:
        """What a device would do, as a command of qemu-io; what QEMU printed about it."""
        before = len(self.vm.stderr())
        line = f'qemu-io disk0 "{command}"'
        await self.qmp.execute("human-monitor-command", {"command-line": line}, timeout=PATIENCE)
        return self.vm.stderr()[before:]

    async def jobs(self) -> list[dict[str, Any]]:
        return list(await self.qmp.execute("query-block-jobs"))

    async def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of that name."""
        with trio.fail_after(PATIENCE):
            while True:
                event = await self.events.receive()
                if event.name == name:
                    return dict(event.data)


@asynccontextmanager
async def mirrored(qemu: Executable, folder: Path) -> AsyncIterator[Mirror]:
    """A stopped VM whose disk is mirrored to a `Copy` since it was empty."""
    image = folder / "disk.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
    drive = f"if=none,id=disk0,format=raw,file={image},discard=unmap"
    device = ("-device", "virtio-blk-pci,drive=disk0")
    vm = LabVm(BootSectorGuest(), qemu=qemu, extra=("-S", "-drive", drive, *device))
    ours, theirs = socket.socketpair()
    async with vm, open_qmp(vm.qmp) as qmp, trio.open_nursery() as nursery:
        with theirs, qmp.events() as events, trio.fail_after(5 * PATIENCE):
            copy = Copy()
            endpoint = DiskEndpoint(ours, Export("disk0", SIZE), copy)
            mirror = Mirror(vm, qmp, image, copy, endpoint, events)

            async def serve() -> None:
                try:
                    mirror.ending = await endpoint.serve()
                except NbdError as error:
                    mirror.ending = error
                finally:
                    endpoint.close()
                    ours.close()
                mirror.ended.set()

            nursery.start_soon(serve)
            # The socket itself is handed over: nobody else can connect, and no path needs rights.
            await qmp.hand_over("mirror0", theirs.fileno())
            theirs.close()
            server = {"type": "fd", "str": "mirror0"}
            node = {"driver": "nbd", "node-name": "copy0", "server": server, "export": "disk0"}
            node["discard"] = "unmap"
            await qmp.execute("blockdev-add", node)
            job = {"job-id": "mirror0", "device": "disk0", "target": "copy0"}
            job |= {"sync": "none", "copy-mode": "write-blocking"}
            await qmp.execute("blockdev-mirror", job)
            assert (await mirror.event("BLOCK_JOB_READY"))["device"] == "mirror0"
            yield mirror
            nursery.cancel_scope.cancel()


@pytest.fixture(params=["system", "trixie", "unstable"])
def qemu(request: pytest.FixtureRequest) -> Executable:
    """Each of the three."""
    found: Executable = request.getfixturevalue(f"{request.param}_qemu")
    return found


async def test_what_is_written_is_mirrored_and_nothing_is_read(qemu: Executable, tmp_path: Path) -> None:
    async with mirrored(qemu, tmp_path) as mirror:
        assert "wrote" in await mirror.io("write -P 0xab 4096 8192")
        assert "wrote" in await mirror.io("write -P 0xcd 1536 512")
        assert "wrote" in await mirror.io("write -f -P 0xef 1M 1M")
        assert "wrote" in await mirror.io("write -z 1M 64k")
        assert "wrote" in await mirror.io("write -z -u 1280k 64k")
        assert "failed" not in await mirror.io("flush")
        assert bytes(mirror.copy.content) == mirror.image.read_bytes()
        assert mirror.copy.content[1536:2048] == b"\xcd" * 512
        (job,) = await mirror.jobs()
        assert (job["ready"], job["status"], job["io-status"]) == (True, "ready", "ok")
        requests = mirror.endpoint.statistics().requests
        assert requests.keys() == {"WRITE", "WRITE_ZEROES", "FLUSH"}


async def test_a_discard_changes_neither_the_disk_nor_its_copy(qemu: Executable, tmp_path: Path) -> None:
    """QEMU's mirror drops them. Should it pass them on one day, both must change, and this test."""
    async with mirrored(qemu, tmp_path) as mirror:
        await mirror.io("write -P 5 0 1M")
        assert "discard" in await mirror.io("discard 0 1M")
        assert "wrote" in await mirror.io("write -P 6 1M 4k")
        assert mirror.image.read_bytes()[: 1 << 20] == mirror.copy.content[: 1 << 20] == b"\5" * (1 << 20)
        (job,) = await mirror.jobs()
        assert (job["ready"], job["io-status"]) == (True, "ok")


async def test_a_write_reaches_the_endpoint_before_it_completes(qemu: Executable, tmp_path: Path) -> None:
    async with mirrored(qemu, tmp_path) as mirror, trio.open_nursery() as nursery:
        answers: list[str] = []

        async def write() -> None:
            answers.append(await mirror.io("write -P 0x77 0 4096"))

        entered = mirror.copy.hold()
        nursery.start_soon(write)
        await entered.wait()
        # It is in the source, and not acknowledged: QEMU could answer no command in the midst of this one.
        assert mirror.image.read_bytes()[:4096] == b"\x77" * 4096
        assert not answers
        mirror.copy.let_go.set()
    assert "wrote 4096" in answers[0]


async def test_the_disk_goes_on_without_us(qemu: Executable, tmp_path: Path) -> None:
    async with mirrored(qemu, tmp_path) as mirror:
        await mirror.io("write -P 1 0 4096")
        mirror.endpoint.abort()
        await mirror.ended.wait()
        assert mirror.ending == Ending.LEFT
        assert "wrote 4096" in await mirror.io("write -P 2 0 4096")
        assert (await mirror.event("BLOCK_JOB_ERROR"))["operation"] == "write"
        assert "error" in await mirror.event("BLOCK_JOB_COMPLETED")
        assert await mirror.jobs() == []
        assert "wrote 4096" in await mirror.io("write -P 3 4096 4096")
        assert mirror.image.read_bytes()[:8192] == b"\2" * 4096 + b"\3" * 4096
        await mirror.qmp.execute("blockdev-del", {"node-name": "copy0"})
        assert mirror.copy.content[:4096] == b"\1" * 4096


async def test_a_job_that_is_cancelled_says_goodbye(qemu: Executable, tmp_path: Path) -> None:
    async with mirrored(qemu, tmp_path) as mirror:
        await mirror.io("write -P 1 0 4096")
        await mirror.qmp.execute("block-job-cancel", {"device": "mirror0", "force": True})
        await mirror.event("BLOCK_JOB_CANCELLED")
        await mirror.qmp.execute("blockdev-del", {"node-name": "copy0"})
        with trio.fail_after(PATIENCE):
            await mirror.ended.wait()
        assert mirror.ending == Ending.LEFT
