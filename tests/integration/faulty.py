"""A link that fails as told, and a second, plain reading of what went over it.

Nothing here uses the code under test: the proxy finds frames by their header's length, and `PlainImage` reads
the migration stream one record after another, as docs/protocol.md and QEMU's migration/ram.c say.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import trio
from attrs import define, field, frozen

PAGE = 4096
HEADER = 40
HEAD = 32
TRAILER = 28

#: Kinds of frames, by their number on the wire.
BULK, CHECKPOINT, ACK = 6, 8, 9


@frozen
class Frame:
    """A whole frame as it was sent."""

    data: bytes

    @property
    def kind(self) -> int:
        return self.data[4]

    @property
    def sequence(self) -> int:
        return int.from_bytes(self.data[16:24], "big")

    @property
    def payload(self) -> bytes:
        return self.data[HEADER:-TRAILER]


@frozen
class Fault:
    """What happens to a frame at an offset in it.

    Attributes:
        cut: the link is `closed` or `reset` there.
        again: so many bytes before the offset come again.
        lost: so many bytes from the offset on are lost.
        flipped: these bits of the byte at the offset are flipped.
        late: the rest waits until the test lets it go.
        twice: the whole frame comes again.
    """

    name: str
    cut: str = ""
    again: int = 0
    lost: int = 0
    flipped: int = 0
    late: bool = False
    twice: bool = False

    def spoilt(self, data: bytes, offset: int) -> bytes:
        """The bytes that arrive in place of `data`."""
        start, rest = data[:offset], data[offset:]
        if self.cut:
            return start
        if self.again:
            return start + data[max(0, offset - self.again) : offset] + rest
        if self.lost:
            return start + rest[self.lost :]
        if self.flipped and rest:
            return start + bytes((rest[0] ^ self.flipped,)) + rest[1:]
        return data + data if self.twice else data


CLOSED = Fault("closed", cut="closed")
RESET = Fault("reset", cut="reset")
ONE_BIT = Fault("one bit flipped", flipped=0x01)
GARBLED = Fault("a byte garbled", flipped=0xFF)
LOST_BYTE = Fault("a byte lost", lost=1)
LOST_BYTES = Fault("bytes lost", lost=100)
BYTE_AGAIN = Fault("a byte twice", again=1)
BYTES_AGAIN = Fault("bytes twice", again=100)
LATE = Fault("late", late=True)
FRAME_LOST = Fault("the frame lost", lost=1 << 60)
FRAME_AGAIN = Fault("the frame twice", twice=True)

#: Those that can happen at every offset.
FAULTS = (CLOSED, RESET, ONE_BIT, GARBLED, LOST_BYTE, LOST_BYTES, BYTE_AGAIN, BYTES_AGAIN, LATE)


@define(eq=False)
class Plan:
    """Do `fault` once to a frame of `kind`, at the offset that `where` finds in it.

    Attributes:
        sequence: the frame's number; None for the next that comes.
        struck: it has been done.
        go_on: what was late may arrive.
        hit: the frame it was done to.
    """

    fault: Fault
    kind: int
    where: Callable[[Frame], int]
    sequence: int | None = None
    struck: trio.Event = field(factory=trio.Event)
    go_on: trio.Event = field(factory=trio.Event)
    hit: Frame | None = None

    def meant(self, frame: Frame) -> bool:
        matches = frame.kind == self.kind and self.sequence in (None, frame.sequence)
        return matches and not self.struck.is_set()


class Proxy:
    """Stands between two daemons and passes frames on, but for the one that `plan` is about.

    Attributes:
        plan: what is to go wrong next.
        passed: whole frames that went to the backup unharmed over the newest connection, oldest first.
        open: takes connections; closes them at once while it is False.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.plan: Plan | None = None
        self.passed: list[Frame] = []
        self.open = True

    async def serve(self) -> None:
        """Pass on what comes until cancelled."""
        listener = trio.socket.from_stdlib_socket(self._listener)
        with listener:
            async with trio.open_nursery() as nursery:
                while True:
                    client, _ = await listener.accept()
                    if self.open:
                        nursery.start_soon(self._connect, client)
                    else:
                        client.close()

    async def _connect(self, client: trio.socket.SocketType) -> None:
        self.passed = []
        server = trio.socket.socket()
        with client, server:
            try:
                await server.connect(self._target)
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, client, server, self.passed)
                    await self._pump(server, client, None)
            except* (OSError, trio.ClosedResourceError, EOFError):
                pass  # over; both ends are closed

    async def _pump(
        self, source: trio.socket.SocketType, sink: trio.socket.SocketType, passed: list[Frame] | None
    ) -> None:
        while True:
            head = await _exactly(source, HEADER)
            frame = Frame(head + await _exactly(source, int.from_bytes(head[24:32], "big") + TRAILER))
            plan = self.plan
            if plan is not None and plan.meant(frame):
                await self._strike(plan, frame, sink, source)
                if not plan.fault.late:
                    continue
            else:
                await _send(sink, frame.data)
            if passed is not None:
                passed.append(frame)

    async def _strike(
        self, plan: Plan, frame: Frame, sink: trio.socket.SocketType, source: trio.socket.SocketType
    ) -> None:
        offset, fault = plan.where(frame), plan.fault
        plan.hit = frame
        if fault.late:
            await _send(sink, frame.data[:offset])
            plan.struck.set()
            await plan.go_on.wait()
            await _send(sink, frame.data[offset:])
            return
        try:
            await _send(sink, fault.spoilt(frame.data, offset))
        finally:  # the other side may hang up before it has read it all
            plan.struck.set()
        if fault.cut:
            for sock in (sink, source):
                if fault.cut == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            raise EOFError


