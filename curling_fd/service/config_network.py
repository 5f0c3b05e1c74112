"""The table [network] of a VM's file: what the network is to know when the VM comes to this host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Generic, TypeVar

from attrs import frozen

from curling_fd.network.plan import Plan
from curling_fd.network.port import is_name
from curling_fd.network.words import (
    GuestAddress,
    HostAddress,
    Route,
    read_guest_address,
    read_host_address,
    read_route,
)
from curling_fd.service.config_keys import Duration, Flag, TextTable, key, show

T = TypeVar("T")

MOST_ROUNDS = 32


@frozen
class InterfaceName:
    """The name of a network interface."""

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not is_name(value):
            raise ValueError(f"{show(value)} is not the name of an interface: 1 to 15 letters")
        return value

    def describe(self) -> str:
        return "name of an interface, 1 to 15 letters"


@frozen
class InterfaceTable:
    """A table of names of interfaces by names of interfaces."""

    def read(self, value: Any) -> Mapping[str, str]:
        read = TextTable("bridges").read(value)
        return {InterfaceName().read(name): InterfaceName().read(own) for name, own in read.items()}

    def describe(self) -> str:
        return "table of the primary's names to this host's"


@frozen
class Lines(Generic[T]):
    """A list of text, each element in the words of ip(8)."""

    what: str
    form: str
    reader: Callable[[str], T]

    def read(self, value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{show(value)} is not a list of {self.what}")
        read: list[T] = []
        for element in value:
            if not isinstance(element, str):
                raise ValueError(f'{show(element)} is not text like "{self.form}"')
            one = self.reader(element)
            if one in read:
                raise ValueError(f"{one} is there twice")
            read.append(one)
        return tuple(read)

    def describe(self) -> str:
        return f'list of {self.what} like "{self.form}"'


@frozen
class Schedule:
    """A list of durations, each later than the one before."""

    limit: Duration

    def read(self, value: Any) -> tuple[float, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{show(value)} is not a list of durations")
        if len(value) > MOST_ROUNDS:
            raise ValueError(f"has {len(value)} durations; at most {MOST_ROUNDS} can be")
        read = tuple(map(self.limit.read, value))
        for number, (one, two) in enumerate(pairwise(read), 1):
            if two <= one:
                raise ValueError(f"{value[number]} is not later than {value[number - 1]} before it")
        return read

    def describe(self) -> str:
        return f"list of durations that rise, at most {MOST_ROUNDS}, each a {self.limit.describe()}"


@frozen
class NetworkConfig:
    """The table [network]."""

    bridge: str | None = key(
        InterfaceName(),
        None,
        "The bridge on this host that the VM's taps are put into. All of them; where that is not so, see "
        "bridges. A tap that is in a bridge already stays there.",
        shown="the one of the same name as on the primary",
    )
    bridges: Mapping[str, str] = key(
        InterfaceTable(),
        {},
        "The same for a VM with taps in several bridges: what each bridge of the primary is called here.",
    )
    addresses: tuple[GuestAddress, ...] = key(
        Lines("addresses", "198.51.100.9 [mac 52:54:00:12:34:56] [vlan 10]", read_guest_address),
        [],
        "The guest's own addresses. They are announced after a failover, beside those that the guest was "
        "seen using. mac says which NIC has it and is needed only when there are several; vlan is the tag "
        "that the guest itself puts on its frames.",
    )
    learn: bool = key(
        Flag(),
        True,
        "Learn the guest's addresses from the ARP and IPv6 neighbour discovery that it sends.",
    )
    host_addresses: tuple[HostAddress, ...] = key(
        Lines(
            "addresses", "192.0.2.80/24 dev br0 [metric 50] [scope link] [label br0:vip]", read_host_address
        ),
        [],
        "Addresses that this host is to have as long as the VM runs here, for one a gateway's or a "
        "service's that is forwarded to the VM. They are added in this order before the guest runs, and "
        "announced; removed in reverse when the VM leaves. One that somebody else has added here is refused.",
    )
    routes: tuple[Route, ...] = key(
        Lines(
            "routes",
            "10.9.0.0/16 via 192.0.2.9 [dev br0] [metric 50] [table 100] [src 192.0.2.80] [onlink]",
            read_route,
        ),
        [],
        "Routes that this host is to have as long as the VM runs here, in the words of `ip route add`; also "
        "blackhole, unreachable and prohibit in front. Added in this order after the addresses, removed in "
        "reverse. A route that somebody else has added here is refused and never replaced.",
    )
    duplicate_address_detection: float = key(
        Duration(0, 5),
        "150ms",
        "How long to wait for somebody else on the network to say that it has one of host_addresses, before "
        "this host takes them. It is asked for on the way to a running guest, once for all; 0s: it is not "
        "asked.",
    )
    announce: tuple[float, ...] = key(
        Schedule(Duration(0, 60)),
        ["0ms", "50ms", "150ms", "350ms", "750ms", "1.5s", "3s"],
        "When, after the guest runs here, switches and neighbours are told where its addresses are now. "
        "Packets get lost, and a switch's port may need time before it passes any. An empty list: nobody is "
        "told, but for what QEMU says by itself.",
    )

    def plan(self) -> Plan:
        """The same for the rooms below."""
        return Plan(
            bridge=self.bridge,
            bridges=self.bridges,
            addresses=self.addresses,
            host_addresses=self.host_addresses,
            routes=self.routes,
            patience=self.duplicate_address_detection,
            schedule=self.announce,
        )
