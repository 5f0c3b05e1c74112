"""How fast a guest sends one TCP stream, unprotected and protected, and where the rest of its time goes.

The guest sends numbers as fast as it can to a client on a host of its own, which reads and throws away. It
stands still for each checkpoint, which is measured beside; and where its packets are held, it has no more on
its way than TCP lets it.
"""

from __future__ import annotations

import socket
import time
from itertools import pairwise
from typing import Any

import trio
from attrs import define, field

from bench.figures import median
from curling_fd.qmp.client import EventStream
from tests.integration.stage import VM, Stage
from tests.lab.connections import STREAM
from tests.lab.front import GUEST_ADDRESS
from tests.lab.hosts import Host

#: Seconds of reading that count, and before them until TCP has found its pace.
_SECONDS, _WARM_UP = 5.0, 2.0

_PIECE = 1 << 20


@define
class Flow:
    """Of one variant, round after round.

    Attributes:
        mb_per_s: MB are 10^6 bytes.
        still: the part of the time that the guest stood still.
        rates: checkpoints a second.
        sizes: bytes of a checkpoint, on average.
    """

    mb_per_s: list[float] = field(factory=list)
    still: list[float] = field(factory=list)
    rates: list[float] = field(factory=list)
    sizes: list[float] = field(factory=list)

    def row(self) -> dict[str, Any]:
        return {
            "mb_per_s": median(self.mb_per_s),
            "rounds_mb_per_s": self.mb_per_s,
            "still": median(self.still) if self.still else None,
            "checkpoints_per_s": median(self.rates) if self.rates else None,
            "checkpoint_bytes": median(self.sizes) if self.sizes else None,
        }


async def once_more(here: Stage, protected: bool, flow: Flow) -> None:
    """Measure the VM of `here` and add to what was found."""
    assert here.front is not None
    client = here.front.client
    if not protected:
        speed, _ = await trio.to_thread.run_sync(read, client)
        flow.mb_per_s.append(speed)
        return
    before = (await here.primary.show(VM))["statistics"]
    async with here.operator() as qmp:
        with qmp.events() as events:
            speed, began = await trio.to_thread.run_sync(read, client)
            still, count = _stood_still(events, began)
    after = (await here.primary.show(VM))["statistics"]
    flow.mb_per_s.append(speed)
    flow.still.append(still / _SECONDS)
    flow.rates.append(count / _SECONDS)
    taken = after["checkpoints"] - before["checkpoints"]
    flow.sizes.append((after["bytes_total"] - before["bytes_total"]) / max(taken, 1))


def read(client: Host) -> tuple[float, float]:
    """Read the guest's stream; MB a second, and when that began to count, in seconds since the epoch."""
    with client.entered():
        sock = socket.create_connection((GUEST_ADDRESS, STREAM))
    piece, taken, began = bytearray(_PIECE), 0, 0.0
    with sock:
        warm = time.monotonic() + _WARM_UP
        while time.monotonic() < warm:
            sock.recv_into(piece)
        start, began = time.monotonic(), time.time()
        while (elapsed := time.monotonic() - start) < _SECONDS:
            taken += sock.recv_into(piece)
    return taken / elapsed / 1e6, began


def _stood_still(events: EventStream, began: float) -> tuple[float, int]:
    """Seconds between STOP and RESUME in the time that counts, by QEMU's clock, and how often."""
    found = []
    while events.statistics().current_buffer_used:
        event = events.receive_nowait()
        at = event.timestamp_us / 1e6
        if event.name in ("STOP", "RESUME") and began <= at < began + _SECONDS:
            found.append((event.name, at))
    stops = [
        end - start for (name, start), (other, end) in pairwise(found) if (name, other) == ("STOP", "RESUME")
    ]
    return sum(stops), len(stops)
