"""What a plug consists of in the kernel: how it is put into place, found again and taken away, for one port.

    guest -> port's ingress --redirect--> ifb's queue: plug -> ifb -> port again, behind its ingress -> bridge

The ifb is ours, its alias says whose packets it holds. The plug is opened before anything is redirected to
it, so nothing is lost or held by putting it there.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence

import xxhash
from attrs import evolve, frozen
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from curling_fd.errors import ModuleMissing, NetlinkError, OutputError, PortTaken
from curling_fd.netlink.links import IFF_UP, find_link, link, links, statistics
from curling_fd.netlink.socket import (
    RTM_DELLINK,
    RTM_DELQDISC,
    RTM_DELTFILTER,
    RTM_NEWLINK,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    RouteSocket,
    encode,
)
from curling_fd.netlink.traffic import (
    PRIORITY,
    PlugAction,
    found_filter,
    ingress_filters,
    ingress_of,
    ingress_qdisc,
    plug_qdisc,
    ports_with_ingress,
    redirect,
    root_qdisc,
)
from curling_fd.netlink.wire import NLM_F_CREATE, NLM_F_EXCL

_ALIAS = "curling:"
_NAME = "plug-"
_NAME_BYTES = 15

#: Less than IPv6 asks for: the kernel gives it no address and sends nothing of its own through the plug.
#: Packets that are redirected are not measured by it.
_MTU = 1000

#: Packets on their way through an ifb before its queue has to wait; its own 32 are few for a large release.
_TRANSIT = 1000

_NEW = NLM_F_CREATE | NLM_F_EXCL

#: What the kernel says of an object that is not there (any more).
_GONE = (errno.ENODEV, errno.ENOENT, errno.EINVAL, errno.ENXIO)


@frozen
class Placement:
    """The pieces for one port.

    Attributes:
        port, port_index: the tap; "" and 0 when there is no port any more.
        interface, index: the ifb.
        has_qdisc: the port's ingress qdisc is ours.
    """

    port: str
    port_index: int
    interface: str
    index: int
    has_qdisc: bool = False


@frozen
class Leftover:
    """What a daemon that is gone left of a hold for `vm`: packets are still held there.

    Attributes:
        dropped: it had thrown away what it held.
        complete: it holds; else a piece is missing, and it can only be dropped and detached.
    """

    vm: str
    placements: tuple[Placement, ...]
    dropped: bool
    complete: bool


def interface_name(port: str) -> str:
    """The name of the ifb for a port, the same each time; at most 15 bytes."""
    name = f"{_NAME}{port}"
    if len(name.encode()) <= _NAME_BYTES:
        return name
    return f"{_NAME}{xxhash.xxh3_64_hexdigest(port.encode())[: _NAME_BYTES - len(_NAME)]}"


def examine(route: RouteSocket, port: str) -> int:
    """The index of a port that has room for a plug.

    Raises:
        PortTaken: another program has put a qdisc there.
        OutputError: there is no such port.
    """
    with _said_of(port):
        index = link(route, port).index
        found = ingress_of(route, index)
        if found is not None:
            kinds = sorted({each.kind for each in ingress_filters(route, index)})
            why = f"with filters of kind {', '.join(kinds)}" if kinds else "without filters"
            raise PortTaken(port, why, found.kind)
        return index


def make(route: RouteSocket, vm: str, port: str, port_index: int, limit: int) -> Placement:
    """An ifb with an open plug, to which nothing is redirected yet. Nothing is left of it when it fails.

    Args:
        limit: bytes that it holds.

    Raises:
        ModuleMissing, OutputError
    """
    name = interface_name(port)
    with _said_of(port):
        there = find_link(route, name)
    if there is not None:
        whose = f", of {there.alias.removeprefix(_ALIAS)}" if there.alias.startswith(_ALIAS) else ""
        raise OutputError(port, f"an interface {name} is there already{whose}")
    message = ifinfmsg()
    message["attrs"] = [
        ("IFLA_IFNAME", name),
        ("IFLA_MTU", _MTU),
        ("IFLA_TXQLEN", _TRANSIT),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "ifb")]}),
    ]
    with _said_of(port, "ifb", errno.EOPNOTSUPP):
        route.request(message, RTM_NEWLINK, _NEW, what=f"the interface {name}")
    with _said_of(port):
        index = link(route, name).index
    placement = Placement(port, port_index, name, index)
    try:
        with _said_of(port):
            message = ifinfmsg()
            message["index"] = index
            message["attrs"] = [("IFLA_IFALIAS", f"{_ALIAS}{vm}")]
            route.request(message, RTM_NEWLINK, what=f"the alias of {name}")
        with _said_of(port, "sch_plug", errno.ENOENT):
            plug = plug_qdisc(index, PlugAction.BUFFER, limit)
            route.request(plug, RTM_NEWQDISC, _NEW, what=f"the qdisc plug on {name}")
        with _said_of(port):
            # A new plug is closed.
            route.send(plug_packet(placement, PlugAction.RELEASE_INDEFINITE), what=f"the plug on {name}")
            _set_up(route, placement, True)
    except BaseException:
        with contextlib.suppress(NetlinkError):
            _delete_interface(route, placement)
        raise
    return placement


def lead_in(route: RouteSocket, placement: Placement) -> Placement:
    """Redirect what the port receives. Nothing is left of it when it fails.

    Raises:
        ModuleMissing, OutputError
    """
    port = placement.port
    qdisc, redirection = f"the qdisc ingress on {port}", f"the filter on {port}"
    packets = [
        (encode(ingress_qdisc(placement.port_index), RTM_NEWQDISC, _NEW), qdisc),
        (encode(redirect(placement.port_index, placement.index), RTM_NEWTFILTER, _NEW), redirection),
    ]
    # In one go: a qdisc without the filter could not be told from somebody else's later.
    errors = route.send_each(packets)
    if errors == [None, None]:
        return evolve(placement, has_qdisc=True)
    placement = evolve(placement, has_qdisc=errors[0] is None)
    with contextlib.suppress(NetlinkError):
        lead_out(route, placement)
        _delete_qdisc(route, placement)
    first, second = errors
    with _said_of(port, "sch_ingress", errno.ENOENT):
        if first is not None:
            raise first
    module = "act_mirred" if second is not None and "action" in second.words else "cls_matchall"
    with _said_of(port, module, errno.ENOENT):
        assert second is not None
        raise second


def plug_packet(placement: Placement, action: PlugAction, limit: int = 0) -> bytes:
    """The request, ready to be sent, that changes the plug."""
    return encode(plug_qdisc(placement.index, action, limit), RTM_NEWQDISC)


def let_out(route: RouteSocket, placement: Placement) -> None:
    """Open the plug, if it is there."""
    what = f"the plug on {placement.interface}"
    with _tolerant():
        if root_qdisc(route, placement.index, what=what).kind == "plug":
            route.send(plug_packet(placement, PlugAction.RELEASE_INDEFINITE), what=what)


def in_transit(route: RouteSocket, placement: Placement) -> int:
    """Packets that are in the plug or in the ifb behind it; 0 when it is gone."""
    try:
        waiting = root_qdisc(route, placement.index, what=f"the plug on {placement.interface}").packets
        counted = statistics(route, placement.index)
    except NetlinkError as error:
        if error.errno in _GONE:
            return 0
        raise
    # An ifb counts as received what its queue gives it, and as sent what it has given back to the port.
    return waiting + counted.rx_packets - counted.rx_dropped - counted.tx_packets


def throw_away(route: RouteSocket, placement: Placement) -> None:
    """Nothing that is held leaves any more, nor what comes.

    An interface that goes down empties its queue without sending it, and while it is down the redirection
    drops each packet it takes: there is no moment in between. So both stay in place.
    """
    with _tolerant():
        _set_up(route, placement, False)


def lead_out(route: RouteSocket, placement: Placement) -> None:
    """What the port receives goes its own way again."""
    for found in ingress_filters(route, placement.port_index) if placement.port_index else ():
        # One that leads nowhere is ours too: our interface was deleted by somebody.
        if found.priority == PRIORITY and found.target in (placement.index, 0):
            with _tolerant():
                message = found_filter(placement.port_index, found)
                route.request(message, RTM_DELTFILTER, what=f"the filter on {placement.port}")


def remove(route: RouteSocket, placement: Placement) -> None:
    """Take away the ifb, with whatever is in it, and the port's qdisc unless others use it by now."""
    with _tolerant():
        _delete_qdisc(route, placement)
    with _tolerant():
        _delete_interface(route, placement)


