"""Traffic control: the qdiscs and the filter that take a port's packets to a plug, as messages and as found.

    port, ingress ffff:  --matchall, mirred egress redirect-->  ifb, root 1: plug

Sources: include/uapi/linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h; net/sched/sch_plug.c. The bytes of
every message are pinned in tests/unit/test_traffic.py.
"""

from __future__ import annotations

import enum
import errno
import socket

from attrs import frozen
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from curling_fd.errors import NetlinkError
from curling_fd.netlink.socket import RTM_GETQDISC, RTM_GETTFILTER, RouteSocket
from curling_fd.netlink.wire import NLM_F_ECHO

ROOT = 0xFFFF_FFFF
INGRESS = 0xFFFF_FFF1
INGRESS_HANDLE = 0xFFFF_0000
#: Where a port's filters for what it receives are, as `tc filter ... ingress` says it.
_INGRESS_FILTERS = 0xFFFF_FFF2
PLUG_HANDLE = 0x0001_0000

#: A packet meets the filters of a port in the order of this number. Low, but not the lowest.
PRIORITY = 2
_FILTER_HANDLE = 1
_ETH_P_ALL = 3

_TC_ACT_STOLEN = 4
_EGRESS_REDIRECT = 1


class PlugAction(enum.IntEnum):
    """`action` of struct tc_plug_qopt {int action; __u32 limit}."""

    BUFFER = 0
    RELEASE_ONE = 1
    RELEASE_INDEFINITE = 2
    LIMIT = 3


@frozen
class Qdisc:
    """A qdisc of interface `index`. `packets` and `bytes` wait in it; `dropped` it had no room for."""

    index: int
    kind: str
    handle: int
    parent: int
    packets: int
    bytes: int
    dropped: int


@frozen
class Filter:
    """A filter at a port's ingress.

    `target` is the interface that it redirects to: 0 when that is gone, None when it does something else.
    """

    kind: str
    priority: int
    protocol: int
    handle: int
    target: int | None


def ingress_qdisc(port: int) -> tcmsg:
    """For RTM_NEWQDISC and RTM_DELQDISC: what lets a port have filters for what it receives."""
    return _message(port, INGRESS_HANDLE, INGRESS, [("TCA_KIND", "ingress")])


def plug_qdisc(interface: int, action: PlugAction, limit: int = 0) -> tcmsg:
    """For RTM_NEWQDISC, to make a plug (then `action` is ignored, and it is closed) or to change it.

    Args:
        interface: its index.
        action: what to do.
        limit: in bytes: how much it holds, when it is made and for LIMIT.
    """
    # The dictionary is struct tc_plug_qopt, field by field; pyroute2's names of actions are not used, for it
    # takes each that it does not know for BUFFER.
    options = {"action": int(action), "limit": limit}
    return _message(interface, PLUG_HANDLE, ROOT, [("TCA_KIND", "plug"), ("TCA_OPTIONS", options)])


def redirect(port: int, interface: int) -> tcmsg:
    """For RTM_NEWTFILTER: everything that the port receives goes to `interface` as if it was sent there."""
    parameters = {"action": _TC_ACT_STOLEN, "eaction": _EGRESS_REDIRECT, "ifindex": interface}
    mirred = [
        ("TCA_ACT_KIND", "mirred"),
        ("TCA_ACT_OPTIONS", {"attrs": [("TCA_MIRRED_PARMS", parameters)]}),
    ]
    actions = {"attrs": [("TCA_ACT_PRIO_1", {"attrs": mirred})]}
    message = _message(
        port,
        _FILTER_HANDLE,
        _INGRESS_FILTERS,
        [("TCA_KIND", "matchall"), ("TCA_OPTIONS", {"attrs": [("TCA_MATCHALL_ACT", actions)]})],
    )
    message["info"] = PRIORITY << 16 | socket.htons(_ETH_P_ALL)
    return message


def found_filter(port: int, found: Filter) -> tcmsg:
    """For RTM_DELTFILTER: that filter at the port's ingress."""
    message = _message(port, found.handle, _INGRESS_FILTERS, [("TCA_KIND", found.kind)])
    message["info"] = found.priority << 16 | found.protocol
    return message


def root_qdisc_question(interface: int) -> tcmsg:
    """For RTM_GETQDISC: the root qdisc."""
    return _message(interface, 0, ROOT, [])


def root_qdisc(route: RouteSocket, interface: int, *, what: str) -> Qdisc:
    """The root qdisc of an interface as it is now; one of kind "" and empty when it has none of its own.

    Raises:
        NetlinkError: ENODEV, there is no such interface.
    """
    # Kernels before 6.7 answer only who wants an echo.
    for answer in route.ask(root_qdisc_question(interface), RTM_GETQDISC, NLM_F_ECHO, what=what):
        return qdisc_of(answer)
    return Qdisc(interface, "", 0, ROOT, 0, 0, 0)


def ingress_of(route: RouteSocket, port: int) -> Qdisc | None:
    """The port's qdisc of kind `ingress` or `clsact`, if it has one."""
    for answer in route.dump(tcmsg(), RTM_GETQDISC, what="the qdiscs"):
        if answer["index"] == port and answer["parent"] == INGRESS:
            return qdisc_of(answer)
    return None


def ports_with_ingress(route: RouteSocket) -> list[int]:
    """The indexes of all ports that may have filters for what they receive."""
    answers = route.dump(tcmsg(), RTM_GETQDISC, what="the qdiscs")
    return [answer["index"] for answer in answers if answer["parent"] == INGRESS]


def ingress_filters(route: RouteSocket, port: int) -> list[Filter]:
    """The filters for what a port receives; none when there is no such port."""
    question = _message(port, 0, _INGRESS_FILTERS, [])
    try:
        answers = route.dump(question, RTM_GETTFILTER, what=f"the filters of interface {port}")
    except NetlinkError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ENOENT):
            return []
        raise
    # Each set of filters is told first by itself, with no handle.
    return [filter_of(answer) for answer in answers if answer["handle"]]


def qdisc_of(message: tcmsg) -> Qdisc:
    """What an RTM_NEWQDISC says."""
    statistics = message.get_attr("TCA_STATS2")
    queue = statistics.get_attr("TCA_STATS_QUEUE") if statistics is not None else None
    return Qdisc(
        index=message["index"],
        kind=message.get_attr("TCA_KIND") or "",
        handle=message["handle"],
        parent=message["parent"],
        packets=queue["qlen"] if queue else 0,
        bytes=queue["backlog"] if queue else 0,
        dropped=queue["drops"] if queue else 0,
    )


def filter_of(message: tcmsg) -> Filter:
    """What an RTM_NEWTFILTER says."""
    kind = message.get_attr("TCA_KIND") or ""
    return Filter(
        kind=kind,
        priority=message["info"] >> 16,
        protocol=message["info"] & 0xFFFF,
        handle=message["handle"],
        target=_target(message) if kind == "matchall" else None,
    )


def _target(message: tcmsg) -> int | None:
    parameters = message.get_nested(
        "TCA_OPTIONS", "TCA_MATCHALL_ACT", "TCA_ACT_PRIO_1", "TCA_ACT_OPTIONS", "TCA_MIRRED_PARMS"
    )
    if parameters is None or parameters["eaction"] != _EGRESS_REDIRECT:
        return None
    return int(parameters["ifindex"])


def _message(interface: int, handle: int, parent: int, attributes: list[tuple[str, object]]) -> tcmsg:
    message = tcmsg()
    message["index"] = interface
    message["handle"] = handle
    message["parent"] = parent
    message["attrs"] = attributes
    return message
