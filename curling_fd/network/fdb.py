"""A bridge's table of MACs: which port leads to a MAC.

Sources: include/uapi/linux/neighbour.h; net/bridge/br_fdb.c: what is added as NUD_REACHABLE ages and moves
like what the bridge has learned itself.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import frozen
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from curling_fd.errors import NetlinkError
from curling_fd.netlink.socket import RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH, RouteSocket
from curling_fd.netlink.wire import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE

_NTF_MASTER = 0x04
NUD_REACHABLE = 0x02
NUD_NOARP = 0x40
NUD_PERMANENT = 0x80


@frozen
class Entry:
    """`mac` in `vlan` is behind the port of index `port`; `state`: NUD_*."""

    mac: str
    vlan: int | None
    port: int
    state: int = NUD_REACHABLE

    @property
    def learned(self) -> bool:
        """The bridge moves it by itself when the MAC shows up elsewhere, and forgets it after a while."""
        return not self.state & (NUD_NOARP | NUD_PERMANENT)


def find(route: RouteSocket, bridge: int, mac: str, vlan: int | None) -> Entry | None:
    """What the bridge knows about a MAC.

    Raises:
        NetlinkError: `bridge` is none.
    """
    message = ndmsg()
    message["family"] = socket.AF_BRIDGE
    message["attrs"] = [("NDA_LLADDR", mac), ("NDA_MASTER", bridge), *_vlan(vlan)]
    try:
        (answer,) = route.ask(message, RTM_GETNEIGH, what=f"the way to {mac}")
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return Entry(mac, vlan, answer["ifindex"], answer["state"])


def point(route: RouteSocket, entry: Entry, name: str, *, unless_known: bool = False) -> None:
    """Have frames for a MAC go to the port of `entry`, called `name`.

    Args:
        unless_known: leave it as it is when the bridge has learned something else meanwhile.

    Raises:
        NetlinkError: EPERM, the port does not pass frames; ...
    """
    message = _entry(entry)
    message["state"] = entry.state
    flags = NLM_F_CREATE | (NLM_F_EXCL if unless_known else NLM_F_REPLACE)
    with _may_be(*([errno.EEXIST] if unless_known else [])):
        route.request(message, RTM_NEWNEIGH, flags, what=f"the way to {entry.mac} by {name}")


def forget(route: RouteSocket, entry: Entry, name: str) -> None:
    """Have the bridge not know that MAC behind that port, if it does."""
    with _may_be(errno.ENOENT, errno.ENODEV, errno.EINVAL):
        route.request(_entry(entry), RTM_DELNEIGH, what=f"the way to {entry.mac} by {name}")


def _entry(entry: Entry) -> ndmsg:
    message = ndmsg()
    message["family"] = socket.AF_BRIDGE
    message["ifindex"] = entry.port
    message["flags"] = _NTF_MASTER
    message["attrs"] = [("NDA_LLADDR", entry.mac), *_vlan(entry.vlan)]
    return message


def _vlan(vlan: int | None) -> list[tuple[str, int]]:
    return [] if vlan is None else [("NDA_VLAN", vlan)]


@contextmanager
def _may_be(*numbers: int) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.errno not in numbers:
            raise
