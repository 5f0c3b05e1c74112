"""All or nothing (I1): whatever the link does to a checkpoint, the replica is exactly one that was committed.

The first part does everything there is to do to every kind of place in a frame, with a real link, session and
replica, and made-up checkpoints. The second does some of it to two daemons with a real guest. In both the
replica is compared, page by page, with an image that other code has made from the bytes that were sent.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, field

from curling_fd.errors import CurlingError, FrameError, LinkError, RemoteProtocolError
from curling_fd.link.frames import Header, Kind
from curling_fd.link.pulse import Pulse
from curling_fd.link.transport import FrameLink, connect
from curling_fd.replica.image import Replica
from curling_fd.service.backup import BackupSession, Dropped
from curling_fd.service.statistics import Counters
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import Block, RamLayout
from tests.integration.faulty import (
    ACK,
    BULK,
    BYTES_AGAIN,
    CHECKPOINT,
    CLOSED,
    FAULTS,
    FRAME_AGAIN,
    FRAME_LOST,
    GARBLED,
    HEADER,
    LATE,
    LOST_BYTES,
    ONE_BIT,
    RESET,
    TRAILER,
    Fault,
    Frame,
    PlainImage,
    Plan,
    Proxy,
    checkpoint_offsets,
    differing,
)
from tests.lab.cluster import Node, start_all
from tests.lab.console import Console
from tests.lab.guests import LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm
from tests.unit.streams import beginning, checkpoint, ram_section

PAGE = 4096
RAM = Block("pc.ram", 32 * PAGE)
BIOS = Block("pc.bios", 4 * PAGE)
LAYOUT = RamLayout((RAM, BIOS), section_id=3)
GENERATION = 2
LONGEST = 128 << 10

#: Checkpoints of a run. The one that is hit is the first, one in the middle, or the last.
COUNT = 4

#: A bound on waits for what comes at once.
WITHIN = 30.0


def page(number: int) -> bytes:
    return number.to_bytes(8, "big") * 512


def passes() -> list[bytes]:
    """The first pass, in two pieces."""
    first = [(RAM, address * PAGE, page(address + 1)) for address in range(20)]
    second = [(BIOS, address * PAGE, page(address + 100)) for address in range(3)]
    return [beginning(LAYOUT) + ram_section(LAYOUT, first), ram_section(LAYOUT, second)]


def checkpoints() -> list[bytes]:
    """Each changes some pages of the one before, one to zeros, and the device state."""
    made = []
    for n in range(1, COUNT + 1):
        pages = [(RAM, (n + k) * 3 % 32 * PAGE, page(1000 * n + k)) for k in range(5)]
        pages += [(RAM, n * PAGE, bytes(PAGE)), (BIOS, n % 4 * PAGE, page(2000 * n))]
        made.append(checkpoint(LAYOUT, pages, b"\x04device state %d" % n * 50 + b"\x00"))
    return made


@define
class Backup:
    """A session on the backup, with what it became of."""

    replica: Replica
    ram: Buffer
    outcome: object = None
    acknowledged: list[int] = field(factory=list)

    def check(self, pieces: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        """The replica is exactly the checkpoint it says, of those that were sent."""
        plain, committed = PlainImage(), self.replica.committed
        assert max(self.acknowledged, default=0) <= committed, "what was acknowledged is there"
        if not committed:
            return
        plain.first_pass(b"".join(pieces))
        for payload in payloads[:committed]:
            plain.checkpoint(payload)
        for name, content in plain.blocks.items():
            assert differing(self.replica.image(name), content) == []
        stream = b"".join(bytes(piece) for piece in self.replica.restore())
        assert stream.endswith(plain.device)

    def close(self) -> None:
        self.replica.close()
        self.ram.close()


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


@contextmanager
def empty_backup() -> Iterator[Backup]:
    ram = Buffer("test-ram", RAM.size, prefault=0)
    backup = Backup(Replica([(RAM, ram)]), ram)
    try:
        yield backup
    finally:
        backup.close()


async def serve_one(backup: Backup, listener: trio.socket.SocketType) -> None:
    """Take one connection, and be a backup on it until it is over."""
    sock, _ = await listener.accept()
    link = FrameLink(sock)
    session = BackupSession(
        link,
        backup.replica,
        Counters(),
        generation=GENERATION,
        max_raw=LONGEST,
        heartbeat_interval=0.2,
        failure_timeout=WITHIN,
        rehearse=nothing,
        standby_failed=trio.sleep_forever,
        committed=lambda: None,
        learned=lambda addresses: None,
    )
    try:
        backup.outcome = await session.run()
    except CurlingError as error:
        backup.outcome = error
    finally:
        link.close()


async def send_all(
    link: FrameLink, acknowledged: list[int], pieces: Sequence[bytes], payloads: Sequence[bytes], waits: bool
) -> None:
    """Be a primary: a first pass, checkpoints, the end. With `waits`, only one is on its way at a time."""
    pieces_taken = 0
    heard = trio.Event()
    buffers: list[Buffer] = []

    async def hear() -> None:
        nonlocal heard, pieces_taken
        while True:
            header = (await link.receive()).header
            if header.kind is Kind.BULK_ACK:
                pieces_taken = header.sequence
            elif header.kind is Kind.ACK:
                acknowledged.append(header.sequence)
            heard.set()
            heard = trio.Event()

    async def send(kind: Kind, sequence: int, data: bytes) -> None:
        buffer = Buffer("test-capture", len(data), prefault=0)
        buffers.append(buffer)
        buffer.view[:] = data
        await link.send_raw(Header(kind, GENERATION, sequence, len(data)), b"", (buffer, len(data)))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            nursery.start_soon(Pulse(link, GENERATION, 0.005, 1).keep)  # goes on where something is missing
            for sequence, piece in enumerate(pieces, 1):
                await send(Kind.BULK, sequence, piece)
            while pieces_taken < len(pieces):
                await heard.wait()
            for sequence, payload in enumerate(payloads, 1):
                await send(Kind.CHECKPOINT, sequence, payload)
                while waits and sequence not in acknowledged:
                    await heard.wait()
            while len(payloads) not in acknowledged:
                await heard.wait()
            await link.send(Kind.END, GENERATION, content={"reason": "done"})
            nursery.cancel_scope.cancel()
    finally:
        for buffer in buffers:
            buffer.close()


async def run(plan: Plan | None, *, waits: bool = True) -> tuple[int, object, object]:
    """Protect something over a link on which `plan` happens, and check the replica afterwards.

    Returns:
        The checkpoint it is, and what primary and backup ended with.
    """
    pieces, payloads = passes(), checkpoints()
    primary_outcome: object = None
    with empty_backup() as backup, trio.fail_after(2 * WITHIN):
        listener = trio.socket.socket()
        await listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        proxy = Proxy(listener.getsockname())
        proxy.plan = plan
        with listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(proxy.serve)
                if plan is not None and plan.fault.late:
                    nursery.start_soon(let_go_when_seen_unchanged, plan, backup)
                async with trio.open_nursery() as both:
                    both.start_soon(serve_one, backup, listener)
                    link = FrameLink(await connect(("127.0.0.1", proxy.port)))
                    try:
                        await send_all(link, backup.acknowledged, pieces, payloads, waits)
                    except* CurlingError as group:
                        primary_outcome = group.exceptions[0]
                    finally:
                        link.close()
                nursery.cancel_scope.cancel()
        backup.check(pieces, payloads)
        assert plan is None or plan.struck.is_set()
        return backup.replica.committed, primary_outcome, backup.outcome


async def let_go_when_seen_unchanged(plan: Plan, backup: Backup) -> None:
    """While a part of a checkpoint is still on its way, the replica is the one before."""
    await plan.struck.wait()
    with trio.move_on_after(0.01):  # nothing to wait for: it is about what must not happen
        await trio.sleep_forever()
    backup.check(passes(), checkpoints())
    plan.go_on.set()


def test_the_plain_reader_reads_what_was_written() -> None:
    """It is what everything else here is measured by."""
    plain = PlainImage()
    plain.first_pass(b"".join(passes()))
    assert plain.blocks.keys() == {"pc.ram", "pc.bios"}
    assert plain.blocks["pc.ram"] == b"".join(page(n + 1) if n < 20 else bytes(PAGE) for n in range(32))
    plain.checkpoint(checkpoints()[0])
    assert plain.blocks["pc.ram"][PAGE : 2 * PAGE] == bytes(PAGE)
    assert plain.blocks["pc.ram"][3 * PAGE : 4 * PAGE] == page(1000)
    assert plain.blocks["pc.bios"][PAGE : 2 * PAGE] == page(2000)
    assert plain.device.startswith(b"\x04device state 1")


async def test_without_a_fault_the_replica_is_the_last_checkpoint() -> None:
    assert await run(None) == (COUNT, None, Dropped("done"))
    committed, _, outcome = await run(None, waits=False)
    assert (committed, outcome) == (COUNT, Dropped("done"))


PLACES = tuple(checkpoint_offsets(Frame(bytes(HEADER) + checkpoints()[0] + bytes(TRAILER))))


@pytest.mark.parametrize("sequence", [1, 3, COUNT])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_a_fault_in_a_checkpoint(fault: Fault, place: str, sequence: int) -> None:
    plan = Plan(fault, CHECKPOINT, lambda frame: checkpoint_offsets(frame)[place], sequence)
    committed, primary, backup = await run(plan)
    assert plan.hit is not None
    whole = plan.hit.data
    arrived = fault.spoilt(whole, checkpoint_offsets(plan.hit)[place])
    if arrived == whole and not fault.cut:
        assert (committed, primary, backup) == (COUNT, None, Dropped("done")), (
            "only late, or nothing there to hit"
        )
        return
    assert isinstance(backup, LinkError | RemoteProtocolError)
    if arrived.startswith(
        whole
    ):  # it is whole; what came after it may have ended the session before its turn
        assert committed in (sequence - 1, sequence)
    else:
        assert committed == sequence - 1
        assert isinstance(primary, LinkError)


ACK_FAULTS = [
    (fault, place)
    for fault in FAULTS
    for place in (0, 1, 20, HEADER - 1, HEADER, HEADER + 5, HEADER + TRAILER - 1)
    if (fault, place) != (LOST_BYTES, 0)  # all of it, and no more: nobody would notice
]


@pytest.mark.parametrize(
    ("fault", "place"), ACK_FAULTS, ids=[f"{fault.name}-{place}" for fault, place in ACK_FAULTS]
)
async def test_a_fault_in_an_acknowledgement(fault: Fault, place: int) -> None:
    plan = Plan(fault, ACK, lambda frame: place, 2)
    committed, primary, _ = await run(plan)
    assert plan.hit is not None
    if fault.spoilt(plan.hit.data, place) == plan.hit.data and not fault.cut:
        assert committed == COUNT
    else:
        assert committed == 2, "the primary does not know it, and the replica is whole all the same"
        assert isinstance(primary, LinkError | FrameError)


@pytest.mark.parametrize("place", [0, 20, HEADER, HEADER + 30, HEADER + 5000, -TRAILER, -1])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_a_fault_in_the_first_pass(fault: Fault, place: int) -> None:
    plan = Plan(fault, BULK, lambda frame: place % len(frame.data), 2)
    committed, _, backup = await run(plan)
    assert plan.hit is not None
    if fault.spoilt(plan.hit.data, place % len(plan.hit.data)) == plan.hit.data and not fault.cut:
        assert committed == COUNT
    else:
        assert committed == 0, "nothing that began so may ever be run"
        assert isinstance(backup, LinkError | RemoteProtocolError)


@pytest.mark.parametrize("sequence", [1, 3])
@pytest.mark.parametrize("fault", [FRAME_LOST, FRAME_AGAIN], ids=lambda fault: fault.name)
async def test_a_checkpoint_left_out_or_repeated(fault: Fault, sequence: int) -> None:
    plan = Plan(fault, CHECKPOINT, lambda frame: 0, sequence)
    committed, _, backup = await run(plan, waits=False)
    if fault is FRAME_LOST:
        assert committed == sequence - 1
    else:  # the second one may have ended the session before the turn of the first
        assert committed in (sequence - 1, sequence)
    assert isinstance(backup, FrameError)


# With a guest

VM = "lab"
BOOT = SYNC = 180.0

GUEST_FAULTS = (
    (RESET, "in a page"),
    (ONE_BIT, "in a page"),
    (GARBLED, "in the device state"),
    (LATE, "at the start of the device state"),
    (LOST_BYTES, "in the header"),
    (BYTES_AGAIN, "in the trailer"),
    (FRAME_AGAIN, "before the frame"),
    (CLOSED, "before the last byte"),
)


@define(eq=False)
class Pair:
    """Two daemons with a faulty link from the first to the second."""

    primary: Node
    backup: Node
    proxy: Proxy

    async def strike(self, fault: Fault, place: str) -> Plan:
        """Let `fault` happen to the next checkpoint, and keep the primary from coming back afterwards."""
        plan = Plan(fault, CHECKPOINT, lambda frame: checkpoint_offsets(frame)[place])
        self.proxy.open = fault.late
        self.proxy.plan = plan
        with trio.fail_after(SYNC):
            await plan.struck.wait()
        return plan

    async def resynchronised(self) -> None:
        self.proxy.open = True
        await self.backup.wait_state(VM, "standby", within=SYNC)
        await self.primary.wait_committed(VM, 3, within=SYNC)

    def check_replica(self, committed: int, hit: Frame) -> None:
        """The backup's memory is that of checkpoint `committed`, by what passed the proxy or was hit."""
        frames = [*self.proxy.passed, hit]
        plain = PlainImage()
        plain.first_pass(b"".join(frame.payload for frame in frames if frame.kind == BULK))
        sent = {frame.sequence: frame.payload for frame in frames if frame.kind == CHECKPOINT}
        for sequence in range(1, committed + 1):
            plain.checkpoint(sent[sequence])
        assert plain.blocks["pc.ram"]
        found = self._images()
        for name, content in plain.blocks.items():
            assert differing(found[name], content) == [], name

    def _images(self) -> dict[str, bytes]:
        """The images of all RAM blocks in the backup's daemon."""
        assert self.backup.process is not None
        found: dict[str, Path] = {}
        folder = Path(f"/proc/{self.backup.process.pid}/fd")
        for entry in folder.iterdir():
            name = os.readlink(entry).removesuffix(" (deleted)")
            for prefix in ("/memfd:curling-ram-", "/memfd:curling-"):
                if name.startswith(prefix):
                    found.setdefault(name.removeprefix(prefix), entry)
        return {name: entry.read_bytes() for name, entry in found.items() if not name.startswith("staging")}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def pair(vm: LabVm, directory: Path) -> AsyncIterator[Pair]:
    """Two daemons on this machine, of which the first has `vm`."""
    settings: dict[str, Any] = {"failure_timeout": "20s"}
    nodes = [
        Node(name, directory / name, "127.0.0.1", free_port(), settings=settings)
        for name in ("alpha", "beta")
    ]
    primary, backup = nodes
    proxy = Proxy((backup.address, backup.port))
    for node in nodes:
        node.directory.mkdir()
        node.configure()
    primary.configure_vm(VM, qmp=str(vm.qmp), peer=f"127.0.0.1:{proxy.port}", longest_epoch="50ms")
    backup.configure_vm(VM, peer=primary.link)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proxy.serve)
            await start_all(*nodes)
            yield Pair(primary, backup, proxy)
            nursery.cancel_scope.cancel()
    except Exception as error:
        error.add_note(f"alpha:\n{primary.log_text()}\nbeta:\n{backup.log_text()}")
        raise
    finally:
        for node in nodes:
            node.close()


