"""What becomes of held packets when a session is over, by the state of the VM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from curling_fd.errors import ArbiterLost, ArbiterUnavailable, CannotHold, OutputError, QmpUnreachable
from curling_fd.failover.states import State
from curling_fd.output.hold import NoHold
from curling_fd.output.nics import Nic
from curling_fd.qmp.client import QmpClient
from curling_fd.service.config import VmConfig
from curling_fd.service.network import Cards
from curling_fd.service.output import Output
from curling_fd.service.record import VmRecord


class Hold(NoHold):
    def __init__(self, refusal: OutputError | None = None) -> None:
        self.did: list[str] = []
        self.refusal = refusal

    async def drop(self) -> None:
        self.did.append("drop")

    async def detach(self) -> None:
        self.did.append("detach")
        if self.refusal is not None:
            raise self.refusal


class Record(SimpleNamespace):
    """As much of a VmRecord as is asked for."""

    async def swap(self, *, incumbent: bool) -> None:
        assert incumbent
        self.asked += 1
        if self.answer is not None:
            raise self.answer

    def note(self, event: str, message: str) -> None:
        self.told.append(event)


def record(state: State, hold: Hold, answer: Exception | None = None) -> Record:
    return Record(state=state, hold=hold, answer=answer, asked=0, told=[])


def output(of: Record) -> Output:
    return Output(cast(VmRecord, of))


@pytest.mark.parametrize("state", list(State))
async def test_packets_leave_where_the_vm_is_ours_alone_and_nowhere_else(state: State) -> None:
    hold = Hold()
    await output(record(state, hold)).settle(sure=True)
    alone = (State.UNPROTECTED, State.IDLE, State.ENDED)
    assert hold.did == (["detach"] if state in alone else ["drop"] if state is State.FENCED else [])


@pytest.mark.parametrize("answer", [ArbiterLost("beta", 7), ArbiterUnavailable("it does not answer")])
async def test_what_a_daemon_before_us_held_stays_while_the_backup_may_have_its_replica(
    answer: Exception,
) -> None:
    hold = Hold()
    vm = record(State.UNPROTECTED, hold, answer)
    await output(vm).settle(sure=False)
    assert hold.did == []
    vm.answer = None
    await output(vm).settle(sure=False)
    assert hold.did == ["detach"]
    assert vm.asked == 2


async def test_what_cannot_be_let_out_is_told_and_tried_again() -> None:
    hold = Hold(OutputError("vnet0", "no"))
    vm = record(State.IDLE, hold)
    await output(vm).settle(sure=True)
    assert vm.told == ["output"]
    hold.refusal = None
    await output(vm).settle(sure=True)
    assert vm.hold is None


async def test_a_qemu_that_is_gone_holds_nothing_any_more() -> None:
    refusal = OutputError("net0", "gone")
    refusal.__cause__ = QmpUnreachable("/run/vm/db1.qmp", "No such file or directory")
    vm = record(State.ENDED, Hold(refusal))
    await output(vm).settle(sure=True)
    assert vm.hold is None
    assert vm.told == []


#: What examination found is all there is to know: QEMU is not asked again.
UNASKED = cast(QmpClient, None)
ON_TAP = Nic("nic0", "52:54:00:11:22:33", "net0", "tap", "vnet0")


def wanting(way: str) -> Record:
    return Record(state=State.IDLE, hold=None, config=VmConfig(name="db1", output=way), told=[])


@pytest.mark.parametrize("kind", ["user", "vhost-user"])
async def test_a_card_that_nothing_can_hold_is_refused_by_name(kind: str) -> None:
    cards = Cards((ON_TAP, Nic("nic1", "52:54:00:11:22:34", "net1", kind)))
    with pytest.raises(CannotHold) as caught:
        await output(wanting("auto")).attach(UNASKED, cards)
    assert caught.value.nic == "nic1"


@pytest.mark.parametrize("nics", [(), (Nic("nic0", "52:54:00:11:22:33", None, None),)])
async def test_a_vm_whose_cards_are_connected_to_nothing_needs_no_hold(nics: tuple[Nic, ...]) -> None:
    vm = wanting("auto")
    await output(vm).attach(UNASKED, Cards(nics))
    assert vm.hold.name == "none"


async def test_taps_that_could_not_be_looked_at_cannot_be_plugged_and_it_says_why() -> None:
    why = OutputError("process 7", "its taps cannot be seen: Operation not permitted")
    with pytest.raises(OutputError) as caught:
        await output(wanting("plug")).attach(UNASKED, Cards((ON_TAP,), unseen=why))
    assert caught.value is why


async def test_a_tap_in_another_name_space_cannot_be_plugged() -> None:
    with pytest.raises(CannotHold, match="network namespace"):
        await output(wanting("plug")).attach(UNASKED, Cards((ON_TAP,)))
