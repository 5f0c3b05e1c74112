"""Addresses and routes in the words of ip(8) and keepalived.conf(5), as a VM's file has them.

    host address    192.0.2.80/24 dev br0 [metric N] [scope global|link|host] [label NAME]
    route           10.9.0.0/16 [via 192.0.2.9] [dev NAME] [metric N] [table N|main|default] [src A] [onlink]
    guest address   198.51.100.9 [mac 52:54:00:12:34:56] [vlan N]

All readers raise ValueError with a clause that says what is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import pairwise

from attrs import frozen

from curling_fd.network.learn import is_of_a_station, read_address
from curling_fd.network.packets import Address, is_mac
from curling_fd.network.port import is_name

Network = IPv4Network | IPv6Network

MAIN_TABLE = 254
TABLES = {"main": MAIN_TABLE, "default": 253}
"""Routing tables that have a name everywhere; local is the kernel's own."""

LOCAL_TABLE = 255
SCOPES = {"global": 0, "link": 253, "host": 254}
TYPES = {"unicast": 1, "blackhole": 6, "unreachable": 7, "prohibit": 8}
"""Numbers of linux/rtnetlink.h."""

_MOST = 0xFFFF_FFFF


@frozen
class HostAddress:
    """An address that the host has as long as the VM runs on it; `str()` gives the words."""

    address: Address
    prefix: int
    interface: str
    metric: int | None = None
    scope: str | None = None
    label: str | None = None

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix} dev {self.interface}" + _said(
            metric=self.metric, scope=self.scope, label=self.label
        )


@frozen
class Route:
    """A route that the host has as long as the VM runs on it; `str()` gives the words.

    Attributes:
        kind: of TYPES. Only unicast leads somewhere, by `gateway`, `interface` or both.
    """

    destination: Network
    gateway: Address | None = None
    interface: str | None = None
    metric: int | None = None
    table: int = MAIN_TABLE
    source: Address | None = None
    onlink: bool = False
    kind: str = "unicast"

    def __str__(self) -> str:
        first = "" if self.kind == "unicast" else f"{self.kind} "
        table = next((name for name, number in TABLES.items() if number == self.table), self.table)
        return f"{first}{self.destination}" + _said(
            via=self.gateway,
            dev=self.interface,
            metric=self.metric,
            table=None if self.table == MAIN_TABLE else table,
            src=self.source,
            onlink=self.onlink or None,
        )


@frozen
class GuestAddress:
    """An address of the guest's own, which is announced; `str()` gives the words.

    Attributes:
        mac: of the NIC that has it; None: of the only one.
    """

    address: Address
    mac: str | None = None
    vlan: int | None = None

    def __str__(self) -> str:
        return str(self.address) + _said(mac=self.mac, vlan=self.vlan)


def read_host_address(text: str) -> HostAddress:
    """Read a host address."""
    words = text.split()
    address, prefix = _with_prefix(_first(words, "ADDRESS/PREFIX dev NAME"))
    options = _options(words[1:], ("dev", "metric", "scope", "label"))
    if "dev" not in options:
        raise ValueError(f"{text!r} does not say on which interface: add dev NAME")
    interface, scope = _interface(options["dev"]), options.get("scope")
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"{scope!r} is not one of the scopes {', '.join(SCOPES)}")
    label = options.get("label")
    if label is not None and (
        address.version == 6 or len(label) > 15 or not f"{label}:".startswith(f"{interface}:")
    ):
        raise ValueError(
            f"{label!r} is not a label: for IPv4, {interface}:WORD with at most 15 letters in all"
        )
    return HostAddress(address, prefix, interface, _metric(options), scope, label)


def read_route(text: str) -> Route:
    """Read a route."""
    words = text.split()
    kind = words.pop(0) if words and words[0] in TYPES else "unicast"
    destination = _destination(_first(words, "DESTINATION via GATEWAY or DESTINATION dev NAME"), words)
    onlink = "onlink" in words
    if onlink:
        words.remove("onlink")
    options = _options(words[1:], ("via", "dev", "metric", "table", "src"), flags=("onlink",))
    gateway = _of_family(options, "via", destination.version)
    interface = _interface(options["dev"]) if "dev" in options else None
    if kind == "unicast" and gateway is None and interface is None:
        raise ValueError(f"{text!r} leads nowhere: add via GATEWAY or dev NAME")
    if kind != "unicast" and (gateway is not None or interface is not None):
        raise ValueError(f"{text!r}: {kind} leads nowhere, so leave out via and dev")
    if onlink and interface is None:
        raise ValueError(f"{text!r}: onlink needs dev NAME")
    source = _of_family(options, "src", destination.version)
    return Route(destination, gateway, interface, _metric(options), _table(options), source, onlink, kind)


