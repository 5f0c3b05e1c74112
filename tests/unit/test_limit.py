"""The limit of a first pass: set, raised for a guest that writes too fast, and taken away afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from curling_fd.capture.engine import PassLimit
from curling_fd.capture.limit import limited_pass
from curling_fd.capture.settings import UNTHROTTLED
from curling_fd.errors import QmpDisconnected
from curling_fd.qmp.client import open_qmp
from curling_fd.system.buffers import Buffer
from tests.unit.fake_qmp import FakeQmp

MIB = 1 << 20
MEMORY = 8 * MIB


class Sink:
    """Takes pieces; `shipped` are their lengths."""

    def __init__(self) -> None:
        self.shipped: list[int] = []

    async def acquire(self) -> Buffer:
        return Buffer("test", MIB)

    def give_back(self, buffer: Buffer) -> None:
        buffer.close()

    async def ship(self, buffer: Buffer, length: int, pages: int) -> None:
        self.shipped.append(length)
        buffer.close()


def limits(server: FakeQmp) -> list[int]:
    """The limits that QEMU was told."""
    return [
        command["arguments"]["max-bandwidth"]
        for command in server.commands
        if command["execute"] == "migrate-set-parameters"
    ]


@pytest.mark.parametrize(
    ("sent", "times"),
    [(0, 1), (MEMORY, 1), (2 * MEMORY - 1, 1), (2 * MEMORY, 2), (3 * MEMORY, 4), (10 * MEMORY, 512)],
)
def test_a_limit_holds_for_twice_the_memory_and_doubles_with_every_further_one(sent: int, times: int) -> None:
    assert PassLimit(MIB, MEMORY, lambda _: None).after(sent) == times * MIB


def test_a_limit_is_never_above_no_limit_at_all() -> None:
    assert PassLimit(MIB, MEMORY, lambda _: None).after(1 << 60) == UNTHROTTLED
    assert PassLimit(MIB, 0, lambda _: None).after(1 << 20) == UNTHROTTLED


async def test_a_pass_is_limited_and_what_follows_is_not(tmp_path: Path, nursery: trio.Nursery) -> None:
    server, sink, raised = FakeQmp(tmp_path / "qmp"), Sink(), list[int]()
    await nursery.start(server.serve)
    async with open_qmp(str(server.path)) as qmp:
        async with limited_pass(qmp, sink, PassLimit(5 * MIB, MEMORY, raised.append)) as limited:
            for _ in range(24):
                await limited.ship(await limited.acquire(), MIB, 0)
            limited.give_back(await limited.acquire())
        assert limits(server) == [5 * MIB, 10 * MIB, 20 * MIB, UNTHROTTLED]
    assert raised == [10 * MIB, 20 * MIB]
    assert sink.shipped == [MIB] * 24


async def test_without_a_limit_nothing_is_asked_of_qemu(tmp_path: Path, nursery: trio.Nursery) -> None:
    server, sink = FakeQmp(tmp_path / "qmp"), Sink()
    await nursery.start(server.serve)
    async with open_qmp(str(server.path)) as qmp, limited_pass(qmp, sink, None) as same:
        assert same is sink
        assert limits(server) == []


async def test_a_qemu_that_is_gone_ends_a_limited_pass_with_its_own_error(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async def hang_up(server: FakeQmp, command: dict[str, Any]) -> None:
        if len(server.commands) > 2:
            server.hang_up()
        else:
            await server.returns(command, {})

    server = FakeQmp(tmp_path / "qmp", hang_up)
    await nursery.start(server.serve)
    limit = PassLimit(MIB, MEMORY, lambda _: None)
    with pytest.raises(QmpDisconnected) as caught:
        async with open_qmp(str(server.path)) as qmp, limited_pass(qmp, Sink(), limit):
            await qmp.execute("query-status")
    assert caught.value.command == "query-status"
