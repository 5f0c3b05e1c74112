"""Which addresses a guest has, learned from what it says itself in ARP and neighbour discovery.

Only claims count: an ARP message whose sender is the frame's own, a solicitation from an address in use, an
advertisement that overrides. Probes and duplicate address detection are about addresses nobody has yet; a
frame that speaks for another MAC, or an advertisement that does not override (a proxy's, an anycast
address's: RFC 4861 7.2.8), is about addresses of others.

What is learned travels to the backup as `encode` writes it: a list of [mac, address, vlan or 0, router].
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any

from attrs import define, field, frozen

from curling_fd.network.packets import Address, Arp, Discovery, Icmp, is_mac, parse

MOST = 256
"""Addresses that are remembered of one guest. A guest that has more keeps those it used last."""

_LIMITED_BROADCAST = IPv4Address("255.255.255.255")


@frozen
class Binding:
    """`address` is at `mac`, in frames with the tag `vlan`; `router`: who has it called itself one."""

    mac: str
    address: Address
    vlan: int | None = None
    router: bool = False


@define
class Learned:
    """The addresses of one guest.

    Attributes:
        changes: rises whenever what is known changes, so that it need not be compared to be sent.
    """

    changes: int = 0
    _known: dict[tuple[int | None, Address], Binding] = field(factory=dict)

    @classmethod
    def of(cls, bindings: Iterable[Binding]) -> Learned:
        """Begin with what was known before, the newest last."""
        learned = cls()
        for binding in bindings:
            learned._add(binding)
        learned.changes = 0
        return learned

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """What is known; what was heard last is last."""
        return tuple(self._known.values())

    def observe(self, frame: bytes, vlan: int | None = None) -> bool:
        """Take in a frame that the guest sent; whether something was learned from it.

        Args:
            vlan: the frame's tag, where whoever received it took it out.
        """
        before = self.changes
        match parse(frame, vlan):
            case Arp() as arp:
                if arp.sender_mac == arp.source:
                    self._claim(arp.source, arp.sender, arp.vlan)
            case Discovery() as message if message.link in (None, message.source):
                self._discovered(message)
        return self.changes != before

    def overhear(self, frame: bytes, vlan: int | None = None) -> bool:
        """Take in a frame that others sent: an address they claim has moved; whether one was forgotten."""
        match parse(frame, vlan):
            case Arp() as arp:
                return self._forget(arp.sender_mac, arp.sender, arp.vlan)
            case Discovery(kind=Icmp.ADVERTISEMENT, override=True, target=IPv6Address() as target) as message:
                return self._forget(message.link or message.source, target, message.vlan)
            case Discovery(kind=Icmp.SOLICITATION | Icmp.ROUTER_ADVERTISEMENT) as message:
                return self._forget(message.link or message.source, message.sender, message.vlan)
        return False

    def encode(self) -> list[list[Any]]:
        """Write it for JSON."""
        return [[known.mac, str(known.address), known.vlan or 0, known.router] for known in self.bindings]

    def _discovered(self, message: Discovery) -> None:
        if message.kind is Icmp.ADVERTISEMENT:
            self._set_router(message.source, message.vlan, message.router)
            if message.override and message.target is not None:
                self._claim(message.source, message.target, message.vlan, message.router)
            return
        if message.kind is Icmp.ROUTER_ADVERTISEMENT:
            self._set_router(message.source, message.vlan, True)
        self._claim(message.source, message.sender, message.vlan, message.router)

    def _claim(self, mac: str, address: Address, vlan: int | None, router: bool = False) -> None:
        # A solicitation does not say whether it comes from a router, but others of the same MAC may have.
        router = router or any(
            known.router for known in self._known.values() if (known.mac, known.vlan) == (mac, vlan)
        )
        if is_mac(mac) and is_of_a_station(address):
            self._add(Binding(mac, address, vlan, router))

    def _add(self, binding: Binding) -> None:
        key = binding.vlan, binding.address
        if self._known.pop(key, None) != binding:
            self.changes += 1
        self._known[key] = binding
        if len(self._known) > MOST:
            del self._known[next(iter(self._known))]

    def _set_router(self, mac: str, vlan: int | None, router: bool) -> None:
        for key, known in self._known.items():
            if (known.mac, known.vlan) == (mac, vlan) and known.router != router:
                self._known[key] = Binding(mac, known.address, vlan, router)
                self.changes += 1

    def _forget(self, mac: str, address: Address, vlan: int | None) -> bool:
        known = self._known.get((vlan, address))
        if known is None or known.mac == mac:
            return False
        del self._known[vlan, address]
        self.changes += 1
        return True


def decode(value: object) -> tuple[Binding, ...]:
    """Read what `Learned.encode` wrote on another host.

    Raises:
        ValueError: it is not that; the message says where.
    """
    if not isinstance(value, list) or len(value) > MOST:
        raise ValueError(f"the guest's addresses are not a list of at most {MOST}")
    return tuple(map(_decode_binding, value))


def read_address(text: str) -> Address:
    """Read an IPv4 or IPv6 address, without a zone.

    Raises:
        ValueError: it is none.
    """
    try:
        return IPv4Address(text)
    except AddressValueError:
        address = IPv6Address(text)
        if address.scope_id is not None:
            raise ValueError(f"{text!r} names a zone") from None
        return address


def is_of_a_station(address: Address) -> bool:
    """Whether one station of a network can have `address`."""
    return not (
        address.is_unspecified or address.is_multicast or address.is_loopback or address == _LIMITED_BROADCAST
    )


def _decode_binding(value: object) -> Binding:
    match value:
        case [str(mac), str(address), int(vlan), bool(router)] if (
            is_mac(mac) and 0 <= vlan <= 4094 and not isinstance(vlan, bool)
        ):
            try:
                read = read_address(address)
            except ValueError:
                pass
            else:
                if is_of_a_station(read):
                    return Binding(mac, read, vlan or None, router)
    raise ValueError(f"{str(value)[:80]} is not an address of a guest")
