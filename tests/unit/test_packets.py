"""ARP, RARP and neighbour discovery: the bytes that are sent, and reading whatever a guest sends."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curling_fd.network import packets
from curling_fd.network.packets import Arp, Discovery, Icmp, Operation, parse

MAC = "52:54:00:12:34:56"
FOUR = IPv4Address("198.51.100.9")
SIX = IPv6Address("2001:db8::9")

macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
vlans = st.none() | st.integers(1, 4094)
fours = st.ip_addresses(v=4)
sixes = st.ip_addresses(v=6)


def bytes_of(text: str) -> bytes:
    """The bytes of a frame in hexadecimal, filled up to the shortest frame."""
    return bytes.fromhex("".join(text.split())).ljust(60, b"\0")


@pytest.mark.parametrize(
    ("made", "golden"),
    [
        (
            packets.gratuitous_request(MAC, FOUR),
            "ffffffffffff 525400123456 0806 0001 0800 06 04 0001525400123456 c6336409 000000000000 c6336409",
        ),
        (
            packets.gratuitous_request(MAC, FOUR, 10),
            "ffffffffffff 525400123456 8100 000a 0806 0001 0800 06 04 0001"
            "525400123456 c6336409 000000000000 c6336409",
        ),
        (
            packets.gratuitous_reply(MAC, FOUR),
            "ffffffffffff 525400123456 0806 0001 0800 06 04 0002525400123456 c6336409 525400123456 c6336409",
        ),
        (
            packets.probe(MAC, FOUR, 4094),
            "ffffffffffff 525400123456 8100 0ffe 0806 0001 0800 06 04 0001"
            "525400123456 00000000 000000000000 c6336409",
        ),
        (
            # What QEMU 7.2 sent for this MAC, captured on a tap.
            packets.reverse_request(MAC),
            "ffffffffffff 525400123456 8035 0001 0800 06 04 0003525400123456 00000000 525400123456 00000000",
        ),
        (
            packets.advertisement(MAC, SIX),
            "333300000001 525400123456 86dd 60000000 0020 3a ff"
            "20010db8000000000000000000000009 ff020000000000000000000000000001"
            "88 00 745f 20000000 20010db8000000000000000000000009 02 01 525400123456",
        ),
        (
            packets.advertisement(MAC, SIX, 10, router=True),
            "333300000001 525400123456 8100 000a 86dd 60000000 0020 3a ff"
            "20010db8000000000000000000000009 ff020000000000000000000000000001"
            "88 00 f45e a0000000 20010db8000000000000000000000009 02 01 525400123456",
        ),
        (
            packets.solicitation(MAC, SIX),
            "3333ff000009 525400123456 86dd 60000000 0018 3a ff"
            "00000000000000000000000000000000 ff0200000000000000000001ff000009"
            "87 00 4cdd 00000000 20010db8000000000000000000000009",
        ),
    ],
    ids=[
        "request",
        "tagged request",
        "reply",
        "tagged probe",
        "RARP",
        "advertisement",
        "tagged router's advertisement",
        "solicitation",
    ],
)
def test_a_frame_has_these_bytes(made: bytes, golden: str) -> None:
    assert made.hex() == bytes_of(golden).hex()


def test_what_stands_in_a_frame_is_read_back() -> None:
    assert parse(packets.gratuitous_reply(MAC, FOUR, 7)) == Arp(
        MAC, packets.BROADCAST, 7, Operation.REPLY, MAC, FOUR, MAC, FOUR
    )
    assert parse(packets.advertisement(MAC, SIX, router=True)) == Discovery(
        MAC, "33:33:00:00:00:01", None, Icmp.ADVERTISEMENT, SIX, SIX, MAC, router=True, override=True
    )


@given(macs, fours, vlans)
def test_every_arp_that_is_built_can_be_read(mac: str, address: IPv4Address, vlan: int | None) -> None:
    for build, sender in (
        (packets.gratuitous_request, address),
        (packets.gratuitous_reply, address),
        (packets.probe, packets.NOBODY4),
    ):
        frame = build(mac, address, vlan)
        read = parse(frame)
        assert isinstance(read, Arp)
        assert (read.source, read.sender_mac, read.vlan) == (mac, mac, vlan)
        assert (read.sender, read.target) == (sender, address)
        assert len(frame) == 60
    assert parse(packets.reverse_request(mac, vlan)) is None


@given(macs, sixes.filter(lambda address: not address.is_multicast), vlans, st.booleans())
def test_every_message_of_discovery_that_is_built_can_be_read(
    mac: str, address: IPv6Address, vlan: int | None, router: bool
) -> None:
    read = parse(packets.advertisement(mac, address, vlan, router=router))
    assert isinstance(read, Discovery)
    assert (read.link, read.target, read.vlan) == (mac, address, vlan)
    assert (read.router, read.override, read.solicited) == (router, True, False)
    read = parse(packets.solicitation(mac, address, vlan))
    assert isinstance(read, Discovery)
    assert (read.sender, read.target, read.link) == (packets.NOBODY6, address, None)
    assert read.destination == packets.multicast_mac(packets.solicited_node(address))


def ones_complement_sum(data: bytes) -> int:
    """The sum of 16-bit words as RFC 1071 defines it, by another way: modulo 2^16 - 1."""
    number = int.from_bytes(data + b"\0" * (len(data) % 2), "big")
    return number % 0xFFFF if number else 0


@given(st.binary(max_size=100))
def test_data_with_its_checksum_adds_up_to_nothing(data: bytes) -> None:
    data += b"\0" * (len(data) % 2)
    with_sum = data + packets.checksum(data).to_bytes(2, "big")
    assert ones_complement_sum(with_sum) == 0
    assert packets.checksum(with_sum) == 0


@pytest.mark.parametrize("build", [packets.advertisement, packets.solicitation])
@given(macs, sixes, vlans)
def test_the_checksum_of_a_message_is_right(
    build: Callable[..., bytes], mac: str, address: IPv6Address, vlan: int | None
) -> None:
    packet = build(mac, address, vlan)[14 if vlan is None else 18 :]
    length = int.from_bytes(packet[4:6], "big")
    message = packet[40 : 40 + length]
    assert len(message) == length
    assert ones_complement_sum(packet[8:40] + length.to_bytes(4, "big") + b"\0\0\0\x3a" + message) == 0


@given(st.binary(max_size=120), vlans)
@example(b"", None)
def test_any_bytes_are_read_or_refused(data: bytes, vlan: int | None) -> None:
    parse(data, vlan)
    for ethertype in (b"\x08\x06", b"\x86\xdd", b"\x81\x00\x00\x01\x08\x06", b"\x81\x00\x00\x01\x86\xdd"):
        parse(bytes(12) + ethertype + data, vlan)


@given(st.data())
def test_a_damaged_frame_is_read_or_refused(data: st.DataObject) -> None:
    whole = data.draw(
        st.sampled_from(
            [
                packets.gratuitous_request(MAC, FOUR, 10),
                packets.advertisement(MAC, SIX, router=True),
                packets.solicitation(MAC, SIX, 7),
            ]
        )
    )
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    parse(bytes(damaged))


@given(st.integers(14, 85), st.integers(1, 255))
def test_a_flipped_byte_of_a_discovery_message_is_not_believed(at: int, flip: int) -> None:
    frame = bytearray(packets.advertisement(MAC, SIX))
    frame[at] ^= flip
    # Not covered by the checksum: the traffic class and the flow label.
    assert parse(bytes(frame)) is None or at in range(14, 18)


def discovery(message: bytes, *, hops: int = 255, following: int = 58, length: int | None = None) -> bytes:
    """A frame with a message of neighbour discovery whose checksum is right."""
    sender, group = SIX.packed, packets.ALL_NODES.packed
    pseudo = sender + group + len(message).to_bytes(4, "big") + b"\0\0\0\x3a"
    message = message[:2] + packets.checksum(pseudo + message).to_bytes(2, "big") + message[4:]
    size = len(message) if length is None else length
    header = b"\x60\0\0\0" + size.to_bytes(2, "big") + bytes([following, hops]) + sender + group
    return bytes.fromhex("333300000001 525400123456 86dd".replace(" ", "")) + header + message


NA = bytes.fromhex("88000000 20000000") + SIX.packed
OPTION = bytes.fromhex("0201") + bytes.fromhex(MAC.replace(":", ""))


@pytest.mark.parametrize(
    ("frame", "right"),
    [
        (discovery(NA), True),
        (discovery(NA + OPTION), True),
        (discovery(NA + b"\x0e\x01" + bytes(6) + OPTION), True),
        (discovery(NA, hops=254), False),
        (discovery(NA, following=0), False),
        (discovery(NA + OPTION + b"\x02"), False),
        (discovery(NA + b"\x02\x00" + bytes(6)), False),
        (discovery(NA + b"\x02\x02" + bytes(6)), False),
        (discovery(NA[:23]), False),
        (discovery(NA, length=25), False),
        (discovery(NA, length=2), False),
        (discovery(b"\x88\x01" + NA[2:]), False),
        (discovery(NA[:8] + packets.ALL_NODES.packed), False),
        (discovery(b"\x85" + NA[1:]), False),
        (discovery(b"\x86" + NA[1:16]), True),
    ],
)
def test_a_message_that_breaks_its_rfc_is_not_read(frame: bytes, right: bool) -> None:
    assert (parse(frame) is not None) == right


def test_the_mac_is_found_behind_options_of_other_kinds() -> None:
    read = parse(discovery(NA + b"\x0e\x01" + bytes(6) + OPTION))
    assert isinstance(read, Discovery) and read.link == MAC


@pytest.mark.parametrize("vlan", [0, 4095])
def test_a_tag_that_is_no_vlan(vlan: int) -> None:
    frame = packets.probe(MAC, FOUR, 1)
    read = parse(frame[:14] + vlan.to_bytes(2, "big") + frame[16:])
    # Tag 0 is a priority; 4095 is reserved.
    assert read is None if vlan else isinstance(read, Arp) and read.vlan is None


def test_a_frame_with_two_tags_is_not_read() -> None:
    frame = packets.probe(MAC, FOUR, 1)
    assert parse(frame[:12] + b"\x81\0\0\x02" + frame[12:]) is None
    assert parse(frame, 2) is None


def test_a_tag_that_was_taken_out_counts() -> None:
    read = parse(packets.probe(MAC, FOUR), 9)
    assert isinstance(read, Arp) and read.vlan == 9


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (MAC, True),
        ("02:00:00:00:00:00", True),
        ("00:00:00:00:00:00", False),
        ("01:00:5e:00:00:01", False),
        ("ff:ff:ff:ff:ff:ff", False),
        ("52:54:00:12:34", False),
        ("52:54:00:12:34:56\n", False),
        ("52-54-00-12-34-56", False),
        ("52:54:00:AB:34:56", False),
    ],
)
def test_a_mac_of_one_station_is_told_from_others(text: str, right: bool) -> None:
    assert packets.is_mac(text) == right


def test_groups_have_these_macs() -> None:
    assert packets.solicited_node(IPv6Address("fe80::5054:ff:fe12:3456")) == IPv6Address("ff02::1:ff12:3456")
    assert packets.multicast_mac(IPv6Address("ff02::1:ff12:3456")) == "33:33:ff:12:34:56"
