"""The scanner and the restore stream against a real QEMU."""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curling_fd.errors import StreamError
from curling_fd.vmstate.ram import fill_bytes, page_addresses
from curling_fd.vmstate.records import (
    PAGE_SIZE,
    PAGE_STRIDE,
    Command,
    CommandId,
    Configuration,
    FillRun,
    PageRun,
    RamLayout,
)
from curling_fd.vmstate.restore import restore_stream
from curling_fd.vmstate.scanner import Scanner
from tests.unit.scanner_reference import check

pytestmark = pytest.mark.qemu

QEMU = "qemu-system-x86_64"
# The longest any of these machines may live; a QEMU that hangs is killed, which ends its test.
_LIFETIME = 120.0


class Machine:
    """A QEMU with its monitor on a socket pair. Owns the process."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [
                *(QEMU, "-nodefaults", "-display", "none", "-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                *("-mon", "chardev=qmp,mode=control", *arguments),
            ],
            cwd=folder,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._killer = threading.Timer(_LIFETIME, self.process.kill)
        self._killer.start()
        self._socket = ours
        self._lines = ours.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._message()
        self.execute("qmp_capabilities")

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, fds: tuple[int, ...] = ()
    ) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments or {}}).encode()
        socket.send_fds(self._socket, [request], fds)
        while True:
            message = self._message()
            if "event" in message:
                self._events.append(message)
                continue
            assert "return" in message, message
            return message["return"]

    def wait_for(self, event: str, wanted: Callable[[dict[str, Any]], bool] = lambda data: True) -> None:
        """Returns when `event` with data that is `wanted` came, now or before."""
        while True:
            while self._events:
                message = self._events.pop(0)
                if message["event"] == event and wanted(message.get("data", {})):
                    return
            self._events.append(self._message())

    def migration(self, *capabilities: str) -> None:
        states = [{"capability": name, "state": True} for name in ("events", *capabilities)]
        self.execute("migrate-set-capabilities", {"capabilities": states})

    def wait_for_migration(self, status: str) -> None:
        def wanted(data: dict[str, Any]) -> bool:
            assert data["status"] != "failed"
            return bool(data["status"] == status)

        self.wait_for("MIGRATION", wanted)

    def _message(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU closed its monitor"
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._killer.cancel()
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._socket.close()


Start = Callable[..., Machine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    machines: list[Machine] = []

    def start_one(*arguments: str) -> Machine:
        machines.append(Machine(tmp_path, *arguments))
        return machines[-1]

    yield start_one
    for machine in machines:
        machine.close()


PC = ("-machine", "pc", "-accel", "tcg", "-device", "VGA", "-m", "64")


def migrate(machine: Machine, path: Path, *capabilities: str) -> bytes:
    machine.migration(*capabilities)
    machine.execute("migrate", {"uri": f"exec:cat > {path}"})
    machine.wait_for_migration("completed")
    return path.read_bytes()


def images_of(scanner: Scanner, data: bytes) -> dict[str, bytearray]:
    """The RAM that a scanned pass describes, by block."""
    assert scanner.layout is not None
    images = {block.name: bytearray(block.size) for block in scanner.layout.blocks}
    buf = memoryview(data)
    for run in scanner.drain():
        if isinstance(run, PageRun):
            for k, address in enumerate(page_addresses(buf, run)):
                at = run.data + k * PAGE_STRIDE
                images[run.block.name][address : address + PAGE_SIZE] = buf[at : at + PAGE_SIZE]
        elif isinstance(run, FillRun):
            for address, byte in zip(page_addresses(buf, run), fill_bytes(buf, run), strict=True):
                images[run.block.name][address : address + PAGE_SIZE] = bytes((byte,)) * PAGE_SIZE
    return images


def test_a_migration_is_read_alike_whole_and_byte_by_byte(start: Start, tmp_path: Path) -> None:
    data = migrate(start(*PC), tmp_path / "stream")
    outcome = check(data, None, None, cuts=range(0, len(data), 4099), check_addresses=True, bytewise=True)
    assert not outcome.bad
    assert outcome.consumed == len(data)
    pages = {item[1:3] for item in outcome.items if item[0] in ("page", "fill")}
    scanner = Scanner.for_pass()
    scanner.scan(memoryview(data), 0, len(data))
    assert scanner.layout is not None
    blocks = scanner.layout.blocks
    assert pages == {(block.name, at) for block in blocks for at in range(0, block.size, PAGE_SIZE)}


def test_a_background_snapshot_is_a_pass_whose_ram_has_no_end(start: Start, tmp_path: Path) -> None:
    data = migrate(
        start("-machine", "pc", "-accel", "tcg", "-m", "64"), tmp_path / "stream", "background-snapshot"
    )
    outcome = check(data, None, None, cuts=range(0, len(data), 4099), check_addresses=True)
    assert not outcome.bad
    assert outcome.items[-1][0] == "device"
    assert {item[1] for item in outcome.items if item[0] == "start"} == {1, 2}


def test_a_configuration_with_a_uuid_is_kept_whole(start: Start, tmp_path: Path) -> None:
    uuid = "01020304-0506-0708-090a-0b0c0d0e0f10"
    data = migrate(start(*PC, "-uuid", uuid), tmp_path / "stream", "validate-uuid")
    scanner = Scanner.for_pass()
    assert scanner.scan(memoryview(data), 0, len(data)) == len(data)
    configuration = scanner.events[0]
    assert isinstance(configuration, Configuration)
    assert configuration.section.endswith(bytes.fromhex(uuid.replace("-", "")))


def test_a_block_list_with_other_fields_is_refused(start: Start, tmp_path: Path) -> None:
    data = migrate(start(*PC), tmp_path / "stream", "x-ignore-shared")
    with pytest.raises(StreamError) as caught:
        Scanner.for_pass().scan(memoryview(data), 0, len(data))
    assert "x-ignore-shared" in caught.value.problem


def test_a_standby_with_its_ram_mapped_continues_from_the_restore_stream(
    start: Start, tmp_path: Path
) -> None:
    data = migrate(start(*PC), tmp_path / "stream")
    scanner = Scanner.for_pass(check_addresses=True)
    scanner.scan(memoryview(data), 0, len(data))
    configuration, layout = scanner.events[0], scanner.layout
    assert isinstance(configuration, Configuration)
    assert layout is not None
    small = images_of(scanner, data)
    ram = small.pop("pc.ram")
    (tmp_path / "ram").write_bytes(ram)
    assert scanner.device_state_offset is not None
    device_state = memoryview(data)[scanner.device_state_offset :]
    pieces = restore_stream(configuration.section, layout, small, device_state)
    (tmp_path / "restore").write_bytes(b"".join(pieces))

    standby = start(
        *PC,
        *("-object", f"memory-backend-file,id=pc.ram,size=64M,share=on,mem-path={tmp_path}/ram"),
        *("-machine", "memory-backend=pc.ram", "-incoming", "defer", "-S"),
    )
    standby.migration()
    standby.execute("migrate-incoming", {"uri": f"exec:cat {tmp_path}/restore"})
    standby.wait_for_migration("completed")
    assert (tmp_path / "ram").read_bytes() == ram
    again = migrate(standby, tmp_path / "again")
    second = Scanner.for_pass(check_addresses=True)
    assert second.scan(memoryview(again), 0, len(again)) == len(again)
    assert second.layout == layout
    found = images_of(second, again)
    assert found.pop("pc.ram") == ram
    assert found == small


@pytest.mark.kvm
def test_a_colo_session_goes_on_with_the_last_block_of_the_checkpoint_before(
    start: Start, tmp_path: Path
) -> None:
    # cli; ds = 0x1000; then forever: add word [bx], 1; add bx, 64
    code = bytes.fromhex("fa b80010 8ed8 31db 81070100 83c340 ebf7")
    (tmp_path / "boot").write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1440 * 1024 - 512))
    machine = start(
        *("-machine", "pc", "-accel", "kvm", "-cpu", "qemu64", "-m", "32", "-device", "VGA"),
        *("-drive", f"file={tmp_path}/boot,format=raw,if=floppy,readonly=on"),
    )
    machine.migration("x-colo")
    machine.execute("migrate-set-parameters", {"x-checkpoint-delay": 10, "max-bandwidth": 1 << 40})
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            machine.execute("getfd", {"fdname": "colo"}, fds=(theirs.fileno(),))
        machine.execute("migrate", {"uri": "fd:colo"})
        layout, last_block = _first_pass(machine, ours)
        _say(ours, 0)
        carried_over = 0
        for _ in range(5):
            stream, rest = _checkpoint(ours, layout, last_block)
            outcome = check(stream, layout, last_block, cuts=range(0, len(stream), 999), check_addresses=True)
            assert not outcome.bad
            assert outcome.items[-1] == ("eof", len(stream))
            # Without knowing the checkpoint before, "the same block as before" means nothing.
            carried_over += check(stream, layout, None).bad
            last_block = outcome.last_block
            _device_state(ours, rest)
        assert carried_over


def _first_pass(machine: Machine, ours: socket.socket) -> tuple[RamLayout, str | None]:
    data = bytearray()
    # QEMU marks the end of its first pass with an event only: what is left is in the socket by then.
    wake, sleeper = socket.socketpair()

    def collect() -> None:
        while True:
            ready, _, _ = select.select([ours, sleeper], [], [])
            try:
                while True:
                    piece = ours.recv(1 << 20, socket.MSG_DONTWAIT)
                    if not piece:
                        return
                    data.extend(piece)
            except BlockingIOError:
                if sleeper in ready:
                    return

    with wake, sleeper:
        reader = threading.Thread(target=collect)
        reader.start()
        try:
            machine.wait_for_migration("colo")
        finally:
            wake.send(b"x")
            reader.join()
    scanner = Scanner.for_pass(check_addresses=True)
    assert scanner.scan(memoryview(data), 0, len(data)) == len(data)
    assert Command(CommandId.ENABLE_COLO, b"") in scanner.events
    assert scanner.layout is not None
    return scanner.layout, scanner.last_block


def _say(ours: socket.socket, *messages: int) -> None:
    ours.sendall(struct.pack(f">{len(messages)}I", *messages))


def _hear(ours: socket.socket) -> int:
    return int.from_bytes(ours.recv(4, socket.MSG_WAITALL), "big")


def _checkpoint(ours: socket.socket, layout: RamLayout, last_block: str | None) -> tuple[bytes, bytes]:
    """The RAM sections of the next checkpoint, and what was read beyond them."""
    assert _hear(ours) == 1
    _say(ours, 2)
    assert _hear(ours) == 3
    data = bytearray(16 << 20)
    scanner = Scanner.for_checkpoint(layout, last_block, check_addresses=True)
    have = pos = 0
    with memoryview(data) as buf:
        while not scanner.done:
            have += ours.recv_into(buf[have:])
            pos = scanner.scan(buf, pos, have)
    return bytes(data[:pos]), bytes(data[pos:have])


def _device_state(ours: socket.socket, rest: bytes) -> None:
    """Reads the device state, of which `rest` is known, and lets the guest go on."""
    rest += ours.recv(max(12 - len(rest), 0), socket.MSG_WAITALL)
    message, size = struct.unpack(">IQ", rest[:12])
    assert message == 4
    state = rest[12:] + ours.recv(size - (len(rest) - 12), socket.MSG_WAITALL)
    assert len(state) == size
    assert state[-1] == 0
    _say(ours, 5, 6)
