"""What one daemon leaves to the next: it comes out of the store as it went in, or not at all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.capture.engine import EngineLeft
from curling_fd.capture.probe import Choice
from curling_fd.capture.settings import Before
from curling_fd.disk.holdings import DiskLogLeft
from curling_fd.disk.inventory import Disk
from curling_fd.nbd.server import Session
from curling_fd.qmp.client import MonitorLeft
from curling_fd.qmp.protocol import Event, Greeting
from curling_fd.replica.image import Replica, ReplicaLeft
from curling_fd.service import restart
from curling_fd.service.copies import CopiesLeft
from curling_fd.service.mirror import MirrorLeft
from curling_fd.service.restart import BackupLeft, Estate, PrimaryLeft, estates, leave
from curling_fd.service.statistics import Totals
from curling_fd.system import systemd
from curling_fd.system.buffers import Buffer
from curling_fd.system.guard import Guard, GuardFailed
from curling_fd.system.process import UNKNOWN, Inherited
from curling_fd.system.systemd import ServiceManager
from curling_fd.vmstate.records import Block, Configuration, RamLayout
from tests.lab.manager import ServiceManager as StoringManager

BLOCK = Block("pc.ram", 1 << 20)
LAYOUT = RamLayout((BLOCK, Block("/rom@etc/acpi/tables", 131072)), section_id=2)
CHOICE = Choice("incremental", "KVM", "kvm", (11, 1, 3), True)
TOTALS = Totals(7, 6, 1 << 40, 12.5, None, 9.25)
DISKS = (Disk("data0", 1 << 20, "raw", "/srv/disk.img", "#block123"),)
PRIMARY = PrimaryLeft(
    generation=3,
    sequence=6,
    choice=CHOICE,
    ram_bytes=1 << 30,
    paused=False,
    peer_rests=True,
    monitor=MonitorLeft(Greeting((11, 1, 3), "Debian", frozenset({"oob"})), 4711, 12, b'{"ev\xff'),
    events=(Event("STOP", {"reason": {"a": [1, None]}}, 1_700_000_000_000_000),),
    engine=EngineLeft(
        LAYOUT, "pc.ram", Before({"x-colo": False}, {"max-bandwidth": 134217728}), True, (BLOCK,)
    ),
    totals=TOTALS,
    mirror=MirrorLeft(
        DISKS,
        4711,
        DiskLogLeft((1 << 20,), "ab12", 1 << 26, 3, True, 4096),
        (Session("curling-disk0", True),),
    ),
)
BACKUP = BackupLeft(
    generation=3,
    choice=CHOICE,
    ram_bytes=1 << 30,
    paused=True,
    peer_rests=False,
    silent=True,
    max_raw=1 << 28,
    directory="/run/curling/db1",
    mapped=(BLOCK,),
    replica=ReplicaLeft(6, Configuration(b"\x07\x00\xff", "pc-q35"), LAYOUT, None, LAYOUT.blocks[1:]),
    totals=TOTALS,
    copies=CopiesLeft(DISKS, ("/srv/copy.img",), "ab12", 3, 6),
)


class Store:
    """A service manager, and daemons that follow one another under it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manager = StoringManager(path)
        self._monkeypatch = monkeypatch
        self.restart()

    def restart(self) -> None:
        """From here on this process is the next daemon."""
        names = list(self.manager.store)
        for index, name in enumerate(names):
            os.dup2(self.manager.store[name], 400 + index)
        environ = {
            "NOTIFY_SOCKET": str(self.manager.path),
            "LISTEN_FDS": str(len(names)),
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDNAMES": ":".join(names),
        }
        service = ServiceManager(environ, first_fd=400)
        self._monkeypatch.setattr(systemd, "manager", lambda: service)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    kept = Store(tmp_path / "notify", monkeypatch)
    yield kept
    kept.manager.close()


