"""The endpoint with clients that others wrote, and our client with servers that others wrote."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import define, field

from curling_fd.disk.endpoint import DiskEndpoint, DiskReader, Ending, EndpointStatistics
from curling_fd.disk.intake import Payload
from curling_fd.disk.nbd_client import Change, NbdClient
from curling_fd.errors import NbdError, NbdRequestFailed
from curling_fd.nbd.protocol import BlockSizes, Extent
from curling_fd.nbd.server import Export
from tests.lab.roots import qemu_tool

pytestmark = pytest.mark.qemu

#: Not a multiple of anything but 512, as disks of real life.
SIZE = (16 << 20) + 512
SUITES = ("system", "trixie", "unstable")

#: Seconds; far above what is needed, for what it bounds waits for an answer.
PATIENCE = 120


@define
class Served:
    """A disk in memory, served at `path` to one client after the other."""

    path: Path
    blocks: BlockSizes
    content: bytearray = field(factory=lambda: bytearray(SIZE))
    endings: list[Ending | NbdError] = field(factory=list)
    statistics: list[EndpointStatistics] = field(factory=list)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.path}"

    def write(self, offset: int, length: int, payload: Payload) -> None:
        payload.read_into(memoryview(self.content)[offset : offset + length])

    def zero(self, offset: int, length: int) -> None:
        self.content[offset : offset + length] = bytes(length)

    trim = zero

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self.content)[offset : offset + length]

    def status(self, offset: int, length: int) -> list[Extent]:
        """Blocks of 64 KiB, and no more of them than a client makes use of."""
        found: list[Extent] = []
        while length and len(found) < 4:
            size = min((1 << 16) - offset % (1 << 16), length)
            empty = self.content.count(0, offset, offset + size) == size
            found.append(Extent(size, hole=empty, zero=empty))
            offset, length = offset + size, length - size
        return found

    def serve(self, listener: socket.socket, stop: int) -> None:
        """Until `stop` can be read."""
        while True:
            readable, _, _ = select.select([listener.fileno(), stop], [], [])
            if stop in readable:
                return
            sock, _ = listener.accept()
            with sock:
                export = Export("disk", SIZE, self.blocks)
                endpoint = DiskEndpoint(sock, export, self, reader=DiskReader(self.read, self.status))
                try:
                    self.endings.append(endpoint.run())
                except NbdError as error:
                    self.endings.append(error)
                self.statistics.append(endpoint.statistics())
                endpoint.close()


@contextmanager
def serving(folder: Path, blocks: BlockSizes | None = None) -> Iterator[Served]:
    """A disk that clients can be pointed at; all of them must have left in peace at the end."""
    served = Served(folder / "disk.sock", blocks or BlockSizes())
    stop = os.eventfd(0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(served.path))
        listener.listen()
        thread = threading.Thread(target=served.serve, args=(listener, stop))
        thread.start()
        try:
            yield served
        finally:
            os.eventfd_write(stop, 1)
            thread.join()
            os.close(stop)
    assert set(served.endings) == {Ending.LEFT}


def run(*command: str) -> str:
    """Run a client; its output. It must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def image(folder: Path) -> Path:
    """A raw image with data, holes and an odd end."""
    path = folder / "image.raw"
    content = random.Random(5)
    with path.open("wb") as file:
        for at in (0, 1 << 20, (5 << 20) + 512, SIZE - 5000):
            file.seek(at)
            file.write(content.randbytes(5000))
    assert path.stat().st_size == SIZE
    return path


