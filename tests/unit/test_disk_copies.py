"""All copies of a VM at once, and everything from one end to the other: QEMU's export, log, copies."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from curling_fd.disk.compare import Offer, Verdict, digest
from curling_fd.disk.copies import Copies
from curling_fd.disk.copy import DiskCopier, LogShipper, RateLimit
from curling_fd.disk.endpoint import DiskEndpoint
from curling_fd.disk.epoch import DiskLog
from curling_fd.disk.holdings import ClosedLog
from curling_fd.disk.log import TRIM, WRITE, ZERO, encode, scan
from curling_fd.disk.nbd_client import NbdClient
from curling_fd.disk.spec import CopySpec
from curling_fd.errors import CopyMissing, CopyUnfit, FrameError
from curling_fd.nbd.server import Export
from tests.unit.test_disk_epoch import Bytes
from tests.unit.test_disk_image import content, make

SIZE = 12 << 20


def specs(tmp_path: Path) -> list[CopySpec]:
    make(tmp_path / "one.raw", size=SIZE)
    make(tmp_path / "two.qcow2", size=SIZE, image_format="qcow2")
    return [
        CopySpec("one", str(tmp_path / "one.raw"), "raw", SIZE),
        CopySpec("two", str(tmp_path / "two.qcow2"), "qcow2", SIZE),
    ]


def test_a_log_goes_to_the_disks_it_is_about(tmp_path: Path) -> None:
    wanted = specs(tmp_path)
    copies = Copies.open(wanted)
    log = memoryview(
        b"head"
        + encode(WRITE, 0, 0, 512)
        + b"a" * 512
        + encode(WRITE, 1, 512, 512)
        + b"b" * 512
        + encode(ZERO, 0, 0, 256)
        + encode(TRIM, 1, 512, 256)
    )
    with pytest.raises(FrameError):
        copies.check(log, 4, len(log) - 1)
    copies.check(log, 4, len(log))
    for _ in range(2):
        copies.apply(log, 4, len(log))
    copies.sync()
    offer = Offer(1, 4096, ((0, 8192),), digest(b"?") + digest(bytes(4096)))
    assert copies.answer(offer.encode()) == bytes([Verdict.DIFFERS, Verdict.SAME])
    statistics = copies.statistics()
    assert (statistics.applied, statistics.offered, statistics.syncs) == (2 * (len(log) - 4), 8192, 1)
    copies.close()
    one, two = (content(Path(spec.path), spec.format, tmp_path) for spec in wanted)
    assert one[:512] == bytes(256) + b"a" * 256
    assert two[:1024] == bytes(768) + b"b" * 256


def test_all_copies_are_opened_or_none(tmp_path: Path) -> None:
    wanted = specs(tmp_path)
    with pytest.raises(CopyMissing):
        Copies.open([*wanted, CopySpec("three", str(tmp_path / "three"), "raw", SIZE)])
    Copies.open(wanted).close()


def test_two_disks_have_no_copy_in_common(tmp_path: Path) -> None:
    wanted = specs(tmp_path)
    for spec in wanted:
        with pytest.raises(CopyUnfit):
            Copies.open([spec, spec])


async def test_what_was_applied_is_written_out_beside(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_place(function, *arguments):  # type: ignore[no-untyped-def]
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", in_place)
    copies = Copies.open(specs(tmp_path)[:1])
    log = memoryview(encode(ZERO, 0, 0, 512))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copies.keep_synced)
        for rounds in (1, 2):
            copies.apply(log, 0, len(log))
            await trio.sleep(5)
            assert copies.statistics().syncs == rounds, "once, and not when there is nothing new"
        nursery.cancel_scope.cancel()
    copies.close()


@contextmanager
def exported(path: Path, tmp_path: Path) -> Iterator[NbdClient]:
    """The raw image as QEMU exports it, read-only: what a running QEMU does for us."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "nbd"))
        listener.listen()
        command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={path}"]
        command += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
        command += ["--export", "type=nbd,id=disk,node-name=disk,name=disk"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        client = NbdClient.connect(tmp_path / "nbd", "disk", timeout=20)
        yield client
        client.close()
    finally:
        process.terminate()
        process.wait(20)
        (tmp_path / "nbd").unlink()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_is_copied_and_followed(image_format: str, tmp_path: Path) -> None:
    """First a copy to an empty image, then a later one to the same image, each beside a guest that writes."""
    random = Random(7)
    source = make(tmp_path / "source", size=SIZE)
    disk = os.open(source, os.O_RDWR)
    for _ in range(20):
        offset = random.randrange(SIZE // 4096 - 40) * 4096
        os.pwrite(disk, random.randbytes(random.randrange(1, 40) * 4096), offset)
    copy_path = make(tmp_path / "copy", size=SIZE, image_format=image_format)
    spec = CopySpec("disk", str(copy_path), image_format, SIZE)
    log = DiskLog([SIZE], 4 << 20, 4, "basis")
    for attempt in range(2):
        with exported(source, tmp_path) as client:
            copies = await trio.to_thread.run_sync(Copies.open, [spec])
            log.start()
            shipped = 0

            async def ship(closed: ClosedLog, copies: Copies = copies) -> None:
                nonlocal shipped
                if closed.buffer is not None:
                    shipped += closed.length
                    copies.check(closed.buffer.view, 0, closed.length)
                    await trio.to_thread.run_sync(copies.apply, closed.buffer.view, 0, closed.length)
                log.release(closed)

            async def compare(payload: bytes, copies: Copies = copies) -> bytes:
                write()
                return await trio.to_thread.run_sync(copies.answer, payload)

            def write() -> None:
                offset = random.randrange(SIZE // 4096 - 4) * 4096
                data = random.randbytes(4096 * random.randrange(1, 4))
                os.pwrite(disk, data, offset)
                log.sink(0).write(offset, len(data), Bytes(data))

            shipper = LogShipper(log, ship)
            copier = DiskCopier(log, 0, client, [(0, SIZE)], shipper, RateLimit(None), compare)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(shipper.run)
                await copier.run()
                nursery.cancel_scope.cancel()
            write()
            log.open_gate()
            await ship(log.close())
            log.track()
            copies.sync()
            copies.close()
        assert content(copy_path, image_format, tmp_path) == source.read_bytes()
        if attempt:
            assert shipped < 200_000, "what the guest wrote meanwhile"
        else:
            allocated = source.stat().st_blocks * 512
            assert shipped < allocated + 200_000
            clusters = 0 if image_format == "raw" else 20 * 2 * 65536  # whole ones, at both ends of each run
            assert copy_path.stat().st_blocks * 512 < allocated + (1 << 20) + clusters, "thin stays thin"
    os.close(disk)
    log.free()


async def test_what_a_client_writes_to_the_endpoint_is_in_the_log() -> None:
    """Two disks at once, from the socket to the log and on to the copies, while epochs pass."""
    log = DiskLog([SIZE, SIZE], 1 << 20, 3, "basis")
    log.start()
    written = [bytearray(SIZE), bytearray(SIZE)]
    applied = [bytearray(SIZE), bytearray(SIZE)]

    def write(disk: int, sock: socket.socket) -> None:
        random = Random(disk)
        client = NbdClient.over(sock, "disk")
        for _ in range(60):
            offset = random.randrange(SIZE // 512 - 1024) * 512
            length = random.choice((512, 4096, 65536, 512 << 10))
            data = random.randbytes(length)
            if random.randrange(4):
                client.write(offset, memoryview(data))
            else:
                data = bytes(length)
                client.zero(offset, length)
            written[disk][offset : offset + length] = data
        client.close()

    def take() -> None:
        closed = log.close()
        if closed.buffer is not None:
            view = closed.buffer.view
            for record in scan(view, 0, closed.length, [SIZE, SIZE]):
                data = bytes(record.length)
                if record.kind == WRITE:
                    data = bytes(view[record.data : record.data + record.length])
                applied[record.disk][record.offset : record.offset + record.length] = data
        log.release(closed)

    wanted = trio.Event()
    token = trio.lowlevel.current_trio_token()
    log.wake = lambda: token.run_sync_soon(lambda: wanted.set())
    async with trio.open_nursery() as epochs:

        async def keep_taking() -> None:
            nonlocal wanted
            while True:
                await wanted.wait()
                wanted = trio.Event()
                await trio.to_thread.run_sync(take)

        epochs.start_soon(keep_taking)
        async with trio.open_nursery() as nursery:
            for disk in range(2):
                ours, theirs = socket.socketpair()
                nursery.start_soon(trio.to_thread.run_sync, write, disk, theirs)
                nursery.start_soon(trio.to_thread.run_sync, serve, ours, log, disk)
        epochs.cancel_scope.cancel()
    take()
    assert log.statistics().waited > 0, "they were faster than the epochs"
    assert applied == written
    log.track()
    log.free()


def serve(sock: socket.socket, log: DiskLog, disk: int) -> None:
    with sock:
        endpoint = DiskEndpoint(sock, Export("disk", SIZE), log.sink(disk))
        endpoint.run()
        endpoint.close()