def read_guest_address(text: str) -> GuestAddress:
    """Read a guest address. A prefix may stand behind it, as elsewhere; it means nothing."""
    words = text.split()
    address, _ = _with_prefix(_first(words, "an IP address"), prefix_needed=False)
    options = _options(words[1:], ("mac", "vlan"))
    mac = options.get("mac")
    if mac is not None:
        mac = mac.lower().replace("-", ":")
        if not is_mac(mac):
            raise ValueError(f"{options['mac']!r} is not the MAC of a NIC, like 52:54:00:12:34:56")
    vlan = _number(options, "vlan", 1, 4094)
    return GuestAddress(address, mac, vlan)


def _first(words: Sequence[str], wanted: str) -> str:
    if not words:
        raise ValueError(f"nothing is said where {wanted} is wanted")
    return words[0]


def _options(words: Sequence[str], known: Sequence[str], flags: Sequence[str] = ()) -> dict[str, str]:
    """Pairs of a name and a value."""
    found: dict[str, str] = {}
    for at in range(0, len(words), 2):
        name = words[at]
        if name not in known:
            near = next(iter(difflib.get_close_matches(name, [*known, *flags], 1)), None)
            hint = f"did you mean {near}?" if near else f"known are {', '.join([*known, *flags])}"
            raise ValueError(f"{name!r} is not known here: {hint}")
        if name in found:
            raise ValueError(f"{name} is said twice")
        if at + 1 == len(words):
            raise ValueError(f"nothing stands behind {name}")
        found[name] = words[at + 1]
    return found


def _with_prefix(text: str, prefix_needed: bool = True) -> tuple[Address, int]:
    bare, slash, length = text.partition("/")
    try:
        address = read_address(bare)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None
    if not is_of_a_station(address):
        raise ValueError(f"{bare} is not an address that a host can have for itself")
    longest = address.max_prefixlen
    if not slash:
        if prefix_needed:
            raise ValueError(f"{text!r} has no prefix length: add /{longest} for the address alone")
        return address, longest
    if not (length.isascii() and length.isdecimal() and 0 <= int(length) <= longest):
        raise ValueError(f"{length!r} is not a prefix length from 0 to {longest}")
    return address, int(length)


def _destination(text: str, words: Sequence[str]) -> Network:
    if text == "default":
        six = any(":" in word for name, word in pairwise(words) if name in ("via", "src"))
        text = "::/0" if six else "0.0.0.0/0"
    try:
        return ip_network(text)
    except ValueError as error:
        if "host bits" in str(error):
            right = ip_network(text, strict=False)
            raise ValueError(f"{text} is an address in a network: the network is {right}") from None
        raise ValueError(f"{text!r} is not a network like 10.9.0.0/16, nor default") from None


def _of_family(options: dict[str, str], name: str, version: int) -> Address | None:
    if name not in options:
        return None
    try:
        address = read_address(options[name])
    except ValueError:
        raise ValueError(f"{options[name]!r} behind {name} is not an IP address") from None
    if address.version != version:
        raise ValueError(f"{address} behind {name} is of another IP version than the destination")
    return address


def _interface(name: str) -> str:
    if not is_name(name):
        raise ValueError(f"{name!r} is not the name of an interface: 1 to 15 letters")
    return name


def _metric(options: dict[str, str]) -> int | None:
    return _number(options, "metric", 0, _MOST)


def _table(options: dict[str, str]) -> int:
    text = options.get("table", "main")
    if text in TABLES:
        return TABLES[text]
    if text == "local" or text == str(LOCAL_TABLE):
        raise ValueError("the table local is the kernel's own")
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is not a routing table: a number, or {' or '.join(TABLES)}")
    number = _number(options, "table", 1, _MOST)
    assert number is not None
    return number


def _number(options: dict[str, str], name: str, least: int, most: int) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise ValueError(f"{text!r} behind {name} is not a number from {least} to {most}")
    return int(text)


def _said(**options: object) -> str:
    return "".join(
        f" {name}" if value is True else f" {name} {value}"
        for name, value in options.items()
        if value is not None
    )