def settle() -> None:
    """Wait until nobody works any more with the filters as they were before: about 10 ms."""
    # There is no call for it, but closing a packet socket waits for just that (an RCU grace period).
    with contextlib.suppress(OSError):
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(3)).close()


def leftovers(route: RouteSocket, vms: Sequence[str] | None = None) -> list[Leftover]:
    """What daemons that are gone left, by the aliases of our ifbs: of all VMs, or of these."""
    ours = [each for each in links(route) if each.kind == "ifb" and each.alias.startswith(_ALIAS)]
    if not ours:
        return []
    redirected = {
        found.target: port
        for port in ports_with_ingress(route)
        for found in ingress_filters(route, port)
        if found.target
    }
    found: dict[str, list[tuple[Placement, bool, bool]]] = {}
    for each in ours:
        port_index = redirected.get(each.index, 0)
        port = find_link(route, port_index) if port_index else None
        kind = root_qdisc(route, each.index, what=f"the qdisc of {each.name}").kind
        placement = Placement(port.name if port else "", port_index, each.name, each.index, port is not None)
        vm = each.alias.removeprefix(_ALIAS)
        if vms is None or vm in vms:
            complete = port is not None and kind == "plug"
            found.setdefault(vm, []).append((placement, each.up, complete))
    return [
        Leftover(
            vm,
            tuple(placement for placement, _, _ in pieces),
            dropped=not any(up for _, up, _ in pieces),
            complete=all(complete and up for _, up, complete in pieces),
        )
        for vm, pieces in sorted(found.items())
    ]


