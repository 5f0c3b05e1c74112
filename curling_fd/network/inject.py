"""Frames put into the kernel as if a port had received them from its guest.

    we write -> a tap of ours, ingress: u32, mirred ingress redirect -> the port, as received -> its bridge

So they take the way that the guest's own frames take: through the port's own filters and holds, with the
port's VLAN, past every rule of the bridge, which learns the MAC at the right port and sends them out of the
others; whatever the bridge is. A packet socket cannot do that: what it sends on a tap goes to the guest, on
the bridge it goes to the guest too and teaches the bridge nothing. The tap is gone with its descriptor, also
when we die.

Sources: include/uapi/linux/pkt_cls.h (struct tc_u32_sel), tc_act/tc_mirred.h, net/sched/act_mirred.c.
"""

from __future__ import annotations

import errno
import os
import struct
from types import TracebackType
from typing import Self

from curling_fd.errors import NetlinkError
from curling_fd.netlink.links import link
from curling_fd.netlink.socket import RTM_NEWQDISC, RTM_NEWTFILTER, RouteSocket
from curling_fd.netlink.wire import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
from curling_fd.network import kernel, taps

_PATTERN = "curl-say%d"

_INGRESS = 0xFFFF_FFF1
_HANDLE = 0xFFFF_0000
_ETH_P_ALL = 3
_PRIORITY = 1
_TERMINAL = 1
_STOLEN = 4
_INGRESS_REDIRECT = 3

_HEADER = struct.Struct("=IHHII")
_TCMSG = struct.Struct("=B3xiIII")
_SELECTOR = struct.Struct("=BBBxHHHhI")
_KEY = struct.Struct("=IIii")
_MIRRED = struct.Struct("=IIiiiiI")

_KIND, _OPTIONS = 1, 2
_U32_SELECTOR, _U32_ACTIONS = 5, 7
_ACTION_KIND, _ACTION_OPTIONS, _MIRRED_PARAMETERS = 1, 2, 2


class Injector:
    """A way into the kernel for frames of the guest behind the port of index `port`.

    Args:
        route: borrowed, for as long as this is made.
        fd: of taps.open_tun; owned.
        port: index of the interface.

    Raises:
        NetlinkError: EPERM, or the kernel lacks a part of it.
    """

    def __init__(self, route: RouteSocket, fd: int, port: int) -> None:
        self._fd = fd
        try:
            name = taps.make_passing_tap(fd, _PATTERN)
            index = link(route, name).index
            kernel.without_own_address(route, index, name)
            route.send(ingress_qdisc(index), what=f"an ingress qdisc on {name}")
            route.send(redirect(index, port), what=f"a redirect from {name} (cls_u32, act_mirred)")
            kernel.set_link(route, index, name, up=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def send(self, frame: bytes) -> None:
        """Let the port receive a frame. A port that is down or gone loses it without a word.

        Raises:
            NetlinkError: our own tap takes it no more.
        """
        try:
            os.write(self._fd, frame)
        except OSError as error:
            number = error.errno or errno.EIO
            raise NetlinkError("an announcement", number, os.strerror(number)) from None

    def close(self) -> None:
        """Remove the tap; takes milliseconds. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def ingress_qdisc(index: int) -> bytes:
    """The request for an ingress qdisc on interface `index`."""
    return _request(
        RTM_NEWQDISC, _TCMSG.pack(0, index, _HANDLE, _INGRESS, 0) + _attribute(_KIND, b"ingress\0")
    )


def redirect(index: int, port: int) -> bytes:
    """The request for a filter that has everything received by interface `index` received by `port`."""
    mirred = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _INGRESS_REDIRECT, port)
    action = _attribute(_ACTION_KIND, b"mirred\0") + _attribute(
        _ACTION_OPTIONS, _attribute(_MIRRED_PARAMETERS, mirred)
    )
    # One key that looks at nothing: it matches everything.
    selector = _SELECTOR.pack(_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + _KEY.pack(0, 0, 0, 0)
    options = _attribute(_U32_SELECTOR, selector) + _attribute(_U32_ACTIONS, _attribute(1, action))
    protocol = int.from_bytes(_ETH_P_ALL.to_bytes(2, "big"), "little")
    body = _TCMSG.pack(0, index, 0, _HANDLE, _PRIORITY << 16 | protocol)
    return _request(RTM_NEWTFILTER, body + _attribute(_KIND, b"u32\0") + _attribute(_OPTIONS, options))


def _request(kind: int, body: bytes) -> bytes:
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)
