"""Ethernet frames that say who has an address: ARP, RARP and IPv6 neighbour discovery, built and read.

Sources: RFC 826 (ARP), RFC 903 (RARP), RFC 5227 (probes and announcements), RFC 5944 4.6 (gratuitous
replies), RFC 4861 (neighbour discovery), RFC 9131 (unsolicited advertisements teach routers), RFC 4862 5.4
(duplicate address detection), IEEE 802.1Q (tags). RARP frames are QEMU's own self-announcement,
`net/announce.c`.

MACs are text like "52:54:00:12:34:56", addresses objects of `ipaddress`. A VLAN is 1 to 4094, None: no tag.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

from attrs import frozen

Address = IPv4Address | IPv6Address

BROADCAST = "ff:ff:ff:ff:ff:ff"
NO_MAC = "00:00:00:00:00:00"
ALL_NODES = IPv6Address("ff02::1")
NOBODY4 = IPv4Address(0)
NOBODY6 = IPv6Address(0)

SHORTEST = 60
"""Bytes of the shortest frame without its check sequence; shorter ones are filled up."""

_VLAN = 0x8100
_ARP = 0x0806
_RARP = 0x8035
_IPV4 = 0x0800
_IPV6 = 0x86DD
_ICMPV6 = 58

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_ARP_BODY = struct.Struct(">HHBBH6s4s6s4s")
_IPV6_HEADER = struct.Struct(">IHBB16s16s")
_ARP_OF_ETHERNET = (1, _IPV4, 6, 4)

_SOURCE_LINK, _TARGET_LINK = 1, 2
_ROUTER, _SOLICITED, _OVERRIDE = 0x80, 0x40, 0x20


class Operation(IntEnum):
    """Of ARP and RARP."""

    REQUEST = 1
    REPLY = 2
    REVERSE_REQUEST = 3


class Icmp(IntEnum):
    """The kinds of neighbour discovery that name an address and who has it."""

    ROUTER_ADVERTISEMENT = 134
    SOLICITATION = 135
    ADVERTISEMENT = 136


_DISCOVERY = {Icmp.ROUTER_ADVERTISEMENT: 16, Icmp.SOLICITATION: 24, Icmp.ADVERTISEMENT: 24}
"""Where the options of each begin."""


@frozen
class Arp:
    """An ARP message as it stood in its frame; `source` and `destination` are the frame's."""

    source: str
    destination: str
    vlan: int | None
    operation: int
    sender_mac: str
    sender: IPv4Address
    target_mac: str
    target: IPv4Address


@frozen
class Discovery:
    """A message of neighbour discovery as it stood in its frame.

    Attributes:
        source, destination: of the frame.
        sender: the packet's source address.
        target: the address it is about; None in a router advertisement.
        link: the MAC in its option: the sender's, in an advertisement the target's; None: it has none.
        router, solicited, override: the flags of an advertisement. A router advertisement is `router`.
    """

    source: str
    destination: str
    vlan: int | None
    kind: Icmp
    sender: IPv6Address
    target: IPv6Address | None
    link: str | None
    router: bool = False
    solicited: bool = False
    override: bool = False


# Building.


def gratuitous_request(mac: str, address: IPv4Address, vlan: int | None = None) -> bytes:
    """An ARP announcement, RFC 5227 2.3: everybody who knows `address` now knows it at `mac`."""
    return _arp(mac, vlan, Operation.REQUEST, (mac, address), (NO_MAC, address))


def gratuitous_reply(mac: str, address: IPv4Address, vlan: int | None = None) -> bytes:
    """The same as a reply, for those who learn from nothing else: RFC 5944 4.6."""
    return _arp(mac, vlan, Operation.REPLY, (mac, address), (mac, address))


def probe(mac: str, address: IPv4Address, vlan: int | None = None) -> bytes:
    """An ARP probe, RFC 5227 2.1.1: does anybody have `address`? It teaches nobody anything."""
    return _arp(mac, vlan, Operation.REQUEST, (mac, NOBODY4), (NO_MAC, address))


