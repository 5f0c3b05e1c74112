"""What is announced, of whom, and when."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from curling_fd.network import packets
from curling_fd.network.announce import SCHEDULE, frames, place, repeat
from curling_fd.network.conflict import claimant
from curling_fd.network.learn import Binding
from curling_fd.network.plan import Plan
from curling_fd.network.port import Port
from curling_fd.network.words import read_guest_address
from curling_fd.service.config_network import NetworkConfig

ONE, TWO, INNER = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:99"
FOUR, SIX = IPv4Address("198.51.100.9"), IPv6Address("2001:db8::9")
PORTS = (Port("vnet0", macs=(ONE,)), Port("vnet1", macs=(TWO,)))


def test_macs_come_first_then_every_address_in_each_way() -> None:
    bindings = (Binding(ONE, FOUR), Binding(INNER, SIX, 10, True), Binding(ONE, IPv6Address("fe80::1")))
    assert list(frames([ONE], bindings)) == [
        packets.reverse_request(ONE),
        packets.reverse_request(INNER, 10),
        packets.gratuitous_request(ONE, FOUR),
        packets.gratuitous_reply(ONE, FOUR),
        packets.advertisement(INNER, SIX, 10, router=True),
        packets.advertisement(ONE, IPv6Address("fe80::1")),
    ]
    assert list(frames([], [])) == []


@given(st.lists(st.sampled_from([Binding(ONE, FOUR), Binding(TWO, SIX), Binding(ONE, FOUR, 5)]), max_size=6))
def test_every_frame_comes_from_the_mac_it_is_about(bindings: list[Binding]) -> None:
    for frame in frames([ONE], bindings):
        assert frame[6:12].hex(":") in {ONE, *(known.mac for known in bindings)}


@pytest.mark.parametrize(
    ("lines", "learned", "by_port", "homeless"),
    [
        ([], {"vnet0": [Binding(ONE, FOUR)]}, {"vnet0": {Binding(ONE, FOUR)}}, []),
        ([f"198.51.100.9 mac {TWO}"], {}, {"vnet1": {Binding(TWO, FOUR)}}, []),
        (["198.51.100.9"], {}, {}, ["198.51.100.9"]),
        (["198.51.100.9"], {"vnet1": [Binding(TWO, FOUR)]}, {"vnet1": {Binding(TWO, FOUR)}}, []),
        # The file knows better.
        ([f"198.51.100.9 mac {TWO}"], {"vnet0": [Binding(ONE, FOUR)]}, {"vnet1": {Binding(TWO, FOUR)}}, []),
        (
            [f"198.51.100.9 mac {INNER}"],
            {"vnet1": [Binding(INNER, SIX)]},
            {"vnet1": {Binding(INNER, SIX), Binding(INNER, FOUR)}},
            [],
        ),
        ([f"198.51.100.9 mac {INNER}"], {}, {}, [f"198.51.100.9 mac {INNER}"]),
        # The same address with a tag is another.
        (
            [f"198.51.100.9 mac {ONE} vlan 10"],
            {"vnet0": [Binding(ONE, FOUR)]},
            {"vnet0": {Binding(ONE, FOUR), Binding(ONE, FOUR, 10)}},
            [],
        ),
        # Who was a router is one in all its addresses.
        (
            [f"2001:db8::9 mac {ONE}"],
            {"vnet0": [Binding(ONE, IPv6Address("fe80::1"), None, True)]},
            {"vnet0": {Binding(ONE, SIX, None, True), Binding(ONE, IPv6Address("fe80::1"), None, True)}},
            [],
        ),
        ([], {"gone": [Binding(ONE, FOUR)]}, {}, []),
    ],
)
def test_addresses_are_announced_at_the_port_of_their_mac(
    lines: list[str], learned: dict[str, list[Binding]], by_port: dict[str, set[Binding]], homeless: list[str]
) -> None:
    placed = place(PORTS, map(read_guest_address, lines), learned)
    assert {name: set(bindings) for name, bindings in placed.by_port.items() if bindings} == by_port
    assert [str(address) for address in placed.homeless] == homeless


def test_with_one_nic_an_address_needs_no_mac() -> None:
    placed = place(PORTS[:1], [read_guest_address("198.51.100.9")], {})
    assert placed.by_port == {"vnet0": (Binding(ONE, FOUR),)}


async def test_rounds_are_at_their_times(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0
    began, times = trio.current_time(), []
    await repeat(SCHEDULE, lambda: times.append(round(trio.current_time() - began, 3)))
    assert tuple(times) == SCHEDULE == NetworkConfig().announce
    times.clear()
    await repeat((), lambda: times.append(0))
    assert times == []


async def test_a_round_that_is_late_is_not_made_up_for(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0
    began, times = trio.current_time(), []

    def slow() -> None:
        times.append(round(trio.current_time() - began, 3))
        if len(times) == 1:
            mock_clock.jump(0.4)

    await repeat((0.0, 0.05, 0.15, 0.35, 0.75), slow)
    # 0.05 and 0.15 are past when their turn comes; the newest of those that are late is said at once.
    assert times == [0.0, 0.4, 0.75]


@pytest.mark.parametrize(
    ("frame", "claims"),
    [
        (packets.gratuitous_request(ONE, FOUR), (FOUR, ONE)),
        (packets.gratuitous_reply(ONE, FOUR), (FOUR, ONE)),
        (packets.probe(ONE, FOUR), (FOUR, ONE)),
        (packets.advertisement(ONE, SIX), (SIX, ONE)),
        (packets.solicitation(ONE, SIX), (SIX, ONE)),
        (packets.gratuitous_request(ONE, IPv4Address("198.51.100.8")), None),
        (packets.advertisement(ONE, IPv6Address("fe80::1")), None),
        (packets.reverse_request(ONE), None),
        (bytes(60), None),
    ],
)
def test_who_has_an_address_or_wants_it_too(frame: bytes, claims: object) -> None:
    assert claimant(frame, {FOUR, SIX}) == claims


def test_bridges_are_called_as_they_are_here() -> None:
    ports = [Port("a", bridge="vmbr0"), Port("b", bridge="vmbr1"), Port("c")]

    def bridges(plan: Plan) -> list[str | None]:
        return [port.bridge for port in plan.localized(ports)]

    assert bridges(Plan()) == ["vmbr0", "vmbr1", None]
    assert bridges(Plan(bridge="br0")) == ["br0", "br0", "br0"]
    assert bridges(Plan(bridges={"vmbr1": "br1"})) == ["vmbr0", "br1", None]
    assert bridges(Plan(bridge="br0", bridges={"vmbr1": "br1"})) == ["br0", "br1", "br0"]
