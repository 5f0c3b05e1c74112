"""A first pass that leaves the guest, and the network, something: QEMU's own limit on its speed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from curling_fd.capture.engine import PassLimit, PassSink
from curling_fd.capture.settings import UNTHROTTLED, set_bandwidth
from curling_fd.errors import QmpError
from curling_fd.qmp.client import QmpClient
from curling_fd.system.buffers import Buffer


class _LimitedSink:
    """Passes pieces on, and raises the limit when it is due."""

    def __init__(self, qmp: QmpClient, sink: PassSink, limit: PassLimit) -> None:
        self._qmp = qmp
        self._sink = sink
        self._limit = limit
        self._sent = 0
        self._now = limit.bandwidth

    async def acquire(self) -> Buffer:
        return await self._sink.acquire()

    def give_back(self, buffer: Buffer) -> None:
        self._sink.give_back(buffer)

    async def ship(self, buffer: Buffer, length: int, pages: int) -> None:
        await self._sink.ship(buffer, length, pages)
        self._sent += length
        wanted = self._limit.after(self._sent)
        if wanted > self._now:
            self._now = wanted
            await set_bandwidth(self._qmp, wanted)
            self._limit.raised(wanted)


@asynccontextmanager
async def limited_pass(qmp: QmpClient, sink: PassSink, limit: PassLimit | None) -> AsyncIterator[PassSink]:
    """Inside the block QEMU migrates no faster than `limit`; its pieces go to the sink this yields."""
    if limit is None:
        yield sink
        return
    await set_bandwidth(qmp, limit.bandwidth)
    try:
        yield _LimitedSink(qmp, sink, limit)
    finally:
        with trio.CancelScope(shield=True), suppress(QmpError):
            await set_bandwidth(qmp, UNTHROTTLED)
