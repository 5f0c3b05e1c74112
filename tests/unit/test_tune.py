"""What can be changed of a VM while it is protected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from curling_fd.errors import ConfigError, OutputError
from curling_fd.output.hold import NoHold
from curling_fd.output.taps import room
from curling_fd.service.config import VmConfig
from curling_fd.service.options import TUNABLE, tuned
from curling_fd.service.vm import Vm

DB1 = VmConfig(name="db1")


def test_values_are_written_as_in_the_file_and_the_rest_stays() -> None:
    changed = tuned(DB1, {"longest_epoch": "50ms", "output_limit": "1MiB"})
    assert (changed.longest_epoch, changed.output_limit) == (0.05, 1 << 20)
    assert changed.shortest_epoch == DB1.shortest_epoch


@pytest.mark.parametrize("key", TUNABLE)
def test_nonsense_is_refused_with_the_key(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tuned(DB1, {key: "soon"})
    assert caught.value.key == key


def test_the_shortest_epoch_is_no_longer_than_the_longest() -> None:
    with pytest.raises(ConfigError) as caught:
        tuned(DB1, {"longest_epoch": "1ms"})
    assert caught.value.key == "shortest_epoch"


class Hold(NoHold):
    def __init__(self, refusal: OutputError | None = None) -> None:
        self.refusal = refusal
        self.limit = 0

    def set_limit(self, limit: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.limit = limit


def vm(hold: Hold) -> Vm:
    """As much of one as is tuned."""
    record = SimpleNamespace(config=DB1, hold=hold)
    return cast(Vm, SimpleNamespace(record=record, _protector=SimpleNamespace(session=None)))


async def test_what_holds_the_packets_is_told_of_another_limit() -> None:
    hold = Hold()
    tuned_vm = vm(hold)
    await Vm.tune(tuned_vm, {"output_limit": "1MiB"})
    assert hold.limit == tuned_vm.record.config.output_limit == 1 << 20


async def test_a_limit_that_the_hold_refuses_changes_nothing() -> None:
    refused = vm(Hold(OutputError("vnet0", "no")))
    with pytest.raises(OutputError):
        await Vm.tune(refused, {"output_limit": "1MiB", "longest_epoch": "50ms"})
    assert refused.record.config is DB1


def test_a_plug_has_room_for_more_than_makes_the_guest_wait_and_the_kernel_can_count_it() -> None:
    most = 1 << 30
    assert tuned(DB1, {"output_limit": str(most)}).output_limit == most
    with pytest.raises(ConfigError):
        tuned(DB1, {"output_limit": str(most + 1)})
    assert all(2 * limit < room(limit) < 1 << 32 for limit in (1 << 16, 16 << 20, most))