@pytest.mark.qemu
async def test_a_guest_survives_a_link_with_every_kind_of_fault_and_the_loss_of_its_host(
    unstable_qemu: Executable, tmp_path: Path
) -> None:
    guest = LinuxGuest(pages=1024, dirty=100, memory="128M")
    async with LabVm(guest=guest, qemu=unstable_qemu, name=VM) as vm, pair(vm, tmp_path) as hosts:
        await vm.wait_round(2, within=BOOT)
        with trio.fail_after(SYNC):
            await hosts.primary.call("Protect", name=VM)
        for fault, place in GUEST_FAULTS:
            await hosts.resynchronised()
            plan = await hosts.strike(fault, place)
            assert plan.hit is not None
            if fault is LATE:
                shown = await hosts.backup.show(VM)
                assert shown["statistics"]["committed"] == plan.hit.sequence - 1
                plan.go_on.set()
                await hosts.primary.wait_committed(VM, plan.hit.sequence + 3, within=SYNC)
                continue
            shown = await hosts.backup.wait_state(VM, "suspect", within=SYNC)
            committed = shown["statistics"]["committed"]
            assert plan.hit.sequence - 1 <= committed <= plan.hit.sequence - (fault is not FRAME_AGAIN)
            hosts.check_replica(committed, plan.hit)
            await vm.console.next_round(within=BOOT)
        await hosts.resynchronised()
        hosts.proxy.open = False
        before = vm.rounds()[-1]
        vm.kill()
        hosts.primary.kill(signal.SIGKILL)
        await hosts.backup.wait_state(VM, "suspect", within=SYNC)
        with trio.fail_after(SYNC):
            await hosts.backup.call("Failover", name=VM, force=True)
        here = hosts.backup.runtime(VM)
        console = Console(here / "console.log", here / "console.sock")
        first = await console.next_round(within=BOOT)
        after = await console.wait_round(before.number + 20, within=BOOT)
        assert 1 < first.number <= after.number
        assert max(report.corrupt for report in [*vm.rounds(), *console.rounds()]) == 0
