"""Echo requests of a client, and the answers to them, as a raw ICMP socket sends and gives them (RFC 792)."""

from __future__ import annotations

import struct

_ECHO_REQUEST, _ECHO_REPLY = 8, 0


def echo_request(identifier: int, number: int) -> bytes:
    """An echo request with its checksum (RFC 1071)."""
    words = [_ECHO_REQUEST << 8, 0, identifier, number]
    total = sum(words)
    words[1] = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return struct.pack(">4H", *words)


def echo_reply(packet: bytes, identifier: int) -> int | None:
    """The number of the request that an IPv4 packet answers, or None if it answers none of `identifier`."""
    kind, _, _, owner, number = struct.unpack_from(">BBHHH", packet, (packet[0] & 15) * 4)
    return int(number) if (kind, owner) == (_ECHO_REPLY, identifier) else None
