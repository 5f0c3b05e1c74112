"""What a guest may cost who learns its addresses: a bounded number of frames, however many it sends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address

import trio
import trio.testing

from curling_fd.network import packets
from curling_fd.network.learn import Learned
from curling_fd.network.snoop import snoop
from tests.lab.debs import run
from tests.lab.hosts import Host
from tests.lab.tap import GUEST_MAC, Tap

ARP = packets.gratuitous_request(GUEST_MAC.hex(":"), IPv4Address("198.51.100.9"))


class Counting(Learned):
    """Counts what it is shown."""

    frames = 0
    tags: tuple[int | None, ...] = ()

    def __init__(self, enough: int = 0) -> None:
        super().__init__()
        self._enough = enough
        self.seen = trio.Event()

    def observe(self, frame: bytes, vlan: int | None = None) -> bool:
        self.frames += 1
        self.tags = (*self.tags, vlan)[-4:]
        if self.frames == self._enough:
            self.seen.set()
        return super().observe(frame, vlan)


@asynccontextmanager
async def snooping(host: Host, learned: Learned) -> AsyncIterator[Tap]:
    """A guest's tap in `host`, with `learned` shown what it sends for the length of a block."""
    with host.entered():
        tap = Tap("vnet0")
        run(["ip", "link", "set", "vnet0", "addrgenmode", "none", "up"])
    with tap:
        async with trio.open_nursery() as nursery:
            with host.entered():
                nursery.start_soon(snoop, "vnet0", learned)
                await trio.testing.wait_all_tasks_blocked()
            yield tap
            nursery.cancel_scope.cancel()


async def test_a_flood_of_arp_costs_a_bounded_number_of_frames(
    lone: Host, autojump_clock: trio.testing.MockClock
) -> None:
    learned = Counting()
    async with snooping(lone, learned) as tap:
        started = trio.current_time()
        for _ in range(50):
            for _ in range(200):
                tap.send(ARP)
            await trio.sleep(0.01)
        assert 64 <= learned.frames <= 65 * (1 + (trio.current_time() - started) / 0.1)
        assert learned.changes == 1


async def test_the_tag_of_a_frame_is_told_and_other_frames_are_not_read(lone: Host) -> None:
    learned = Counting(2)
    async with snooping(lone, learned) as tap:
        tap.number(*range(20))
        tap.send(ARP[:12] + b"\x81\x00" + (0x2000 | 42).to_bytes(2) + ARP[12:])
        tap.number(*range(20))
        tap.send(ARP)
        with trio.fail_after(20):
            await learned.seen.wait()
        assert learned.tags == (42, None)
