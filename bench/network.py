"""Round trips through a protected guest, a stream out of it, and what the daemons cost while nothing happens.

A client on a host of its own pings the guest, one request at a time: the next when the one before is
answered. The guest's kernel answers; what is added is the time a packet is held.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import trio
from attrs import define, field

from bench import bulk
from bench.daemons import cpu_seconds
from bench.figures import median, percentile
from tests.integration.stage import VM, Stage, stage
from tests.lab.front import CARD, GUEST_ADDRESS
from tests.lab.guests import LinuxGuest
from tests.lab.hosts import Host
from tests.lab.icmp import echo_reply, echo_request
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

#: Idle but for its own clock: what is measured is the network.
GUEST = LinuxGuest(pages=64, dirty=8, pause_us=500_000, memory="128M", ip=f"{GUEST_ADDRESS}/24", serve=1)

REQUESTS = 300
_WARM_UP = 20
_LOST_AFTER = 1.0

#: Seconds of rest over which the daemons' CPU time is taken.
_REST = 10.0

_OURS = 0x4355

VARIANTS: dict[str, dict[str, Any] | None] = {
    "unprotected": None,
    "nothing held": {"output": "none"},
    "default pace": {},
    "fixed 5 ms": {"longest_epoch": "5ms", "shortest_epoch": "5ms"},
    "fixed 10 ms": {"longest_epoch": "10ms", "shortest_epoch": "10ms"},
    "fixed 25 ms, as Remus": {"longest_epoch": "25ms", "shortest_epoch": "25ms"},
}
"""What is measured: keys of the VM's file, or None for a guest that is not protected."""


@define
class Trips:
    """Of one variant: round trips in ms, rounds after rounds; checkpoints a second meanwhile; stop times."""

    trips_ms: list[float] = field(factory=list)
    lost: int = 0
    rates: list[float] = field(factory=list)
    stops_ms: list[float] = field(factory=list)
    idle_cpu: list[float] = field(factory=list)
    backend: str | None = None

    def row(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "requests": len(self.trips_ms) + self.lost,
            "lost": self.lost,
            "p50_ms": median(self.trips_ms),
            "p99_ms": percentile(self.trips_ms, 99),
            "checkpoints_per_s": median(self.rates) if self.rates else None,
            "stop_ms_p50": median(self.stops_ms) if self.stops_ms else None,
            "idle_cpu": median(self.idle_cpu) if self.idle_cpu else None,
        }


async def once_more(qemu: Executable, name: str, found: Trips, flow: bulk.Flow) -> None:
    """Measure one variant on a VM of its own, and add to what was found."""
    keys = VARIANTS[name]
    async with stage(LabVm(qemu=qemu, guest=GUEST, extra=CARD), with_front=True, **(keys or {})) as here:
        assert here.front is not None
        client = here.front.client
        if keys is None:
            await trio.to_thread.run_sync(round_trips, client, _WARM_UP)
            found.trips_ms += await trio.to_thread.run_sync(round_trips, client, REQUESTS)
            await bulk.once_more(here, False, flow)
            return
        await here.protect(10)
        await trio.to_thread.run_sync(round_trips, client, _WARM_UP)
        before, began = await _committed(here), time.monotonic()
        trips = await trio.to_thread.run_sync(round_trips, client, REQUESTS)
        found.trips_ms += trips
        found.lost += REQUESTS - len(trips)
        seconds = time.monotonic() - began
        shown = await here.primary.show(VM)
        found.rates.append((shown["statistics"]["committed"] - before) / seconds)
        found.stops_ms.append(shown["statistics"]["stop_ms_p50"])
        found.backend = shown["output"]
        cpu = cpu_seconds(here.primary) + cpu_seconds(here.backup)
        await trio.sleep(_REST)
        found.idle_cpu.append((cpu_seconds(here.primary) + cpu_seconds(here.backup) - cpu) / _REST)
        await bulk.once_more(here, True, flow)


async def _committed(here: Stage) -> int:
    return int((await here.primary.show(VM))["statistics"]["committed"])


def round_trips(client: Host, count: int) -> list[float]:
    """Ping the guest that often, one at a time; milliseconds of each that was answered."""
    with client.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    found = []
    with sock:
        sock.settimeout(_LOST_AFTER)
        for number in range(count):
            began = time.perf_counter()
            sock.sendto(echo_request(_OURS, number), (GUEST_ADDRESS, 0))
            try:
                while echo_reply(sock.recv(2048), _OURS) != number:
                    pass
            except TimeoutError:
                continue
            found.append((time.perf_counter() - began) * 1000)
    return found
