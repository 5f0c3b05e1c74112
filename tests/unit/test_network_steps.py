"""Steps: remembered as JSON, undone newest first, and a step that cannot be undone keeps no other from it."""

from __future__ import annotations

import errno
import json
from typing import Any, ClassVar, cast

import pytest
from attrs import define

from curling_fd.errors import NetlinkError
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network import fdb, inject
from curling_fd.network.bpf import ARP_AND_DISCOVERY
from curling_fd.network.packets import advertisement, gratuitous_request, parse, solicitation
from curling_fd.network.steps import (
    KINDS,
    AddedAddress,
    AddedRoute,
    BroughtUp,
    Joined,
    Ledger,
    MadeTap,
    Pointed,
    Step,
    TakenDown,
    decode,
)
from tests.unit.test_learn import MAC, ROUTER_ADVERTISEMENT
from tests.unit.test_packets import FOUR, SIX, discovery

ROUTE = cast(RouteSocket, None)

EXAMPLES: list[Step] = [
    MadeTap("vnet0", 7),
    Joined("vnet1", 8),
    TakenDown("vnet1", 8),
    BroughtUp("vnet0", 7),
    Pointed("vnet0", 7, "52:54:00:12:34:56", 10, before=3),
    AddedAddress("192.0.2.80/24 dev br0", 2),
    AddedRoute("10.9.0.0/16 via 192.0.2.9 metric 50 table 100"),
]


def test_steps_are_remembered_as_json() -> None:
    assert {type(step) for step in EXAMPLES} == set(KINDS.values())
    assert decode(json.loads(json.dumps(Ledger(list(EXAMPLES)).encode()))) == EXAMPLES


@pytest.mark.parametrize(
    "value", [{}, {"step": "moon"}, {"step": "tap"}, {"step": "tap", "colour": 1}, [], 3]
)
def test_what_is_no_step_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a step"):
        decode([value])


@define
class Noted:
    kind: ClassVar[str] = "noted"
    number: int
    said: list[int]
    error: int | None = None

    def undo(self, route: RouteSocket) -> None:
        self.said.append(self.number)
        if self.error:
            raise NetlinkError(f"number {self.number}", self.error, "no")


def test_the_newest_is_undone_first_down_to_where_it_began() -> None:
    said: list[int] = []
    saved: list[int] = []
    ledger = Ledger(save=lambda steps: saved.append(len(steps)))
    for number in range(4):
        ledger.done(Noted(number, said))
    assert ledger.undo(ROUTE, down_to=1) == []
    assert (said, len(ledger.steps)) == ([3, 2, 1], 1)
    assert saved == [1, 2, 3, 4, 1]


def test_what_is_done_twice_is_undone_once() -> None:
    ledger = Ledger()
    ledger.done(MadeTap("vnet0", 7))
    ledger.done(MadeTap("vnet0", 7))
    assert len(ledger.steps) == 1
    assert MadeTap("vnet0", 7) in ledger


def test_a_step_that_cannot_be_undone_is_told_and_the_others_are_undone() -> None:
    said: list[int] = []
    ledger = Ledger()
    for number, error in enumerate([None, errno.EPERM, errno.ENODEV, None]):
        ledger.done(Noted(number, said, error))
    (problem,) = ledger.undo(ROUTE)
    assert (problem.what, problem.errno) == ("number 1", errno.EPERM)
    assert said == [3, 2, 1, 0]
    assert ledger.steps == []


def test_what_a_bridge_had_learned_is_not_brought_back_once_the_guest_runs_here() -> None:
    learned = Pointed("vnet0", 7, MAC, None, before=3)
    fixed = Pointed("vnet0", 7, MAC, None, before=3, state=fdb.NUD_NOARP)
    ledger = Ledger([MadeTap("vnet0", 7), learned, fixed])
    ledger.settle()
    assert ledger.steps == [MadeTap("vnet0", 7), Pointed("vnet0", 7, MAC, None), fixed]


def test_the_requests_of_an_injector_have_these_bytes() -> None:
    """tc(8) 6.1 sends the same for `tc filter add dev X ingress u32 match u32 0 0 action mirred ingress
    redirect dev Y`, but for the order of the attributes and another name of the parent."""
    assert words(inject.ingress_qdisc(5)) == (
        "30000000 24000506 00000000 00000000 00000000 05000000 0000ffff f1ffffff 00000000 "
        "0c000100 696e6772 65737300"
    )
    assert words(inject.redirect(5, 7)) == (
        "8c000000 2c000506 00000000 00000000 00000000 05000000 00000000 0000ffff 00030100 "
        "08000100 75333200 60000200 "
        "24000500 01000100 00000000 00000000 00000000 00000000 00000000 00000000 00000000 "
        "38000700 34000100 0b000100 6d697272 65640000 "
        "24000200 20000200 00000000 00000000 04000000 00000000 00000000 03000000 07000000"
    )


def words(packet: bytes) -> str:
    return " ".join(packet[at : at + 4].hex() for at in range(0, len(packet), 4))


def run(program: tuple[tuple[int, int, int, int], ...], frame: bytes) -> int:
    """What the kernel's classic filter would make of a frame: net/core/filter.c, in short."""
    at, accumulator = 0, 0
    while True:
        code, if_so, if_not, operand = program[at]
        at += 1
        if code in (0x28, 0x30):
            size = 2 if code == 0x28 else 1
            if operand + size > len(frame):
                return 0
            accumulator = int.from_bytes(frame[operand : operand + size], "big")
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x25: accumulator > operand}
            at += if_so if holds[code] else if_not


@pytest.mark.parametrize(
    "frame",
    [
        gratuitous_request(MAC, FOUR),
        advertisement(MAC, SIX),
        solicitation(MAC, SIX),
        ROUTER_ADVERTISEMENT,
        discovery(b"\x85" + bytes(7)),
        discovery(b"\x89" + bytes(7)),
        discovery(bytes(24), following=17),
        bytes(60),
        bytes(12) + b"\x86\xdd",
        bytes(12) + b"\x08\x00" + bytes(46),
    ],
)
def test_the_filter_of_the_kernel_lets_through_what_is_read(frame: bytes) -> None:
    assert bool(run(ARP_AND_DISCOVERY, frame)) == (parse(frame) is not None)