def reverse_request(mac: str, vlan: int | None = None) -> bytes:
    """A RARP request, as QEMU announces a NIC: it says nothing, but switches see where it came from."""
    sender = (mac, NOBODY4)
    return _arp(mac, vlan, Operation.REVERSE_REQUEST, sender, sender, ethertype=_RARP)


def advertisement(mac: str, address: IPv6Address, vlan: int | None = None, *, router: bool = False) -> bytes:
    """An unsolicited neighbour advertisement to all nodes, RFC 4861 7.2.6: `address` is at `mac` now.

    Args:
        router: the one who has the address is a router. Said wrongly as False it is taken out of its
            neighbours' lists of default routers (RFC 4861 7.2.5).
    """
    flags = _OVERRIDE | (_ROUTER if router else 0)
    body = struct.pack(">B3x16sBB6s", flags, address.packed, _TARGET_LINK, 1, _mac_bytes(mac))
    return _icmp(mac, vlan, Icmp.ADVERTISEMENT, address, ALL_NODES, body)


def solicitation(mac: str, address: IPv6Address, vlan: int | None = None) -> bytes:
    """A solicitation of duplicate address detection, RFC 4862 5.4.2: does anybody have `address`?"""
    body = struct.pack(">4x16s", address.packed)
    return _icmp(mac, vlan, Icmp.SOLICITATION, NOBODY6, solicited_node(address), body)


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The multicast group in which whoever has `address` listens, RFC 4291 2.7.1."""
    return IPv6Address(0xFF02_0000_0000_0000_0000_0001_FF00_0000 | int(address) & 0xFF_FFFF)


def multicast_mac(group: IPv6Address) -> str:
    """Where frames for a multicast group go, RFC 2464 7."""
    return _mac_text(b"\x33\x33" + group.packed[-4:])


def checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def is_mac(text: str) -> bool:
    """Whether `text` is a MAC as we write it, and one that a single station can have."""
    return bool(_MAC.fullmatch(text)) and not int(text[:2], 16) & 1 and text != NO_MAC


def _arp(
    source: str,
    vlan: int | None,
    operation: Operation,
    sender: tuple[str, IPv4Address],
    target: tuple[str, IPv4Address],
    ethertype: int = _ARP,
) -> bytes:
    body = _ARP_BODY.pack(
        *_ARP_OF_ETHERNET,
        operation,
        _mac_bytes(sender[0]),
        sender[1].packed,
        _mac_bytes(target[0]),
        target[1].packed,
    )
    return _frame(BROADCAST, source, vlan, ethertype, body)


def _icmp(
    source: str, vlan: int | None, kind: Icmp, sender: IPv6Address, group: IPv6Address, body: bytes
) -> bytes:
    message = struct.pack(">BBH", kind, 0, 0) + body
    correct = checksum(_pseudo_header(sender.packed, group.packed, len(message)) + message)
    message = struct.pack(">BBH", kind, 0, correct) + body
    header = _IPV6_HEADER.pack(6 << 28, len(message), _ICMPV6, 255, sender.packed, group.packed)
    return _frame(multicast_mac(group), source, vlan, _IPV6, header + message)


def _pseudo_header(sender: bytes, destination: bytes, length: int) -> bytes:
    return sender + destination + struct.pack(">I3xB", length, _ICMPV6)


def _frame(destination: str, source: str, vlan: int | None, ethertype: int, body: bytes) -> bytes:
    tag = b"" if vlan is None else struct.pack(">HH", _VLAN, vlan)
    frame = _mac_bytes(destination) + _mac_bytes(source) + tag + struct.pack(">H", ethertype) + body
    return frame.ljust(SHORTEST, b"\0")


def _mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _mac_text(mac: bytes) -> str:
    return mac.hex(":")


# Reading.


def parse(frame: bytes, vlan: int | None = None) -> Arp | Discovery | None:
    """Read a frame that says who has an address.

    Args:
        frame: from the destination's MAC on. A guest wrote it: it may be anything.
        vlan: the tag, where whoever received the frame took it out (packet(7), PACKET_AUXDATA).

    Returns:
        None for every other frame: other traffic, messages that break their RFC, more than one tag.
    """
    if len(frame) < 14:
        return None
    (ethertype,) = struct.unpack_from(">H", frame, 12)
    start = 14
    if ethertype == _VLAN and vlan is None and len(frame) >= 18:
        tag, ethertype = struct.unpack_from(">HH", frame, 14)
        # Tag 0 carries a priority, and is no VLAN.
        start, vlan = 18, tag & 0xFFF or None
    if vlan is not None and not 1 <= vlan <= 4094:
        return None
    destination, source = _mac_text(frame[:6]), _mac_text(frame[6:12])
    if ethertype == _ARP:
        return _parse_arp(frame[start:], source, destination, vlan)
    if ethertype == _IPV6:
        return _parse_discovery(frame[start:], source, destination, vlan)
    return None


def _parse_arp(body: bytes, source: str, destination: str, vlan: int | None) -> Arp | None:
    if len(body) < _ARP_BODY.size:
        return None
    *form, operation, sender_mac, sender, target_mac, target = _ARP_BODY.unpack_from(body)
    if tuple(form) != _ARP_OF_ETHERNET or operation not in (Operation.REQUEST, Operation.REPLY):
        return None
    return Arp(
        source,
        destination,
        vlan,
        Operation(operation),
        _mac_text(sender_mac),
        IPv4Address(sender),
        _mac_text(target_mac),
        IPv4Address(target),
    )


def _parse_discovery(packet: bytes, source: str, destination: str, vlan: int | None) -> Discovery | None:
    if len(packet) < _IPV6_HEADER.size:
        return None
    first, length, following, hops, sender, group = _IPV6_HEADER.unpack_from(packet)
    message = packet[_IPV6_HEADER.size : _IPV6_HEADER.size + length]
    # A hop limit of 255 proves that no router has passed it on: RFC 4861 6.1.2, 7.1.
    if first >> 28 != 6 or following != _ICMPV6 or hops != 255 or len(message) != length or length < 4:
        return None
    if checksum(_pseudo_header(sender, group, length) + message) or message[1]:
        return None
    if message[0] not in _DISCOVERY:
        return None
    kind = Icmp(message[0])
    options = _options(message, _DISCOVERY[kind])
    if options is None:
        return None
    of_router = kind is Icmp.ROUTER_ADVERTISEMENT
    target = None if of_router else IPv6Address(message[8:24])
    if target is not None and target.is_multicast:
        return None
    flags = message[4] if kind is Icmp.ADVERTISEMENT else 0
    return Discovery(
        source,
        destination,
        vlan,
        kind,
        IPv6Address(sender),
        target,
        options.get(_TARGET_LINK if kind is Icmp.ADVERTISEMENT else _SOURCE_LINK),
        router=of_router or bool(flags & _ROUTER),
        solicited=bool(flags & _SOLICITED),
        override=bool(flags & _OVERRIDE),
    )


def _options(message: bytes, offset: int) -> dict[int, str] | None:
    """The MACs in the options that begin at `offset`, by kind; None if they are not whole."""
    if len(message) < offset:
        return None
    found: dict[int, str] = {}
    while offset < len(message):
        if offset + 2 > len(message):
            return None
        kind, eights = message[offset], message[offset + 1]
        if not eights or offset + eights * 8 > len(message):
            return None
        if kind in (_SOURCE_LINK, _TARGET_LINK) and eights == 1:
            found.setdefault(kind, _mac_text(message[offset + 2 : offset + 8]))
        offset += eights * 8
    return found
