"""The switch between lab hosts, with frames instead of hosts."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.vm.cables import Cables, switch
from tests.vm.timeline import Clocks, Timeline

ALL = b"\xff" * 6


class End:
    """What a QEMU is to a port."""

    def __init__(self, stream: trio.SocketStream, number: int) -> None:
        self._stream = stream
        self._received = bytearray()
        self.address = bytes([0x52, 0x54, 0, 0, 0, number])

    async def send(self, to: bytes, text: bytes) -> None:
        frame = to + self.address + b"\x08\x00" + text
        await self._stream.send_all(struct.pack(">I", len(frame)) + frame)

    async def receive(self) -> bytes:
        """The text of the next frame."""
        frame = await self._exactly(int.from_bytes(await self._exactly(4), "big"))
        return frame[14:]

    async def _exactly(self, count: int) -> bytes:
        with trio.fail_after(10):
            while len(self._received) < count:
                self._received += await self._stream.receive_some()
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken


@pytest.fixture
async def cables(tmp_path: Path) -> AsyncIterator[Cables]:
    timeline = Timeline(tmp_path / "timeline", Clocks())
    with switch(tmp_path, tmp_path, ["net.one", "net.two", "net.three"]):
        yield Cables(tmp_path / "control.sock", lambda: timeline)


@asynccontextmanager
async def ends(cables: Cables, tmp_path: Path) -> AsyncIterator[list[End]]:
    """Everybody connected, and known to the switch."""
    names = ["one", "two", "three"]
    streams = [await trio.open_unix_socket(str(tmp_path / f"net.{name}.sock")) for name in names]
    found = [End(stream, number) for number, stream in enumerate(streams, 1)]
    while not all(port["connected"] for port in (await cables.statistics()).values()):
        pass
    # A frame to all from each: now the switch knows who is where.
    for end in found:
        await end.send(ALL, b"hello")
        for other in found:
            if other is not end:
                assert await other.receive() == b"hello"
    yield found
    for stream in streams:
        await stream.aclose()


async def test_a_frame_goes_to_whom_it_is_for_and_to_nobody_else(cables: Cables, tmp_path: Path) -> None:
    async with ends(cables, tmp_path) as (one, two, three):
        await one.send(two.address, b"to two")
        await one.send(ALL, b"to all")
        assert [await two.receive(), await two.receive()] == [b"to two", b"to all"]
        assert await three.receive() == b"to all"


async def test_nothing_passes_a_port_that_is_cut_and_what_is_lost_is_counted(
    cables: Cables, tmp_path: Path
) -> None:
    async with ends(cables, tmp_path) as (one, two, three):
        await cables.cut("net.two")
        await one.send(two.address, b"lost")
        await two.send(one.address, b"lost as well")
        await one.send(three.address, b"not lost")
        assert await three.receive() == b"not lost"
        # The two frames of one port are in order; that of the other port may be taken a little later.
        while (await cables.statistics())["net.two"]["dropped"] < 2:
            pass
        await cables.heal("net.two")
        await one.send(two.address, b"again")
        assert await two.receive() == b"again"


async def test_a_delay_holds_frames_back_and_keeps_their_order(cables: Cables, tmp_path: Path) -> None:
    async with ends(cables, tmp_path) as (one, two, _):
        await cables.set("net.two", delay=0.2)
        started = trio.current_time()
        for number in range(5):
            await one.send(two.address, b"%d" % number)
        assert [await two.receive() for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert trio.current_time() - started >= 0.2


async def test_a_rate_bounds_what_passes_in_a_second(cables: Cables, tmp_path: Path) -> None:
    async with ends(cables, tmp_path) as (one, two, _):
        await cables.set("net.two", rate=10_000)
        started = trio.current_time()
        for _ in range(4):
            await one.send(two.address, bytes(1000))
            await two.receive()
        assert trio.current_time() - started >= 0.4


async def test_what_passed_is_recorded(cables: Cables, tmp_path: Path) -> None:
    async with ends(cables, tmp_path) as (one, two, _):
        await one.send(two.address, b"for the record")
        await two.receive()
        await cables.statistics()
        record = (tmp_path / "net.two.pcap").read_bytes()
        assert record[:4] == struct.pack("<I", 0xA1B23C4D)
        assert record.endswith(two.address + one.address + b"\x08\x00for the record")
