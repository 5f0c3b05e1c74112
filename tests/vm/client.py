"""A client outside both hosts: it asks the guest for an answer over the front network."""

from __future__ import annotations

import os
import socket
import struct

import trio

from tests.lab.hosts import Host

_AGAIN_SECONDS = 1.0
_ECHO_REQUEST, _ECHO_REPLY = 8, 0


async def echo(client: Host, address: str, *, within: float = 60) -> int:
    """Send ICMP echo requests from the name space `client` until one is answered; the number of that one.

    Raises:
        TimeoutError: none was.
    """
    with client.entered():
        plain = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    identifier = os.getpid() & 0xFFFF
    with trio.socket.from_stdlib_socket(plain) as sock, trio.move_on_after(within):
        for number in range(1, 1 << 16):
            await sock.sendto(_request(identifier, number), (address, 0))
            with trio.move_on_after(_AGAIN_SECONDS):
                while True:
                    packet, (sender, _) = await sock.recvfrom(2048)
                    header = (packet[0] & 15) * 4
                    kind, _, _, owner, answered = struct.unpack_from(">BBHHH", packet, header)
                    if (kind, owner, sender) == (_ECHO_REPLY, identifier, address):
                        return int(answered)
    raise TimeoutError(f"{address} does not answer within {within} s")


def _request(identifier: int, number: int) -> bytes:
    """An echo request with its checksum (RFC 792, RFC 1071)."""
    words = [_ECHO_REQUEST << 8, 0, identifier, number]
    total = sum(words)
    words[1] = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return struct.pack(">4H", *words)
