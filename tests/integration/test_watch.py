"""What a guest sends is seen at once, once for an epoch, however much it is."""

from __future__ import annotations

import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from attrs import define, field

from curling_fd.errors import OutputError
from curling_fd.output.watch import Frame, OutputWatch, PortChange
from tests.lab.debs import run
from tests.lab.hosts import Host
from tests.lab.tap import BROADCAST, GUEST_MAC, Tap

ARP = BROADCAST + GUEST_MAC + bytes.fromhex("08060001080006040001") + GUEST_MAC + bytes(14)


def icmpv6(kind: int) -> bytes:
    header = struct.pack("!IHBB", 6 << 28, 32, 58, 255) + bytes(32)
    return bytes.fromhex("3333ff000001") + GUEST_MAC + b"\x86\xdd" + header + bytes([kind]) + bytes(31)


UDP_OVER_IPV6 = (
    bytes.fromhex("3333ff000001") + GUEST_MAC + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 8, 17, 9)
)
UDP_OVER_IPV6 += bytes(34) + bytes([135]) + bytes(7)


@define
class Seen:
    """What a watch told."""

    outputs: int = 0
    frames: list[Frame] = field(factory=list)
    changes: list[PortChange] = field(factory=list)
    _bell: trio.Event = field(factory=trio.Event)

    def ring(self) -> None:
        self._bell.set()
        self._bell = trio.Event()

    def on_output(self) -> None:
        self.outputs += 1
        self.ring()

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.ring()

    def on_change(self, change: PortChange) -> None:
        self.changes.append(change)
        self.ring()

    async def until(self, *, outputs: int = 0, frames: int = 0, changes: int = 0) -> None:
        with trio.fail_after(20):
            while self.outputs < outputs or len(self.frames) < frames or len(self.changes) < changes:
                await self._bell.wait()


@asynccontextmanager
async def watching(host: Host, *ports: str) -> AsyncIterator[tuple[OutputWatch, Seen]]:
    seen = Seen()
    with host.entered():
        watch = OutputWatch(ports)
    with watch:
        async with trio.open_nursery() as nursery:

            async def run_it() -> None:
                await watch.run(on_output=seen.on_output, on_frame=seen.on_frame, on_change=seen.on_change)

            nursery.start_soon(run_it)
            yield watch, seen
            nursery.cancel_scope.cancel()


@pytest.fixture
def taps(lone: Host) -> Iterator[tuple[Tap, Tap]]:
    with lone.entered(), Tap("vnet0") as one, Tap("vnet1") as two:
        for tap in (one, two):
            run(["ip", "link", "set", tap.name, "addrgenmode", "none"])
            run(["ip", "link", "set", tap.name, "up"])
        yield one, two


def barrier(watch: OutputWatch) -> None:
    """As a capture calls it."""
    thread = threading.Thread(target=watch.barrier)
    thread.start()
    thread.join()


async def test_the_first_packet_after_a_barrier_is_told_and_no_other(
    lone: Host, taps: tuple[Tap, Tap]
) -> None:
    async with watching(lone, "vnet0", "vnet1") as (watch, seen):
        one, two = taps
        one.number(*range(100))
        for epoch, tap in enumerate((one, two, one), 1):
            barrier(watch)
            watch.arm()
            await trio.testing.wait_all_tasks_blocked()
            assert seen.outputs == epoch - 1, "what was before a barrier is no news"
            tap.number(1)
            await seen.until(outputs=epoch)
            one.number(*range(1000))
            two.number(*range(1000))
            await trio.testing.wait_all_tasks_blocked()
            assert seen.outputs == epoch


