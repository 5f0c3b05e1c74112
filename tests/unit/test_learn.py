"""Learning a guest's addresses: what counts as a claim, what does not, and how it travels."""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.network import packets
from curling_fd.network.learn import MOST, Binding, Learned, decode, is_of_a_station
from tests.unit.test_packets import NA, OPTION, discovery

MAC = "52:54:00:12:34:56"
OTHER = "52:54:00:00:00:02"
FOUR = IPv4Address("198.51.100.9")
SIX = IPv6Address("2001:db8::9")


def with_source(frame: bytes, mac: str) -> bytes:
    """The frame as if `mac` had sent it."""
    return frame[:6] + bytes.fromhex(mac.replace(":", "")) + frame[12:]


def test_an_address_is_learned_from_a_claim_with_its_mac_and_vlan() -> None:
    learned = Learned()
    assert learned.observe(packets.gratuitous_request(MAC, FOUR, 10))
    assert learned.observe(packets.advertisement(MAC, SIX))
    assert learned.bindings == (Binding(MAC, FOUR, 10), Binding(MAC, SIX))
    assert learned.changes == 2


def test_what_is_known_already_is_no_news() -> None:
    learned = Learned()
    learned.observe(packets.gratuitous_request(MAC, FOUR))
    assert not learned.observe(packets.gratuitous_reply(MAC, FOUR))
    assert learned.changes == 1


@pytest.mark.parametrize(
    "frame",
    [
        packets.probe(MAC, FOUR),
        packets.solicitation(MAC, SIX),
        packets.reverse_request(MAC),
        packets.gratuitous_request(MAC, IPv4Address("224.0.0.1")),
        packets.gratuitous_request(MAC, IPv4Address("255.255.255.255")),
        packets.gratuitous_request(MAC, IPv4Address("127.0.0.1")),
        packets.gratuitous_request("01:00:5e:00:00:01", FOUR),
        packets.advertisement(MAC, IPv6Address("ff02::1")),
        packets.advertisement(MAC, IPv6Address("::1")),
        with_source(packets.gratuitous_reply(MAC, FOUR), OTHER),
        with_source(packets.advertisement(MAC, SIX), OTHER),
        discovery(b"\x88\0\0\0\0\0\0\0" + SIX.packed + OPTION),
        b"",
        bytes(60),
    ],
    ids=[
        "probe",
        "duplicate address detection",
        "RARP",
        "multicast address",
        "broadcast address",
        "loopback address",
        "multicast MAC",
        "IPv6 multicast address",
        "IPv6 loopback address",
        "ARP for another MAC",
        "advertisement for another MAC",
        "advertisement of a proxy",
        "nothing",
        "zeros",
    ],
)
def test_what_is_no_claim_teaches_nothing(frame: bytes) -> None:
    learned = Learned()
    assert not learned.observe(frame)
    assert learned.bindings == ()


def test_an_address_that_moves_to_another_mac_of_the_guest_is_there_only() -> None:
    learned = Learned()
    learned.observe(packets.gratuitous_request(MAC, FOUR))
    assert learned.observe(packets.gratuitous_request(OTHER, FOUR))
    assert learned.bindings == (Binding(OTHER, FOUR),)


def test_the_same_address_in_two_vlans_is_two() -> None:
    learned = Learned()
    learned.observe(packets.gratuitous_request(MAC, FOUR, 1))
    learned.observe(packets.gratuitous_request(MAC, FOUR, 2))
    assert len(learned.bindings) == 2


def test_a_guest_with_too_many_addresses_keeps_those_it_used_last() -> None:
    learned = Learned()
    first, *others = (IPv4Address(f"10.0.{n // 256}.{n % 256}") for n in range(1, MOST + 3))
    learned.observe(packets.gratuitous_request(MAC, first))
    for address in others:
        learned.observe(packets.gratuitous_request(MAC, first))
        learned.observe(packets.gratuitous_request(MAC, address))
    known = [binding.address for binding in learned.bindings]
    assert len(known) == MOST
    assert first in known and others[0] not in known and others[-1] == known[-1]