@pytest.mark.parametrize("left", [PRIMARY, BACKUP], ids=["primary", "backup"])
def test_what_is_left_comes_back_and_the_store_forgets_it(store: Store, left: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert leave("db1", left, {"link": theirs.fileno()})
        store.restart()
        found = estates(["db1", "db2"])
        assert found.keys() == {"db1"}
        assert store.manager.store == {}
        estate = found["db1"]
        assert estate.read(type(left)) == left
        assert estate.read(BackupLeft if left is PRIMARY else PrimaryLeft) is None
        fd = estate.one("link")
        theirs.close()
        os.write(fd, b"x")
        assert ours.recv(1) == b"x"
        os.close(fd)
        assert ours.recv(1) == b"", "nobody else has it"


def test_what_was_left_of_a_vm_that_is_not_configured_any_more_is_closed(store: Store) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert leave("old", PRIMARY, {"guard.control": theirs.fileno()})
        store.restart()
        assert estates(["db1"]) == {}
        assert ours.recv(1) == b""
        assert store.manager.store == {}


@given(
    data=st.binary(max_size=200)
    | st.dictionaries(st.text(), st.integers()).map(lambda d: json.dumps(d).encode())
)
def test_no_manifest_breaks_the_next_daemon(data: bytes) -> None:
    memory = os.memfd_create("manifest")
    os.write(memory, data)
    estate = Estate("db1", restart._manifest({"manifest": memory}), {})
    assert estate.read(PrimaryLeft) is None
    assert estate.read(BackupLeft) is None


def test_what_another_version_has_left_is_not_read() -> None:
    manifest = {"version": restart.VERSION + 1, "kind": "PrimaryLeft", "left": {}}
    assert Estate("db1", manifest, {}).read(PrimaryLeft) is None


def test_names_that_begin_alike_are_told_apart() -> None:
    estate = Estate("db1", {}, {"small1": 101, "small10": 110})
    assert estate.one("small1") == 101
    assert estate.one("small10") == 110


# What is left


def test_a_guard_that_was_left_serves_the_next_daemon() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = Guard.start_write(theirs.fileno(), b"x", 60_000, answer=b"y")
        fds = {name: os.dup(fd) for name, fd in first.fds.items()}
        first.arm()
        first.leave()
        first.retire()
        ours.settimeout(0.05)
        with pytest.raises(TimeoutError):
            ours.recv(1)
        second = Guard.inherit(fds["control"], fds["page"], 60_000)
        assert second.alive
        assert second.pid == first.pid
        second.close()
        assert not second.alive
        with pytest.raises(TimeoutError):
            ours.recv(1)


def test_a_guard_whose_daemons_are_all_gone_acts() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guard = Guard.start_write(theirs.fileno(), b"x", 60_000, answer=b"y")
        fds = {name: os.dup(fd) for name, fd in guard.fds.items()}
        guard.leave()
        guard.close()
        for fd in fds.values():
            os.close(fd)
        ours.settimeout(10)
        assert ours.recv(1) == b"x"


def test_a_guard_that_has_gone_cannot_be_inherited() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guard = Guard.start_write(theirs.fileno(), b"x", 60_000, answer=b"y")
        fds = {name: os.dup(fd) for name, fd in guard.fds.items()}
        os.kill(guard.pid, signal.SIGKILL)
        guard.close()
        with pytest.raises(GuardFailed):
            Guard.inherit(fds["control"], fds["page"], 60_000)
        for fd in fds.values():
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_a_process_of_the_daemon_before_is_seen_to_end() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Inherited(os.pidfd_open(child.pid))
        assert process.pid == child.pid
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0)
        process.kill()
        assert process.wait(10) == UNKNOWN
        assert process.poll() == UNKNOWN
        process.close()
        process.kill()


def test_a_replica_that_was_left_is_the_same_replica() -> None:
    small = Block("/rom@etc/small", 4096)
    layout = RamLayout((BLOCK, small), section_id=2)
    left = ReplicaLeft(5, Configuration(b"\x07conf", "pc"), layout, "pc.ram", (small,))
    memory = os.memfd_create("test-small")
    os.write(memory, b"s" * 4096)
    image = Buffer("test-ram", BLOCK.size, prefault=0)
    image.view[:4] = b"page"
    replica = Replica.inherit([(BLOCK, image)], left, [memory], b"device")
    assert replica.committed == 5
    assert bytes(replica.image("pc.ram")[:4]) == b"page"
    assert bytes(replica.image(small.name)) == b"s" * 4096
    assert replica.blocks() == layout.blocks
    again, fds, device = replica.leave()
    assert (again, fds, device) == (left, (memory,), b"device")
    assert b"device" in b"".join(bytes(piece) for piece in replica.restore())
    replica.close()
    image.close()