async def test_what_came_between_barrier_and_arming_is_told(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0", "vnet1") as (watch, seen):
        barrier(watch)
        taps[1].number(1)
        await trio.testing.wait_all_tasks_blocked()
        assert seen.outputs == 0
        watch.arm()
        await seen.until(outputs=1)


async def test_what_is_sent_to_the_guest_is_no_output(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0") as (watch, seen):
        watch.barrier()
        watch.arm()
        with lone.entered():
            run(["ip", "address", "add", "192.0.2.1/24", "dev", "vnet0"])
            run(["ip", "neighbour", "add", "192.0.2.2", "lladdr", GUEST_MAC.hex(":"), "dev", "vnet0"])
            run(["bash", "-c", "echo hello >/dev/udp/192.0.2.2/9"])
        while b"hello" not in taps[0].receive():
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert seen.outputs == 0


async def test_only_arp_and_neighbour_discovery_are_handed_on(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0", "vnet1") as (_, seen):
        one, two = taps
        one.number(1)
        one.send(UDP_OVER_IPV6)
        for kind in (128, 132, 133, 135, 136, 137, 138, 143):
            one.send(icmpv6(kind))
        two.send(ARP)
        await seen.until(frames=5)
        await trio.testing.wait_all_tasks_blocked()
        by_port = {
            port: [frame for frame in seen.frames if frame.port == port] for port in ("vnet0", "vnet1")
        }
        assert [frame.data[54] for frame in by_port["vnet0"]] == [133, 135, 136, 137]
        assert by_port["vnet1"] == [Frame("vnet1", ARP)]
        assert by_port["vnet0"][0].data == icmpv6(133)


async def test_a_frame_with_a_vlan_tag_says_so(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0") as (_, seen):
        taps[0].send(ARP[:12] + b"\x81\x00" + (0x2000 | 42).to_bytes(2) + ARP[12:])
        await seen.until(frames=1)
        assert seen.frames == [Frame("vnet0", ARP, 0x2000 | 42)]


async def test_long_frames_are_cut(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0") as (_, seen):
        taps[0].send(ARP + bytes(1000))
        await seen.until(frames=1)
        assert seen.frames[0].data == (ARP + bytes(1000))[:128]


async def test_a_flood_of_arp_costs_a_bounded_number_of_frames(
    lone: Host, taps: tuple[Tap, Tap], autojump_clock: trio.testing.MockClock
) -> None:
    async with watching(lone, "vnet0") as (_, seen):
        started = trio.current_time()
        for _ in range(50):
            for _ in range(200):
                taps[0].send(ARP)
            await trio.sleep(0.01)
        assert len(seen.frames) <= 33 * (1 + (trio.current_time() - started) / 0.1)
        assert len(seen.frames) >= 32


async def test_changes_of_a_port_are_told(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0", "vnet1") as (watch, seen):
        with lone.entered():
            run(["ip", "link", "add", "br0", "type", "bridge"])
            run(["ip", "link", "set", "vnet0", "master", "br0"])
        await seen.until(changes=1)
        with lone.entered():
            run(["ip", "link", "set", "vnet0", "down"])
            run(["ip", "link", "set", "vnet0", "name", "other"])
            run(["ip", "link", "set", "other", "up"])
        await seen.until(changes=4)
        watch.barrier()
        watch.arm()
        taps[0].number(1)
        await seen.until(outputs=1)
        taps[0].close()
        await seen.until(changes=5)
        bridged, down, renamed, up = seen.changes[:4]
        gone = seen.changes[-1]
        assert {change.port for change in seen.changes} == {"vnet0"}
        assert bridged.after is not None and bridged.after.master and not bridged.before.master
        assert down.after is not None and not down.after.up
        assert renamed.after is not None and renamed.after.name == "other"
        assert up.after is not None and up.after.up
        assert gone.after is None
        taps[1].number(1)
        await trio.testing.wait_all_tasks_blocked()


async def test_changes_are_told_though_announcements_were_lost(lone: Host, taps: tuple[Tap, Tap]) -> None:
    async with watching(lone, "vnet0", "vnet1") as (_, seen):
        with lone.entered():
            for number in range(400):
                run(["ip", "link", "set", "vnet0", "mtu", str(1000 + number)])
            taps[1].close()
        await seen.until(changes=2)
        first, second = seen.changes
        assert (first.port, second.port) == ("vnet0", "vnet1")
        assert first.after is not None and first.after.mtu == 1399
        assert second.after is None


def test_a_port_that_is_not_there_is_named(lone: Host) -> None:
    with lone.entered(), pytest.raises(OutputError, match="vnet9") as caught:
        OutputWatch(["vnet9"])
    assert caught.value.what == "vnet9"
    assert "No such device" in caught.value.why