async def _exactly(sock: trio.socket.SocketType, length: int) -> bytes:
    data = bytearray(length)
    view, have = memoryview(data), 0
    while have < length:
        count = await sock.recv_into(view[have:])
        if not count:
            raise EOFError
        have += count
    return bytes(data)


async def _send(sock: trio.socket.SocketType, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]


class PlainImage:
    """A VM's memory, put together one record after another from the bytes that were sent.

    Attributes:
        blocks: the content of each RAM block.
        device: the device state of the last checkpoint.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, bytearray] = {}
        self.device = b""
        self._block = ""

    def first_pass(self, data: bytes) -> None:
        assert data[:8] == b"QEVM\0\0\0\3"
        at = 8
        if data[at] == 7:  # the configuration; what could follow in it is not sent for these guests
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "big")
        self._sections(data, at, len(data))

    def checkpoint(self, payload: bytes) -> None:
        ram, device, disk, _ = struct.unpack(">QQQQ", payload[:HEAD])
        assert HEAD + ram + device + disk == len(payload)
        self._sections(payload, HEAD, HEAD + ram)
        self.device = payload[HEAD + ram : HEAD + ram + device]

    def _sections(self, data: bytes, at: int, end: int) -> None:
        while at < end:
            kind = data[at]
            if kind == 8:
                at += 5 + int.from_bytes(data[at + 3 : at + 5], "big")
            elif kind in (1, 4):
                at = self._body(data, at + 5 + 1 + data[at + 5] + 8)
            elif kind in (2, 3):
                at = self._body(data, at + 5)
            else:
                assert kind == 0, f"a section of type {kind} at {at}"
                at += 1
                assert at == end

    def _body(self, data: bytes, at: int) -> int:
        while True:
            header = int.from_bytes(data[at : at + 8], "big")
            at += 8
            flags = header & 0xFFF
            address = header - flags
            if flags == 0x10:
                assert data[at] == 0x7E
                return at + 5
            if flags == 0x04:
                at = self._list(data, at, address)
            elif flags != 0x200:
                if not flags & 0x20:
                    self._block = data[at + 1 : at + 1 + data[at]].decode()
                    at += 1 + data[at]
                size = {0x08: PAGE, 0x02: 1}[flags & ~0x20]
                content = data[at : at + size] * (PAGE // size)
                self.blocks[self._block][address : address + PAGE] = content
                at += size

    def _list(self, data: bytes, at: int, total: int) -> int:
        while total:
            name = data[at + 1 : at + 1 + data[at]].decode()
            at += 1 + data[at]
            size = int.from_bytes(data[at : at + 8], "big")
            at += 8
            total -= size
            self.blocks.setdefault(name, bytearray(-(-size // PAGE) * PAGE))
        return at


def differing(one: bytes | bytearray | memoryview, two: bytes | bytearray | memoryview) -> list[int]:
    """Addresses of the pages that are not the same."""
    assert len(one) == len(two)
    return [at for at in range(0, len(one), PAGE) if bytes(one[at : at + PAGE]) != bytes(two[at : at + PAGE])]


def checkpoint_offsets(frame: Frame) -> dict[str, int]:
    """Where a fault can hit a checkpoint's frame: one offset of every kind there is."""
    ram, device, _, _ = struct.unpack(">QQQQ", frame.payload[:HEAD])
    ram_start, device_start = HEADER + HEAD, HEADER + HEAD + ram
    trailer = device_start + device
    assert trailer + TRAILER == len(frame.data)
    return {
        "before the frame": 0,
        "after its first byte": 1,
        "in the header": 20,
        "before the header's last byte": HEADER - 1,
        "at the header's end": HEADER,
        "after the payload's first byte": HEADER + 1,
        "in the checkpoint's head": HEADER + 17,
        "at the start of the RAM part": ram_start,
        "in a record's header": ram_start + 9,
        "in a page": ram_start + ram // 2,
        "before the RAM part's last byte": device_start - 1,
        "at the start of the device state": device_start,
        "in the device state": device_start + device // 2,
        "before the payload's last byte": trailer - 1,
        "at the payload's end": trailer,
        "in the trailer": trailer + 10,
        "before the last byte": len(frame.data) - 1,
        "after the frame": len(frame.data),
    }
