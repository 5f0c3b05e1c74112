"""Interfaces, addresses and routes as rtnetlink has them: what the steps are made of.

Sources: include/uapi/linux/rtnetlink.h, if_addr.h, if_link.h, if_bridge.h.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from curling_fd.errors import NetlinkError
from curling_fd.netlink.links import IFF_UP, link
from curling_fd.netlink.socket import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    RTM_SETLINK,
    RouteSocket,
)
from curling_fd.netlink.wire import NLM_F_CREATE, NLM_F_EXCL
from curling_fd.network.packets import Address
from curling_fd.network.port import BRIDGE_FLAGS, Vlan
from curling_fd.network.words import SCOPES, TYPES, HostAddress, Route

ALIAS = "curling: "
"""How the alias of a tap begins that we have made; the name of the VM follows."""

PROTOCOL = 0x43
"""Marks our routes (rtm_protocol) and addresses (IFA_PROTO, from Linux 5.18 on). `ip route` shows 67."""

_SKIP_STATISTICS = 1 << 3
_COMPRESSED_VLANS = 1 << 2

_VLAN_PVID, _VLAN_UNTAGGED, _VLAN_BEGIN, _VLAN_END = 0x2, 0x4, 0x8, 0x10

_NO_DETECTION = 0x02  # IFA_F_NODAD
_KEPT_FLAGS = 0x200  # IFA_F_NOPREFIXROUTE; the others say how an address is, not how it was added
_ONLINK = 4  # RTNH_F_ONLINK
_BY_KERNEL = 2  # RTPROT_KERNEL
_NO_ADDRESS = 1  # IN6_ADDR_GEN_MODE_NONE


#: BR_STATE_FORWARDING of linux/if_bridge.h.
_FORWARDING = 3


def interface(index: int) -> ifinfmsg:
    """A message about an interface."""
    message = ifinfmsg()
    message["index"] = index
    message["attrs"] = []
    return message


def describe(route: RouteSocket, index: int, name: str) -> ifinfmsg:
    """All that RTM_NEWLINK says about an interface, without statistics."""
    message = interface(index)
    message["attrs"] = [("IFLA_EXT_MASK", _SKIP_STATISTICS)]
    (answer,) = route.ask(message, RTM_GETLINK, what=f"interface {name}")
    return answer


def set_link(
    route: RouteSocket,
    index: int,
    name: str,
    *,
    up: bool | None = None,
    master: int | None = None,
    **values: Any,
) -> None:
    """Change an interface.

    Args:
        index, name: of the interface.
        up: bring it up or take it down.
        master: index of the bridge it is to be a port of, 0 for none.
        values: more of IFLA_*, by names in small letters.
    """
    message = interface(index)
    message["attrs"] = [(f"IFLA_{key.upper()}", value) for key, value in values.items()]
    if master is not None:
        message["attrs"].append(("IFLA_MASTER", master))
    if up is not None:
        message["flags"], message["change"] = (IFF_UP if up else 0), IFF_UP
    route.request(message, RTM_SETLINK, what=f"a change of interface {name}")


def without_own_address(route: RouteSocket, index: int, name: str) -> None:
    """Keep IPv6 from giving the interface an address of its own; nothing where IPv6 is off."""
    message = interface(index)
    inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _NO_ADDRESS)]}
    message["attrs"] = [("IFLA_AF_SPEC", {"attrs": [("AF_INET6", inet6)]})]
    try:
        route.request(message, RTM_SETLINK, what=f"a change of interface {name}")
    except NetlinkError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
            raise


# Bridge ports.


def set_bridge_flags(route: RouteSocket, index: int, name: str, flags: Mapping[str, bool]) -> None:
    """Set switches of a bridge port, by bridge(8)'s names."""
    own = {shown: kernel for kernel, shown in BRIDGE_FLAGS.items()}
    data = [(f"IFLA_BRPORT_{own[shown].upper()}", int(on)) for shown, on in flags.items()]
    message = interface(index)
    slave = [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", {"attrs": data})]
    message["attrs"] = [("IFLA_LINKINFO", {"attrs": slave})]
    route.request(message, RTM_NEWLINK, what=f"the flags of bridge port {name}")


def will_pass_frames(route: RouteSocket, index: int, name: str) -> bool:
    """Whether a bridge port that is up does not pass frames yet, though somebody is behind it."""
    answer = describe(route, index, name)
    if not answer.get_attr("IFLA_CARRIER"):
        return False
    information = answer.get_attr("IFLA_LINKINFO")
    data = information.get_attr("IFLA_INFO_SLAVE_DATA") if information is not None else None
    return data is not None and data.get_attr("IFLA_BRPORT_STATE") != _FORWARDING


def vlans(route: RouteSocket, index: int, name: str) -> tuple[Vlan, ...]:
    """The VLANs of a bridge port."""
    message = ifinfmsg()
    message["family"] = socket.AF_BRIDGE
    message["attrs"] = [("IFLA_EXT_MASK", _COMPRESSED_VLANS)]
    found: list[Vlan] = []
    for answer in route.dump(message, RTM_GETLINK, what=f"the VLANs of {name}"):
        spec = answer.get_attr("IFLA_AF_SPEC") if answer["index"] == index else None
        begin = 0
        for info in spec.get_attrs("IFLA_BRIDGE_VLAN_INFO") if spec is not None else ():
            flags, id = info["flags"], info["vid"]
            if flags & _VLAN_BEGIN:
                begin = id
                continue
            first = begin if flags & _VLAN_END else id
            found.append(Vlan(first, id, bool(flags & _VLAN_PVID), bool(flags & _VLAN_UNTAGGED)))
    return tuple(found)


def set_vlans(route: RouteSocket, index: int, name: str, wanted: Iterable[Vlan], *, add: bool) -> None:
    """Put a bridge port into VLANs, or take it out of them."""
    message = interface(index)
    message["family"] = socket.AF_BRIDGE
    infos: list[tuple[str, dict[str, int]]] = []
    for vlan in wanted:
        flags = (_VLAN_PVID if vlan.pvid else 0) | (_VLAN_UNTAGGED if vlan.untagged else 0)
        ends = ((vlan.first, _VLAN_BEGIN), (vlan.last, _VLAN_END))
        for id, end in ends if vlan.first != vlan.last else ((vlan.first, 0),):
            infos.append(("IFLA_BRIDGE_VLAN_INFO", {"vid": id, "flags": flags | end}))
    if infos:
        message["attrs"] = [("IFLA_AF_SPEC", {"attrs": infos})]
        route.request(message, RTM_SETLINK if add else RTM_DELLINK, what=f"the VLANs of bridge port {name}")


# Addresses.


def add_address(route: RouteSocket, address: HostAddress, index: int) -> None:
    """Give the host an address.

    Raises:
        NetlinkError: EEXIST, it has it on that interface already; ...
    """
    message = _address(address, index)
    if address.address.version == 6:
        # We have asked ourselves, and quicker: an address under detection cannot be used for a second.
        message["flags"] = _NO_DETECTION
    message["scope"] = SCOPES[address.scope or "global"]
    message["attrs"].append(("IFA_PROTO", PROTOCOL))
    if address.metric is not None:
        message["attrs"].append(("IFA_RT_PRIORITY", address.metric))
    if address.label is not None:
        message["attrs"].append(("IFA_LABEL", address.label))
    route.request(message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, what=f"the address {address}")


def delete_address(route: RouteSocket, address: HostAddress, index: int) -> None:
    """Take an address away from the host, and nothing else.

    With the last IPv4 address of an interface the kernel removes all routes over it, with the first of a
    network the others of that network (unless promote_secondaries is set), whoever added them. They are put
    back.
    """
    others = _of_interface(route, index) if address.address.version == 4 else []
    try:
        _delete_address(route, address, index)
    finally:
        left = [_fingerprint(message) for _, message in _of_interface(route, index)] if others else []
        for kind, message in others:
            own = kind == RTM_NEWADDR and message.get_attr("IFA_LOCAL") == str(address.address)
            if not own and _fingerprint(message) not in left:
                _put_back(route, kind, message)


def _delete_address(route: RouteSocket, address: HostAddress, index: int) -> None:
    message = _address(address, index)
    if address.label is not None:
        message["attrs"].append(("IFA_LABEL", address.label))
    route.request(message, RTM_DELADDR, what=f"the address {address}")


def address_holders(route: RouteSocket, address: Address) -> list[tuple[int, int, bool]]:
    """Where the host has `address`: the interface's index, the length of the prefix, whether it is ours."""
    message = ifaddrmsg()
    message["family"] = _family(address)
    message["attrs"] = []
    found = []
    for answer in route.dump(message, RTM_GETADDR, what="the addresses of this host"):
        own = answer.get_attr("IFA_LOCAL") or answer.get_attr("IFA_ADDRESS")
        if own == str(address):
            ours = answer.get_attr("IFA_PROTO") == PROTOCOL
            found.append((answer["index"], answer["prefixlen"], ours))
    return found


def _of_interface(route: RouteSocket, index: int) -> list[tuple[int, nlmsg]]:
    """The IPv4 addresses of an interface and then the routes over it, with the kind of the request for each.

    Those that the kernel makes of an address itself are left out.
    """
    addresses, routes = ifaddrmsg(), rtmsg()
    addresses["family"] = routes["family"] = socket.AF_INET
    found: list[tuple[int, nlmsg]] = []
    for message in route.dump(addresses, RTM_GETADDR, what="the addresses of this host"):
        if message["index"] == index:
            found.append((RTM_NEWADDR, message))
    for message in route.dump(routes, RTM_GETROUTE, what="the routes of this host"):
        hops = message.get_attr("RTA_MULTIPATH") or ()
        over = [message.get_attr("RTA_OIF"), *(hop["oif"] for hop in hops)]
        if index in over and message["proto"] != _BY_KERNEL:
            found.append((RTM_NEWROUTE, message))
    return found


def _fingerprint(message: nlmsg) -> str:
    """What tells an address or a route from others, as text."""
    if isinstance(message, ifaddrmsg):
        return f"{message['index']} {message.get_attr('IFA_LOCAL')}/{message['prefixlen']}"
    names = ("RTA_DST", "RTA_TABLE", "RTA_PRIORITY", "RTA_GATEWAY", "RTA_OIF")
    parts = [message["dst_len"], message["tos"], message["type"], *map(message.get_attr, names)]
    return " ".join(map(str, parts))


def _put_back(route: RouteSocket, kind: int, message: nlmsg) -> None:
    if kind == RTM_NEWADDR:
        what = f"to put back the address {message.get_attr('IFA_LOCAL')}"
        flags = message.get_attr("IFA_FLAGS") or message["flags"]
        message["flags"] = flags & _KEPT_FLAGS & 0xFF
        message["attrs"] = [one for one in message["attrs"] if one[0] != "IFA_FLAGS"]
        message["attrs"].append(("IFA_FLAGS", flags & _KEPT_FLAGS))
    else:
        what = f"to put back the route to {message.get_attr('RTA_DST') or 'default'}/{message['dst_len']}"
        message["flags"] &= _ONLINK
        message["attrs"] = [one for one in message["attrs"] if one[0] != "RTA_CACHEINFO"]
    route.request(message, kind, NLM_F_CREATE, what=what)


def _address(address: HostAddress, index: int) -> ifaddrmsg:
    message = ifaddrmsg()
    message["family"] = _family(address.address)
    message["prefixlen"] = address.prefix
    message["index"] = index
    message["attrs"] = [("IFA_LOCAL", str(address.address)), ("IFA_ADDRESS", str(address.address))]
    return message


# Routes.


def add_route(route: RouteSocket, wanted: Route) -> None:
    """Give the host a route.

    Raises:
        NetlinkError: EEXIST, there is one with that destination, metric and table; ENETUNREACH; ...
    """
    message = _route(route, wanted)
    message["flags"] = _ONLINK if wanted.onlink else 0
    message["scope"] = SCOPES["link" if wanted.gateway is None and wanted.kind == "unicast" else "global"]
    if wanted.destination.version == 6:
        message["scope"] = SCOPES["global"]
    route.request(message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, what=f"the route {wanted}")


def delete_route(route: RouteSocket, wanted: Route) -> None:
    """Take our route away from the host; one that differs in what was said of it is left."""
    message = _route(route, wanted)
    message["scope"] = 255  # RT_SCOPE_NOWHERE: any
    route.request(message, RTM_DELROUTE, what=f"the route {wanted}")


def has_route(route: RouteSocket, wanted: Route) -> bool:
    """Whether the host has this very route, and it is marked ours."""
    message = rtmsg()
    message["family"] = _family(wanted.destination.network_address)
    message["attrs"] = [("RTA_TABLE", wanted.table)]
    message["table"] = wanted.table if wanted.table < 256 else 0
    try:
        answers = route.dump(message, RTM_GETROUTE, what="the routes of this host")
    except NetlinkError as error:
        if error.errno == errno.ENOENT:  # no such table
            return False
        raise
    index = link(route, wanted.interface).index if wanted.interface is not None else None
    network = wanted.destination
    return any(
        answer["proto"] == PROTOCOL
        and answer["type"] == TYPES[wanted.kind]
        and answer["dst_len"] == network.prefixlen
        and (answer.get_attr("RTA_DST") or str(type(network.network_address)(0)))
        == str(network.network_address)
        and answer.get_attr("RTA_TABLE") == wanted.table
        and _metric(answer, network.version) == _metric_of(wanted)
        and answer.get_attr("RTA_GATEWAY") == (str(wanted.gateway) if wanted.gateway else None)
        and (index is None or answer.get_attr("RTA_OIF") == index)
        for answer in answers
    )


def _metric(answer: rtmsg, version: int) -> int:
    return answer.get_attr("RTA_PRIORITY") or 0


def _metric_of(wanted: Route) -> int:
    if wanted.metric:
        return wanted.metric
    return 0 if wanted.destination.version == 4 else 1024  # IP6_RT_PRIO_USER


def _route(route: RouteSocket, wanted: Route) -> rtmsg:
    message = rtmsg()
    network = wanted.destination
    message["family"] = _family(network.network_address)
    message["dst_len"] = network.prefixlen
    message["proto"] = PROTOCOL
    message["type"] = TYPES[wanted.kind]
    # A number above 255 goes into the attribute alone: RT_TABLE_UNSPEC.
    message["table"] = wanted.table if wanted.table < 256 else 0
    attributes: list[tuple[str, Any]] = [("RTA_TABLE", wanted.table)]
    if network.prefixlen:
        attributes.append(("RTA_DST", str(network.network_address)))
    if wanted.gateway is not None:
        attributes.append(("RTA_GATEWAY", str(wanted.gateway)))
    if wanted.interface is not None:
        attributes.append(("RTA_OIF", link(route, wanted.interface).index))
    if wanted.metric is not None:
        attributes.append(("RTA_PRIORITY", wanted.metric))
    if wanted.source is not None:
        attributes.append(("RTA_PREFSRC", str(wanted.source)))
    message["attrs"] = attributes
    return message


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