@pytest.mark.parametrize("suite", SUITES)
def test_qemu_io_reads_what_it_wrote(suite: str, tmp_path: Path) -> None:
    commands = [
        "write -P 1 0 64k",
        "write -P 2 1000 24",
        "write -f -P 3 8M 1M",
        "write -z 8M 4k",
        "write -z -u 8256k 64k",
        "discard 8448k 64k",
        *(f"aio_write -P {index + 10} {12 << 20 | index << 12} 4k" for index in range(64)),
        "aio_flush",
        "flush",
        "read -P 1 0 1000",
        "read -P 2 1000 24",
        "read -P 0 8M 4k",
        f"read -P 73 {12 << 20 | 63 << 12} 4k",
        f"write -P 9 {SIZE - 512} 512",
    ]
    with serving(tmp_path) as served:
        arguments = [argument for command in commands for argument in ("-c", command)]
        output = run(qemu_tool("qemu-io", suite), "-d", "unmap", "-f", "raw", *arguments, served.uri)
    assert "failed" not in output.lower()
    assert served.content[1000:1024] == b"\2" * 24
    assert served.content[-512:] == b"\x09" * 512
    assert served.content[8 << 20 : (8 << 20) + 4096] == bytes(4096)
    requests = served.statistics[-1].requests
    assert requests.keys() >= {"READ", "WRITE", "FLUSH", "TRIM", "WRITE_ZEROES"}


@pytest.mark.parametrize("suite", SUITES)
def test_qemu_img_copies_there_and_back_and_compares(suite: str, tmp_path: Path) -> None:
    source = image(tmp_path)
    tool = qemu_tool("qemu-img", suite)
    with serving(tmp_path) as served:
        run(tool, "convert", "-n", "-f", "raw", "-O", "raw", str(source), served.uri)
        assert bytes(served.content) == source.read_bytes()
        assert "identical" in run(tool, "compare", "-f", "raw", "-F", "raw", str(source), served.uri)
        extents = json.loads(run(tool, "map", "--output=json", "-f", "raw", served.uri))
        assert sum(extent["length"] for extent in extents if extent["data"]) < 1 << 20
        run(tool, "convert", "-f", "raw", "-O", "qcow2", served.uri, str(tmp_path / "back.qcow2"))
        run(tool, "compare", "-f", "raw", "-F", "qcow2", served.uri, str(tmp_path / "back.qcow2"))
        run(tool, "bench", "-w", "-f", "raw", "-c", "500", "-d", "32", "-s", "4096", served.uri)
    assert served.statistics[-1].requests["WRITE"] == 500


def test_libnbd_understands_what_is_offered(tmp_path: Path) -> None:
    with serving(tmp_path, BlockSizes(512, 4096, 1 << 20)) as served:
        told = json.loads(run("nbdinfo", "--json", served.uri))
        assert (told["TLS"], told["structured"]) == (False, True)
        (export,) = told["exports"]
        assert export["contexts"] == ["base:allocation"]
        for name, value in {
            "export-size": SIZE,
            "can_flush": True,
            "can_fua": True,
            "can_trim": True,
            "can_zero": True,
            "can_df": True,
            "can_fast_zero": False,
            "can_multi_conn": False,
            "is_read_only": False,
            "block_size_minimum": 512,
            "block_size_preferred": 4096,
            "block_size_maximum": 1 << 20,
        }.items():
            assert export[name] == value, name
        listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={served.path}"))
        assert [export["export-name"] for export in listed["exports"]] == ["disk"]
        served.content[1 << 20] = 1
        extents = json.loads(run("nbdinfo", "--json", "--map", served.uri))
        assert [extent["offset"] for extent in extents if extent["type"] == 0] == [1 << 20]


def test_nbdcopy_copies_there_and_back(tmp_path: Path) -> None:
    source, back = image(tmp_path), tmp_path / "back.raw"
    with serving(tmp_path) as served:
        run("nbdcopy", "--flush", str(source), served.uri)
        assert bytes(served.content) == source.read_bytes()
        run("nbdcopy", served.uri, str(back))
    assert back.read_bytes() == source.read_bytes()
    assert max(statistics.requests.get("WRITE", 0) for statistics in served.statistics) > 0


@contextmanager
def server(folder: Path, *command: str) -> Iterator[Path]:
    """A server of others, whose command names server.sock in `folder`."""
    path = folder / "server.sock"
    with subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *command]) as process:
        try:
            # Neither of QEMU's two servers says in all versions when it is ready: ask until it answers.
            while not answers(path):
                assert process.poll() is None, "the server has ended"
                time.sleep(0.005)
            yield path
        finally:
            process.kill()


