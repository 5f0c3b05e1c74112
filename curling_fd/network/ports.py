"""The taps of a VM: read on the host where it runs, made and put into place on the one it may come to.

A port is made before the standby's QEMU opens it, and stays down until the guest is about to run: a standby
that loads a checkpoint, be it as a rehearsal, announces its MACs by itself, and would turn switches to this
host; and what a tap that is up takes in meanwhile, the guest would be given in one go when it runs, long
out of date.

A tap that is there already is used as it is, but for the bridge if it is in none; it is left so in the end.
"""

from __future__ import annotations

import errno
import time

import attrs
from attrs import frozen

from curling_fd.errors import NetlinkError, NetworkConflict
from curling_fd.netlink.links import Link, find_link, link
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network import fdb, kernel, taps
from curling_fd.network.learn import Binding
from curling_fd.network.port import BRIDGE_FLAGS, DEFAULT_VLANS, Port, own_mac
from curling_fd.network.steps import BroughtUp, Joined, Ledger, MadeTap, Pointed, TakenDown

_TAP = 2  # IFF_TAP, as IFLA_TUN_TYPE
_NOBODY = 0xFFFF_FFFF

#: Seconds that a port is waited for. From up to forwarding it is milliseconds; with STP it is many seconds,
#: and the guest does not wait for that.
_FORWARDING_SECONDS = 0.3
_FORWARDING_LOOK = 0.001


@frozen
class _Bridge:
    index: int
    name: str
    filters: bool


def read_port(route: RouteSocket, name: str, macs: tuple[str, ...] = ()) -> Port:
    """What the tap `name` of this host is.

    Args:
        macs: of the NICs behind it.

    Raises:
        NetlinkError: ENODEV, there is none.
        NetworkConflict: it is no tap.
    """
    found = link(route, name)
    answer = kernel.describe(route, found.index, name)
    information = answer.get_attr("IFLA_LINKINFO")
    data = information.get_attr("IFLA_INFO_DATA") if information is not None else None
    if found.kind != "tun" or data is None or data.get_attr("IFLA_TUN_TYPE") != _TAP:
        raise NetworkConflict(
            name,
            "it is not a tap" + (f" but of the kind {found.kind}" if found.kind else ""),
            "Give the VM's NIC a tap ('-netdev tap,ifname=...').",
        )
    owner, group = data.get_attr("IFLA_TUN_OWNER"), data.get_attr("IFLA_TUN_GROUP")
    port = Port(
        name,
        mtu=found.mtu,
        macs=macs,
        owner=None if owner == _NOBODY else owner,
        group=None if group == _NOBODY else group,
        multi_queue=bool(data.get_attr("IFLA_TUN_MULTI_QUEUE")),
        queue_length=answer.get_attr("IFLA_TXQLEN") or 0,
    )
    bridge = _bridge_of(route, found)
    if bridge is None:
        return port
    slave = information.get_attr("IFLA_INFO_SLAVE_DATA")
    flags = {
        shown: bool(value)
        for name, shown in BRIDGE_FLAGS.items()
        if slave is not None and (value := slave.get_attr(f"IFLA_BRPORT_{name.upper()}")) is not None
    }
    vlans = kernel.vlans(route, found.index, found.name) if bridge.filters else None
    return attrs.evolve(port, bridge=bridge.name, flags=flags, vlans=vlans)


def make_port(route: RouteSocket, tun: int, port: Port, vm: str, ledger: Ledger) -> None:
    """Make the tap of `port` and put it into its bridge, down; or use the one that is there.

    Args:
        tun: descriptor of taps.open_tun, borrowed.
        port: `bridge` is this host's.
        vm: name of the VM, to mark the tap with.
        ledger: gets the steps; on an error they are still to be undone.

    Raises:
        NetlinkError: the kernel refused something.
        NetworkConflict: something else of that name is in the way.
    """
    there = find_link(route, port.name)
    if there is not None and there.alias != kernel.ALIAS + vm:
        _use_port(route, there, port, ledger)
        return
    if there is None:
        taps.make_tap(tun, port)
        there = link(route, port.name)
        ledger.done(MadeTap(port.name, there.index))
        kernel.set_link(route, there.index, port.name, ifalias=kernel.ALIAS + vm)
    else:
        # Ours, of a daemon that ended before it could remember it.
        ledger.done(MadeTap(port.name, there.index))
        kernel.set_link(route, there.index, port.name, up=False)
    index, name = there.index, port.name
    kernel.set_link(
        route, index, name, address=own_mac(port.macs, name), mtu=port.mtu, txqlen=port.queue_length
    )
    if port.bridge is None:
        return
    # The host itself has no business in the guest's network but through the bridge.
    kernel.without_own_address(route, index, name)
    bridge = _bridge(route, port.bridge, port)
    kernel.set_link(route, index, name, master=bridge.index)
    if port.flags:
        kernel.set_bridge_flags(route, index, name, port.flags)
    if bridge.filters and port.vlans is not None:
        there_already = kernel.vlans(route, index, name)
        unwanted = tuple(vlan for vlan in there_already if vlan not in port.vlans)
        kernel.set_vlans(route, index, name, unwanted, add=False)
        kernel.set_vlans(route, index, name, port.vlans, add=True)


