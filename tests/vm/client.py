"""A client outside both hosts: it asks the guest for an answer over the front network."""

from __future__ import annotations

import os
import socket

import trio

from tests.lab.hosts import Host
from tests.lab.icmp import echo_reply, echo_request

_AGAIN_SECONDS = 1.0


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
            await sock.sendto(echo_request(identifier, number), (address, 0))
            with trio.move_on_after(_AGAIN_SECONDS):
                while True:
                    packet, (sender, _) = await sock.recvfrom(2048)
                    answered = echo_reply(packet, identifier)
                    if answered is not None and sender == address:
                        return answered
    raise TimeoutError(f"{address} does not answer within {within} s")
