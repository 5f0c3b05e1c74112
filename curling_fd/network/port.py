"""A VM's port: what the tap of one of its NICs is on the host it runs on, so that another host can make one.

A `Port` is read on the primary (`ports.read_port`), travels to the backup as JSON, and is made there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import attrs
from attrs import field, frozen

from curling_fd.network.packets import is_mac

T = TypeVar("T")

LONGEST_NAME = 15
"""Letters of an interface's name: IFNAMSIZ less the NUL."""

BRIDGE_FLAGS = {
    "mode": "hairpin",
    "guard": "guard",
    "fast_leave": "fast_leave",
    "learning": "learning",
    "unicast_flood": "flood",
    "mcast_flood": "mcast_flood",
    "mcast_to_ucast": "mcast_to_unicast",
    "bcast_flood": "bcast_flood",
    "neigh_suppress": "neigh_suppress",
    "isolated": "isolated",
}
"""Switches of a bridge port that are taken along: the kernel's name (IFLA_BRPORT_*) and bridge(8)'s.

Left out: root_block (protect), proxy ARP, and locked, which need something else on that host beside them.
"""


@frozen
class Vlan:
    """VLANs `first` to `last` of a bridge port.

    `pvid`: frames that come in untagged are in it, the only one then; `untagged`: its frames go out untagged.
    """

    first: int
    last: int
    pvid: bool = False
    untagged: bool = False


DEFAULT_VLANS = (Vlan(1, 1, pvid=True, untagged=True),)
"""What a bridge gives a new port by itself, unless its vlan_default_pvid says otherwise."""


@frozen
class Port:
    """A tap and its place in a bridge.

    Attributes:
        name: of the interface.
        mtu: in bytes, without the Ethernet header.
        macs: of the NICs behind it, as the guest has them.
        bridge: that it is a port of; None: of none.
        vlans: None where the bridge does not filter VLANs.
        flags: bridge(8)'s names of BRIDGE_FLAGS, and how they are set.
        owner, group: who may open the tap, numbers; None: anybody with the capability.
        multi_queue: made for more than one queue. QEMU must open it in the same way.
        queue_length: packets that wait for QEMU (txqueuelen).
    """

    name: str
    mtu: int = 1500
    macs: tuple[str, ...] = ()
    bridge: str | None = None
    vlans: tuple[Vlan, ...] | None = None
    flags: Mapping[str, bool] = field(factory=dict)
    owner: int | None = None
    group: int | None = None
    multi_queue: bool = False
    queue_length: int = 1000

    @property
    def pvid(self) -> int | None:
        """The VLAN of the guest's untagged frames."""
        return next((vlan.first for vlan in self.vlans or () if vlan.pvid), None)

    def encode(self) -> dict[str, Any]:
        """Write it for JSON."""
        vlans = None if self.vlans is None else [list(attrs.astuple(vlan)) for vlan in self.vlans]
        return attrs.asdict(self, recurse=False) | {"macs": list(self.macs), "vlans": vlans}

    @classmethod
    def decode(cls, value: object) -> Port:
        """Read what `encode` wrote on another host.

        Raises:
            ValueError: it is not that; the message says what.
        """
        if not isinstance(value, dict):
            raise ValueError("a port is not described as one")
        name = _get(value, "name", str)
        if not is_name(name):
            raise ValueError(f"{name[:40]!r} is not the name of an interface")
        bridge = _get(value, "bridge", str, None)
        if bridge is not None and not is_name(bridge):
            raise ValueError(f"{bridge[:40]!r} is not the name of a bridge")
        flags = _get(value, "flags", dict, {})
        vlans = _get(value, "vlans", list, None)
        return cls(
            name,
            mtu=_number(value, "mtu", 1500, 68, 65535),
            macs=_macs(_get(value, "macs", list, [])),
            bridge=bridge,
            vlans=None if vlans is None else _vlans(vlans),
            flags={
                flag: on
                for flag, on in flags.items()
                if flag in BRIDGE_FLAGS.values() and isinstance(on, bool)
            },
            owner=_number(value, "owner", None, 0, 0xFFFF_FFFE),
            group=_number(value, "group", None, 0, 0xFFFF_FFFE),
            multi_queue=_get(value, "multi_queue", bool, False),
            queue_length=_number(value, "queue_length", 1000, 0, 1_000_000),
        )


def is_name(text: str) -> bool:
    """Whether an interface can have that name: dev_valid_name() of the kernel."""
    return (
        text not in ("", ".", "..")
        and len(text.encode("utf-8", "replace")) <= LONGEST_NAME
        and not any(letter in "/:\0" or letter.isspace() for letter in text)
        and text.isprintable()
    )


def own_mac(macs: Iterable[str], name: str) -> str:
    """The MAC of the tap itself, on the host's side.

    It is like the guest's, so that it can be told whose it is, but begins with fe: a bridge takes the lowest
    MAC among its ports', and must not change its own because a VM has come. No guest may have it, for the
    bridge takes frames to it for the host's.
    """
    taken = list(macs)
    last = taken[0][3:] if taken else ":".join(f"{byte:02x}" for byte in name.encode().rjust(5, b"\0")[-5:])
    return next(mac for first in ("fe", "fa", "f6", "f2") if (mac := f"{first}:{last}") not in taken)


_MISSING: Any = object()


def _get(value: Mapping[str, Any], name: str, kind: type[T], default: Any = _MISSING) -> Any:
    found = value.get(name, default)
    if found is default and default is not _MISSING:
        return default
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise ValueError(f"{name} of a port is {str(found)[:40]!r}")
    return found


def _number(value: Mapping[str, Any], name: str, default: int | None, least: int, most: int) -> Any:
    number = _get(value, name, int, default)
    if number is not None and not least <= number <= most:
        raise ValueError(f"{name} of a port is {number}")
    return number


def _macs(values: list[object]) -> tuple[str, ...]:
    if len(values) > 16 or not all(isinstance(mac, str) and is_mac(mac) for mac in values):
        raise ValueError(f"macs of a port are {str(values)[:80]}")
    return tuple(map(str, values))


def _vlans(values: list[object]) -> tuple[Vlan, ...]:
    found: list[Vlan] = []
    for value in values:
        match value:
            case [int(first), int(last), bool(pvid), bool(untagged)] if 1 <= first <= last <= 4094 and not (
                pvid and first != last
            ):
                found.append(Vlan(first, last, pvid, untagged))
            case _:
                raise ValueError(f"a VLAN of a port is {str(value)[:80]}")
    in_order = sorted(found, key=lambda vlan: vlan.first)
    if any(one.last >= two.first for one, two in pairwise(in_order)) or sum(vlan.pvid for vlan in found) > 1:
        raise ValueError("a port is in one VLAN twice, or has two for untagged frames")
    return tuple(found)