def open_port(route: RouteSocket, port: Port, bindings: tuple[Binding, ...], ledger: Ledger) -> None:
    """Bring a port up, and have the bridge send to it what is for the guest.

    Args:
        bindings: of the guest, behind this port.

    Raises:
        NetlinkError: the interface has gone or been renamed; ...
        NetworkConflict: one of the guest's MACs is the host's own.
    """
    there = link(route, port.name)
    if not there.up:
        kernel.set_link(route, there.index, port.name, up=True)
        ledger.done(BroughtUp(port.name, there.index))
    bridge = _bridge_of(route, there)
    if bridge is None:
        return
    give_up = time.monotonic() + _FORWARDING_SECONDS
    while kernel.will_pass_frames(route, there.index, port.name) and time.monotonic() < give_up:
        time.sleep(_FORWARDING_LOOK)
    macs = [(mac, None) for mac in port.macs] + [(known.mac, known.vlan) for known in bindings]
    vlans = kernel.vlans(route, there.index, port.name) if bridge.filters else ()
    pvid = next((vlan.first for vlan in vlans if vlan.pvid), None)
    # A bridge that does not filter has one entry for a MAC, whatever the tag.
    ways = {(mac, (tag or pvid) if bridge.filters else None) for mac, tag in macs}
    for mac, id in sorted(ways, key=str):
        if not bridge.filters or any(vlan.first <= (id or 0) <= vlan.last for vlan in vlans):
            _point(route, bridge, there, mac, id, ledger)


def _point(
    route: RouteSocket, bridge: _Bridge, port: Link, mac: str, vlan: int | None, ledger: Ledger
) -> None:
    before = fdb.find(route, bridge.index, mac, vlan)
    if before is not None and before.port == port.index:
        return
    if before is not None and before.state & fdb.NUD_PERMANENT:
        raise NetworkConflict(
            f"the MAC {mac}",
            f"it is the guest's, and this host has it itself in {bridge.name}",
            "Give that interface of the host another MAC: 'bridge fdb show br "
            f"{bridge.name}' says which one it is.",
        )
    try:
        fdb.point(route, fdb.Entry(mac, vlan, port.index), port.name)
    except NetlinkError as error:
        # Without QEMU at the other end, and with the kernel's spanning tree for a while, the port passes
        # nothing yet. The bridge learns from the guest's first frame then.
        if error.errno != errno.EPERM or find_link(route, port.index) is None:
            raise
        return
    former = {} if before is None else {"before": before.port, "state": before.state}
    ledger.done(Pointed(port.name, port.index, mac, vlan, **former))


def _use_port(route: RouteSocket, there: Link, port: Port, ledger: Ledger) -> None:
    """Take a tap that the administrator has made."""
    made = read_port(route, port.name)
    if made.multi_queue != port.multi_queue:
        wanted, has = ("", "out") if port.multi_queue else ("out", "")
        raise NetworkConflict(
            port.name,
            f"it was made with{has} more than one queue, and the VM's QEMU opens it with{wanted}",
            f"Delete it ('ip link delete {port.name}'), and Curling makes it as on the primary.",
        )
    if made.bridge is None and port.bridge is not None:
        bridge = _bridge(route, port.bridge, port)
        kernel.set_link(route, there.index, port.name, master=bridge.index)
        ledger.done(Joined(port.name, there.index))
    if there.up:
        kernel.set_link(route, there.index, port.name, up=False)
        ledger.done(TakenDown(port.name, there.index))


def _bridge(route: RouteSocket, name: str, port: Port) -> _Bridge:
    """The bridge that a port is to be in.

    Raises:
        NetworkConflict: there is none, or none that can do for the port.
    """
    found = find_link(route, name)
    if found is None or found.kind != "bridge":
        problem = "there is no such interface" if found is None else "it is not a bridge"
        raise NetworkConflict(
            f"the bridge {name} for {port.name}",
            problem,
            "Name the right one as bridge in [network] of the VM's file on this host, or make it.",
        )
    bridge = _as_bridge(route, found)
    if not bridge.filters and port.vlans is not None and port.vlans != DEFAULT_VLANS:
        raise NetworkConflict(
            f"the bridge {name} for {port.name}",
            "it does not tell VLANs apart, and the port on the primary is in "
            + ", ".join(
                str(vlan.first) if vlan.first == vlan.last else f"{vlan.first}-{vlan.last}"
                for vlan in port.vlans
            ),
            f"Switch that on ('ip link set {name} type bridge vlan_filtering 1'), name another bridge in "
            "[network] of the VM's file, or make the tap yourself.",
        )
    return bridge


def _bridge_of(route: RouteSocket, port: Link) -> _Bridge | None:
    if not port.master:
        return None
    found = find_link(route, port.master)
    return _as_bridge(route, found) if found is not None and found.kind == "bridge" else None


def _as_bridge(route: RouteSocket, found: Link) -> _Bridge:
    information = kernel.describe(route, found.index, found.name).get_attr("IFLA_LINKINFO")
    data = information.get_attr("IFLA_INFO_DATA") if information is not None else None
    filters = bool(data.get_attr("IFLA_BR_VLAN_FILTERING")) if data is not None else False
    return _Bridge(found.index, found.name, filters)