def _set_up(route: RouteSocket, placement: Placement, up: bool) -> None:
    message = ifinfmsg()
    message["index"] = placement.index
    message["flags"] = IFF_UP if up else 0
    message["change"] = IFF_UP
    route.request(message, RTM_NEWLINK, what=f"the state of {placement.interface}")


def _delete_interface(route: RouteSocket, placement: Placement) -> None:
    message = ifinfmsg()
    message["index"] = placement.index
    route.request(message, RTM_DELLINK, what=f"the interface {placement.interface}")


def _delete_qdisc(route: RouteSocket, placement: Placement) -> None:
    if placement.has_qdisc and not ingress_filters(route, placement.port_index):
        message = ingress_qdisc(placement.port_index)
        route.request(message, RTM_DELQDISC, what=f"the qdisc ingress on {placement.port}")


@contextlib.contextmanager
def _said_of(port: str, module: str = "", without: int = 0) -> Iterator[None]:
    """The kernel's refusals in here are about `port`; with the errno `without` it lacks `module`."""
    try:
        yield
    except NetlinkError as error:
        if error.errno == without:
            raise ModuleMissing(port, error.words, module) from error
        raise OutputError(port, f"{error.what}: {error.words}") from error


@contextlib.contextmanager
def _tolerant() -> Iterator[None]:
    """What is gone need not be taken away."""
    try:
        yield
    except NetlinkError as error:
        if error.errno not in _GONE:
            raise
