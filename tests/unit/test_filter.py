"""What QEMU is told when packets are held by its filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import trio

from curling_fd.errors import CannotHold, QmpCommandFailed
from curling_fd.output.filter import FilterHold, left_in
from curling_fd.qmp.client import QmpClient


class Monitor:
    """Notes commands; refuses those that `refused` is in."""

    def __init__(self, refused: str = "nothing") -> None:
        self.said: list[str] = []
        self.refused = refused
        self.disconnected = trio.Event()
        self.is_unread = False

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        told = " ".join([command, *(str(value) for value in (arguments or {}).values())])
        self.said.append(told)
        if self.refused in told:
            raise QmpCommandFailed(command, "GenericError", "Vhost is not supported")
        names = ("curling-a-net0", "curling-b-net0", "curling-b-net1", "pc.ram")
        return [{"name": name} for name in names] if command == "qom-list" else {}

    async def execute_all(self, commands: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[Any]:
        return [await self.execute(*command) for command in commands]


def hold_on(monitor: Monitor, *netdevs: str) -> FilterHold:
    return FilterHold(cast(QmpClient, monitor), "/nowhere", netdevs)


async def barrier(hold: FilterHold, sequence: int) -> None:
    await trio.to_thread.run_sync(hold.barrier, sequence)


async def test_filters_are_made_open_and_closed_at_the_first_barrier_the_outer_one_first() -> None:
    monitor = Monitor()
    hold = hold_on(monitor, "net0")
    await hold.attach()
    assert monitor.said == [
        "object-add filter-buffer curling-a-net0 net0 rx 4294967295 off",
        "object-add filter-buffer curling-b-net0 net0 rx 4294967295 off id=curling-a-net0 before",
    ]
    monitor.said.clear()
    await barrier(hold, 1)
    assert monitor.said == [
        "qom-set /objects/curling-b-net0 status on",
        "qom-set /objects/curling-a-net0 status on",
    ]


async def test_an_epoch_moves_outward_at_its_barrier_and_leaves_at_its_release() -> None:
    monitor = Monitor()
    hold = hold_on(monitor, "net0", "net1")
    await hold.attach()
    await barrier(hold, 1)
    await hold.release(1)
    monitor.said.clear()
    await barrier(hold, 2)
    assert [word.split("/")[2] for word in monitor.said] == [
        "curling-a-net0 status off",
        "curling-a-net1 status off",
        "curling-a-net0 status on",
        "curling-a-net1 status on",
    ]
    monitor.said.clear()
    await hold.release(2)
    assert [word.split("/")[2] for word in monitor.said] == [
        "curling-b-net0 status off",
        "curling-b-net1 status off",
        "curling-b-net0 status on",
        "curling-b-net1 status on",
    ]


async def test_letting_out_takes_the_outer_filters_away_first() -> None:
    monitor = Monitor()
    hold = hold_on(monitor, "net0")
    await hold.attach()
    await barrier(hold, 1)
    monitor.said.clear()
    await hold.detach()
    await hold.detach()
    assert monitor.said == ["object-del curling-b-net0", "object-del curling-a-net0"]


async def test_dropping_takes_the_link_down_so_that_nothing_comes_out_of_a_filter_that_goes() -> None:
    monitor = Monitor()
    hold = hold_on(monitor, "net0")
    await hold.attach()
    await barrier(hold, 1)
    monitor.said.clear()
    await hold.drop()
    assert monitor.said == ["set_link net0 False"]


async def test_a_card_that_takes_no_filter_is_named_and_nothing_is_left() -> None:
    monitor = Monitor(refused="curling-a-net1")
    with pytest.raises(CannotHold) as caught:
        await hold_on(monitor, "net0", "net1").attach()
    assert (caught.value.nic, caught.value.why) == ("net1", "Vhost is not supported")
    assert monitor.said[-2:] == ["object-del curling-b-net0", "object-del curling-a-net0"]


async def test_a_second_barrier_before_the_release_is_a_mistake_of_ours() -> None:
    hold = hold_on(Monitor(), "net0")
    await hold.attach()
    await barrier(hold, 1)
    with pytest.raises(AssertionError):
        await barrier(hold, 2)


async def test_what_a_daemon_before_us_left_is_found() -> None:
    assert await left_in(cast(QmpClient, Monitor())) == ("net0", "net1")


async def test_the_last_will_silences_the_mirrors() -> None:
    will = hold_on(Monitor(), "net0").last_will
    assert will.count(b"\n") == 1
    assert b'"path":"/objects/curling-m-net0","property":"status","value":"off"' in will
