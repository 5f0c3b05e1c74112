"""Addresses and routes of the host that come and go with a VM.

Added in the order of the VM's file, addresses first. One that is there already is ours, of an attempt before,
or somebody else's: then it is refused, and nothing of theirs is changed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from curling_fd.errors import NetlinkError, NetworkConflict
from curling_fd.netlink.links import find_link, link
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network import kernel
from curling_fd.network.steps import AddedAddress, AddedRoute, Ledger
from curling_fd.network.words import HostAddress, Route

_REMEDY = (
    "Have whoever has added it remove it, or take it out of [network] of the VM's file: only one of both may "
    "look after it."
)


def missing_addresses(route: RouteSocket, wanted: Iterable[HostAddress], ledger: Ledger) -> list[HostAddress]:
    """Those of `wanted` that the host does not have yet.

    Raises:
        NetlinkError: ENODEV, an interface is not there.
        NetworkConflict: the host has one that is not ours.
    """
    missing: list[HostAddress] = []
    for address in wanted:
        index = link(route, address.interface).index
        holders = kernel.address_holders(route, address.address)
        step = AddedAddress(str(address), index)
        for holder, prefix, marked in holders:
            if holder == index and prefix == address.prefix and (marked or step in ledger):
                break
            interface = find_link(route, holder)
            name = interface.name if interface is not None else f"interface {holder}"
            raise NetworkConflict(
                f"the address {address}", f"{name} has it, and it is not Curling's", _REMEDY
            )
        else:
            missing.append(address)
            continue
        ledger.done(step)
    return missing


def add_addresses(route: RouteSocket, wanted: Iterable[HostAddress], ledger: Ledger) -> None:
    """Give the host addresses.

    Raises:
        NetlinkError, NetworkConflict: the rest was not added; what was is in the ledger.
    """
    for address in missing_addresses(route, wanted, ledger):
        index = link(route, address.interface).index
        try:
            kernel.add_address(route, address, index)
        except NetlinkError as error:
            if error.errno == errno.EEXIST:
                raise NetworkConflict(
                    f"the address {address}", "somebody else has just added it", _REMEDY
                ) from None
            raise
        ledger.done(AddedAddress(str(address), index))


def add_routes(route: RouteSocket, wanted: Iterable[Route], ledger: Ledger) -> None:
    """Give the host routes.

    Raises:
        NetlinkError, NetworkConflict: the rest was not added; what was is in the ledger.
    """
    for one in wanted:
        step = AddedRoute(str(one))
        try:
            kernel.add_route(route, one)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            if step not in ledger and not kernel.has_route(route, one):
                raise NetworkConflict(
                    f"the route {one}",
                    "there is another to that destination with the same metric and table",
                    _REMEDY + " A metric of its own lets both be.",
                ) from None
        ledger.done(step)
