"""Learning a guest's addresses from what passes its port: a packet socket on the tap that feeds `Learned`.

It sees what the guest sends at once, also what is then held back; and what others say to the guest.
"""

from __future__ import annotations

import errno

import trio

from curling_fd.errors import NetlinkError
from curling_fd.network.learn import Learned
from curling_fd.network.packet_socket import PacketSocket

_AT_ONCE = 64
_PAUSE = 0.1
"""Frames that are taken in before a pause, in seconds: a flood costs no more than that, and is lost."""


async def snoop(port: str, learned: Learned) -> None:
    """Take in what passes the interface `port`, for ever.

    Raises:
        NetlinkError: ENODEV, the interface is not there or has gone.
    """
    opened = PacketSocket(port, hear=True)
    try:
        while True:
            await trio.lowlevel.wait_readable(opened.socket)
            for _ in range(_AT_ONCE):
                try:
                    heard = opened.receive()
                except NetlinkError as error:
                    if error.errno != errno.ENETDOWN:
                        raise
                    continue  # said once; the socket goes on when the interface is up again
                if heard is None:
                    break
                (learned.overhear if heard.leaving else learned.observe)(heard.frame, heard.vlan)
            else:
                await trio.sleep(_PAUSE)
    finally:
        opened.close()