ROUTER_ADVERTISEMENT = discovery(b"\x86\0\0\0" + bytes(12) + b"\x01" + OPTION[1:])


def test_a_router_is_known_as_one_in_all_its_addresses_and_no_longer_when_it_says_so() -> None:
    learned = Learned()
    learned.observe(packets.advertisement(MAC, IPv6Address("fe80::9")))
    assert learned.observe(ROUTER_ADVERTISEMENT)
    learned.observe(packets.advertisement(OTHER, IPv6Address("fe80::2")))
    assert [binding.router for binding in learned.bindings] == [True, True, False]
    assert learned.observe(packets.advertisement(MAC, IPv6Address("fe80::9"), router=False))
    assert not any(binding.router for binding in learned.bindings)


def test_a_solicitation_from_an_address_in_use_is_a_claim() -> None:
    learned = Learned()
    message = b"\x87\0\0\0\0\0\0\0" + IPv6Address("2001:db8::1").packed
    assert learned.observe(discovery(message + b"\x01" + OPTION[1:]))
    assert learned.bindings == (Binding(MAC, SIX),)


@pytest.mark.parametrize(
    ("frame", "left"),
    [
        (packets.gratuitous_request(OTHER, FOUR), 1),
        (packets.gratuitous_reply(OTHER, FOUR), 1),
        (packets.advertisement(OTHER, SIX), 1),
        (with_source(discovery(b"\x87" + NA[1:]), OTHER), 1),
        (packets.probe(OTHER, FOUR), 2),
        (packets.solicitation(OTHER, SIX), 2),
        (packets.gratuitous_request(OTHER, FOUR, 5), 2),
        (packets.gratuitous_request(MAC, FOUR), 2),
        (packets.reverse_request(OTHER), 2),
    ],
)
def test_an_address_that_somebody_else_claims_is_forgotten(frame: bytes, left: int) -> None:
    learned = Learned.of([Binding(MAC, FOUR), Binding(MAC, SIX)])
    assert learned.overhear(frame) == (left == 1) == bool(learned.changes)
    assert len(learned.bindings) == left


addresses = st.ip_addresses().filter(is_of_a_station)
macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":")).filter(packets.is_mac)
bindings = st.builds(Binding, macs, addresses, st.none() | st.integers(1, 4094), st.booleans())


@given(st.lists(bindings, max_size=20))
def test_what_is_known_travels_as_json(known: list[Binding]) -> None:
    learned = Learned.of(known)
    assert learned.changes == 0
    assert decode(json.loads(json.dumps(learned.encode()))) == learned.bindings


GOOD = [MAC, "198.51.100.9", 0, False]


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        "",
        [GOOD] * (MOST + 1),
        [None],
        [[]],
        [[*GOOD, 1]],
        [[MAC, "198.51.100.9", 0]],
        [["52:54:00:AB:34:56", *GOOD[1:]]],
        [["ff:ff:ff:ff:ff:ff", *GOOD[1:]]],
        [[MAC, "198.51.100", 0, False]],
        [[MAC, "224.0.0.1", 0, False]],
        [[MAC, "fe80::1%eth0", 0, False]],
        [[MAC, "198.51.100.9", 4095, False]],
        [[MAC, "198.51.100.9", True, False]],
        [[MAC, "198.51.100.9", 0, 1]],
        [[MAC, 3325256713, 0, False]],
    ],
)
def test_what_a_peer_says_wrongly_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="address"):
        decode(value)
    assert decode([GOOD]) == (Binding(MAC, FOUR),)


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=120), st.none() | st.integers(0, 4095))))
def test_whatever_passes_only_addresses_of_stations_are_learned(
    frames: list[tuple[bool, bytes, int | None]],
) -> None:
    learned = Learned()
    for own, frame, vlan in frames:
        take: Callable[..., bool] = learned.observe if own else learned.overhear
        take(bytes(12) + b"\x08\x06" + frame, vlan)
        take(frame, vlan)
    assert decode(learned.encode()) == learned.bindings
