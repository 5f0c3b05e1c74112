"""Does somebody else on the network have an address that this host is about to take?

It is asked twice, in a fraction of a second, for all addresses at a time: RFC 5227 waits several seconds,
which a failover has not. What another station says of the address counts, be it an answer or a probe of its
own.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address

import trio

from curling_fd.errors import AddressConflict, NetlinkError
from curling_fd.network.packet_socket import PacketSocket
from curling_fd.network.packets import (
    ALL_NODES,
    Address,
    Arp,
    Discovery,
    Icmp,
    Operation,
    multicast_mac,
    parse,
    probe,
    solicitation,
    solicited_node,
)
from curling_fd.network.words import HostAddress

PROBES = 2
"""Questions for each address: one may be lost."""


async def detect(addresses: Sequence[HostAddress], patience: float) -> None:
    """Ask for `addresses` on their interfaces, and wait `patience` seconds for an answer.

    Raises:
        AddressConflict: the first one that somebody else has.
        NetlinkError: an interface cannot be asked on.
    """
    if not addresses or not patience:
        return
    conflicts: list[AddressConflict] = []
    with ExitStack() as stack:
        sockets: dict[str, PacketSocket] = {}
        for address in addresses:
            name = address.interface
            if name not in sockets:
                sockets[name] = PacketSocket(name, hear=True)
                stack.callback(sockets[name].close)
            if address.address.version == 6:
                sockets[name].join(multicast_mac(ALL_NODES))
                sockets[name].join(multicast_mac(solicited_node(address.address)))
        async with trio.open_nursery() as nursery:

            async def hear(name: str) -> None:
                wanted = {one.address for one in addresses if one.interface == name}
                conflicts.append(await _hear(name, sockets[name], wanted))
                nursery.cancel_scope.cancel()

            for name in sockets:
                nursery.start_soon(hear, name)
            for _ in range(PROBES):
                for address in addresses:
                    opened = sockets[address.interface]
                    opened.send(_question(opened.mac(), address.address))
                await trio.sleep(patience / PROBES)
            nursery.cancel_scope.cancel()
    if conflicts:
        raise conflicts[0]


def claimant(frame: bytes, wanted: Container[Address]) -> tuple[Address, str] | None:
    """Which of the `wanted` addresses the sender of `frame` has, or wants too; and its MAC."""
    claimed: Address | None = None
    mac = ""
    match parse(frame):
        case Arp() as arp:
            # A probe asks for an address, and comes from none.
            asks = arp.sender.is_unspecified and arp.operation is Operation.REQUEST
            claimed, mac = arp.target if asks else arp.sender, arp.sender_mac
        case Discovery(kind=Icmp.ADVERTISEMENT) as message:
            claimed, mac = message.target, message.link or message.source
        case Discovery() as message:
            claimed = message.target if message.sender.is_unspecified else message.sender
            mac = message.source
    return (claimed, mac) if claimed is not None and claimed in wanted else None


async def _hear(interface: str, opened: PacketSocket, wanted: Container[Address]) -> AddressConflict:
    own = opened.mac()
    while True:
        await trio.lowlevel.wait_readable(opened.socket)
        try:
            heard = opened.receive()
        except NetlinkError:
            # It went down or away. Whoever adds the address is told.
            await trio.sleep_forever()
        if heard is None or heard.leaving or heard.vlan is not None:
            continue
        found = claimant(heard.frame, wanted)
        if found is not None and found[1] != own:
            return AddressConflict(str(found[0]), interface, found[1])


def _question(mac: str, address: Address) -> bytes:
    return probe(mac, address) if isinstance(address, IPv4Address) else solicitation(mac, address)
