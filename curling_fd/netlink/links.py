"""Network interfaces: found by name or index, listed."""

from __future__ import annotations

import errno

from attrs import fields, frozen
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from curling_fd.errors import NetlinkError
from curling_fd.netlink.socket import RTM_GETLINK, RouteSocket

IFF_UP = 0x1

#: Without the statistics, which are most of an answer: RTEXT_FILTER_SKIP_STATS.
_SKIP_STATISTICS = 1 << 3


@frozen
class Link:
    """An interface. `kind` is `tun` for a tap, `bridge`, ..., "" for hardware; `master` an index, or 0."""

    index: int
    name: str
    kind: str = ""
    alias: str = ""
    mtu: int = 0
    address: str = ""
    master: int = 0
    up: bool = False


def link(route: RouteSocket, which: str | int) -> Link:
    """The interface of that name or index.

    Raises:
        NetlinkError: ENODEV, there is none.
    """
    message = ifinfmsg()
    message["attrs"] = [("IFLA_EXT_MASK", _SKIP_STATISTICS)]
    if isinstance(which, int):
        message["index"] = which
        what = f"interface {which}"
    else:
        message["attrs"].append(("IFLA_IFNAME", which))
        what = f"the interface {which}"
    if isinstance(which, str) and not 0 < len(which.encode()) < 16:
        # The kernel's answer would be about the attribute.
        raise NetlinkError(what, errno.ENODEV, "no interface can have that name")
    (answer,) = route.ask(message, RTM_GETLINK, what=what)
    return link_of(answer)


def find_link(route: RouteSocket, which: str | int) -> Link | None:
    """Like link, but None when there is none."""
    try:
        return link(route, which)
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def links(route: RouteSocket) -> list[Link]:
    """All interfaces."""
    message = ifinfmsg()
    message["attrs"] = [("IFLA_EXT_MASK", _SKIP_STATISTICS)]
    return [link_of(answer) for answer in route.dump(message, RTM_GETLINK, what="the interfaces")]


@frozen
class LinkStatistics:
    """What an interface has counted."""

    rx_packets: int
    rx_dropped: int
    tx_packets: int
    tx_dropped: int


def statistics(route: RouteSocket, index: int) -> LinkStatistics:
    """The counters of an interface.

    Raises:
        NetlinkError: ENODEV, it is gone.
    """
    message = ifinfmsg()
    message["index"] = index
    (answer,) = route.ask(message, RTM_GETLINK, what=f"interface {index}")
    counted = answer.get_attr("IFLA_STATS64")
    return LinkStatistics(*(counted[field.name] for field in fields(LinkStatistics)))


def link_of(message: ifinfmsg) -> Link:
    """What an RTM_NEWLINK says."""
    information = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        kind=(information.get_attr("IFLA_INFO_KIND") or "") if information is not None else "",
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        address=message.get_attr("IFLA_ADDRESS") or "",
        master=message.get_attr("IFLA_MASTER") or 0,
        up=bool(message["flags"] & IFF_UP),
    )
