"""The network cards of a VM, and what is behind each: from the monitor's `info network`.

There is no QMP command that tells it. The text has looked like this from QEMU 1.x to 11:

    nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33
     \\ hostnet0: index=0,type=tap,ifname=vnet0,script=no,downscript=no

with a pair of lines for each queue. Source: qemu `net/net.c`, hmp_info_network and print_net_client.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from attrs import frozen

_LINE = re.compile(r"(?P<peer> \\ )?(?P<name>.+?): index=\d+,type=(?P<kind>[\w-]+),(?P<rest>.*)")
_TAP = re.compile(r"\bifname=([^,]+)")
_FD = re.compile(r"\bfd=(\d+)")
_MAC = re.compile(r"macaddr=((?:[0-9a-f]{2}:){5}[0-9a-f]{2})", re.IGNORECASE)


@frozen
class Nic:
    """A network card.

    Attributes:
        name: as QEMU calls it: the device's id, or its model and a number.
        mac: as six pairs of hexadecimal digits; empty if QEMU does not tell.
        netdev: id of what is behind it; None if nothing is.
        kind: of that: `tap`, `user`, `vhost-user`, ...
        tap: name of the tap's interface, where QEMU opened it.
        fd: QEMU's descriptor of the tap (its first queue), where it was given one.
    """

    name: str
    mac: str
    netdev: str | None
    kind: str | None
    tap: str | None = None
    fd: int | None = None


def parse_nics(text: str) -> tuple[Nic, ...]:
    """Read the answer to `info network`; a card with several queues is one."""
    found: dict[str, Nic] = {}
    for nic in _nics(text):
        found.setdefault(nic.name, nic)
    return tuple(found.values())


def _nics(text: str) -> Iterator[Nic]:
    card: Nic | None = None
    for line in text.splitlines():
        match = _LINE.fullmatch(line.rstrip("\r"))
        if match is None:
            continue
        if match["peer"] is None:
            if card is not None:
                yield card
            mac = _MAC.search(match["rest"])
            card = Nic(match["name"], mac[1].lower() if mac else "", None, None)
            if match["kind"] != "nic":
                card = None  # a netdev that no card uses
        elif card is not None:
            tap, fd = _TAP.search(match["rest"]), _FD.search(match["rest"])
            yield Nic(
                card.name,
                card.mac,
                match["name"],
                match["kind"],
                tap[1] if tap else None,
                int(fd[1]) if fd else None,
            )
            card = None
    if card is not None:
        yield card
