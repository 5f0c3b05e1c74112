"""What a guest sends is seen at once, once for an epoch, however much it is."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from attrs import define, field

from curling_fd.errors import OutputError
from curling_fd.output.watch import OutputWatch, PortChange
from tests.lab.debs import run
from tests.lab.hosts import Host
from tests.lab.tap import GUEST_MAC, Tap


@define
class Seen:
    """What a watch told."""

    outputs: int = 0
    changes: list[PortChange] = field(factory=list)
    _bell: trio.Event = field(factory=trio.Event)

    def ring(self) -> None:
        self._bell.set()
        self._bell = trio.Event()

    def on_output(self) -> None:
        self.outputs += 1
        self.ring()

    def on_change(self, change: PortChange) -> None:
        self.changes.append(change)
        self.ring()

    async def until(self, *, outputs: int = 0, changes: int = 0) -> None:
        with trio.fail_after(20):
            while self.outputs < outputs or len(self.changes) < changes:
                await self._bell.wait()


@asynccontextmanager
async def watching(host: Host, *ports: str) -> AsyncIterator[tuple[OutputWatch, Seen]]:
    seen = Seen()
    with host.entered():
        watch = OutputWatch(ports)
    with watch:
        async with trio.open_nursery() as nursery:

            async def run_it() -> None:
                await watch.run(on_output=seen.on_output, on_change=seen.on_change)

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