def answers(path: Path) -> bool:
    """Whether a server is there."""
    try:
        NbdClient.connect(path, "disk", timeout=PATIENCE).close()
    except NbdError:
        return False
    return True


def make(folder: Path, format: str) -> Path:
    disk = folder / f"disk.{format}"
    run(qemu_tool("qemu-img"), "create", "-q", "-f", format, str(disk), str(SIZE))
    return disk


def qemu_nbd(folder: Path, format: str, suite: str) -> tuple[str, ...]:
    tool = (qemu_tool("qemu-nbd", suite), "--persistent", "--discard=unmap", "--shared=2", "-x", "disk")
    return (*tool, "-f", format, "-k", str(folder / "server.sock"), str(make(folder, format)))


def storage_daemon(folder: Path, format: str) -> tuple[str, ...]:
    file = {"driver": "file", "filename": str(make(folder, format)), "discard": "unmap"}
    node = {"driver": format, "node-name": "disk", "discard": "unmap", "file": file}
    export = "type=nbd,id=export0,node-name=disk,name=disk,writable=on"
    address = f"addr.type=unix,addr.path={folder}/server.sock"
    daemon = ("qemu-storage-daemon", "--blockdev", json.dumps(node), "--nbd-server", address)
    return (*daemon, "--export", export)


@pytest.fixture(params=["system", "trixie", "unstable", "storage-daemon"])
def program(request: pytest.FixtureRequest) -> str:
    """Whose server."""
    return str(request.param)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_our_client_with_qemus_servers(program: str, format: str, tmp_path: Path) -> None:
    daemon = program == "storage-daemon"
    command = storage_daemon(tmp_path, format) if daemon else qemu_nbd(tmp_path, format, program)
    with server(tmp_path, *command) as path:
        with NbdClient.connect(path, "disk", timeout=PATIENCE) as client:
            exercise(client)
        with pytest.raises(NbdError, match="tape"):
            NbdClient.connect(path, "tape", timeout=PATIENCE)


def exercise(client: NbdClient) -> None:
    """Change an empty disk, and read what became of it."""
    assert client.size == SIZE
    # The first block of a raw image may be there: qemu-img writes it.
    assert client.status(4096, SIZE - 4096) == [Extent(SIZE - 4096, hole=True, zero=True)]
    expected = bytearray(SIZE)
    content = random.Random(7).randbytes(5 << 20)
    changes = [Change.write((1 << 20) + 512, memoryview(content))]
    expected[(1 << 20) + 512 : (1 << 20) + 512 + len(content)] = content
    chance = random.Random(8)
    for _ in range(200):
        offset, length = chance.randrange(6 << 20), chance.choice((512, 4096, 70_000))
        if chance.random() < 0.2:
            changes.append(Change.zero(offset, length, thin=chance.random() < 0.5))
            expected[offset : offset + length] = bytes(length)
        else:
            start = chance.randrange(len(content) - length)
            changes.append(Change.write(offset, memoryview(content)[start : start + length]))
            expected[offset : offset + length] = content[start : start + length]
    client.change(changes)
    client.flush()
    back = bytearray(SIZE)
    client.read_into(memoryview(back), 0)
    assert back == expected
    client.zero(0, SIZE)
    assert all(extent.zero for extent in client.status(0, SIZE))
    client.trim(0, 1 << 20)
    with pytest.raises(NbdRequestFailed) as failure:
        client.read_into(memoryview(bytearray(1024)), SIZE - 512)
    assert failure.value.command == "READ"


def test_a_server_that_dies_is_an_error(tmp_path: Path) -> None:
    with server(tmp_path, *qemu_nbd(tmp_path, "raw", "system")) as path:
        client = NbdClient.connect(path, "disk", timeout=PATIENCE)
    with client, pytest.raises(NbdError):
        client.read_into(memoryview(bytearray(512)), 0)
    with pytest.raises(NbdError, match="no server"):
        NbdClient.connect(path, "disk", timeout=PATIENCE)
