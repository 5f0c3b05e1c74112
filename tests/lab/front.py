"""The network of guests and clients: a tap on each host, and a wire from there to a client outside both.

    guest - vnet0 - br0 - front0 ====== alpha
            `------ host alpha ------'    |- br0, the client's address
    guest - vnet0 - br0 - front0 ====== beta
            `------ host beta -------'  `- the client's host

What the guest sends is seen on the client's two ports, with which of the hosts it came from.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import trio
from attrs import define, field

from .debs import run
from .hosts import Host

TAP, TAP_2 = "vnet0", "vnet1"
CLIENT_ADDRESS = "10.88.0.1"
GUEST_ADDRESS = "10.88.0.5"
GUEST_MAC, GUEST_MAC_2 = "52:54:00:00:01:05", "52:54:00:00:01:06"

#: The client's addresses in the networks of the guest's first and second card, which share the wires.
CLIENT_ADDRESSES = (f"{CLIENT_ADDRESS}/24", "fd00:10:88::1/64", "10.89.0.1/24", "fd00:10:89::1/64")


def card(tap: str, mac: str) -> tuple[str, ...]:
    """QEMU's arguments for a card on a tap, without vhost."""
    netdev = f"tap,id=net-{tap},ifname={tap},script=no,downscript=no"
    return ("-netdev", netdev, "-device", f"virtio-net-pci,netdev=net-{tap},mac={mac}")


CARD = card(TAP, GUEST_MAC)
CARD_2 = card(TAP_2, GUEST_MAC_2)

#: Nobody's.
WRONG_MAC = "52:54:00:00:00:66"

_BRIDGE, _UPLINK = "br0", "front0"
_MAGIC = 0x3147504C52554347
_DISCARD_PORT = 9

_ALL, _IPV4 = 3, b"\x08\x00"

#: asm-generic/socket.h; Python has no name for it.
_SO_RCVBUFFORCE = 33
_serial = itertools.count()


class Seen(NamedTuple):
    """One of the guest's numbered datagrams, and the host it came from."""

    host: str
    number: int


@define(eq=False)
class Front:
    """The client's host. `seen` is what came so far, in order of arrival on each port."""

    client: Host
    seen: list[Seen] = field(factory=list)
    _arrived: trio.Event = field(factory=trio.Event)

    def numbers(self, host: str) -> list[int]:
        """What came from `host`."""
        return [one.number for one in self.seen if one.host == host]

    async def watch(self, hosts: Sequence[str], *, task_status: trio.TaskStatus[None]) -> None:
        """Fill `seen` until cancelled."""
        async with trio.open_nursery() as nursery:
            for host in hosts:
                await nursery.start(self._watch_port, host)
            task_status.started()

    async def _watch_port(self, host: str, *, task_status: trio.TaskStatus[None]) -> None:
        with self.client.entered():
            # With a protocol it would hear all interfaces until it is bound, and nothing for a moment then.
            plain = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        plain.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        # Of a bridge's port nobody gets packets of one protocol: the bridge takes them before.
        plain.bind((host, _ALL))
        with trio.socket.from_stdlib_socket(plain) as sock:
            task_status.started()
            while True:
                try:
                    number = _number(await sock.recv(2048))
                except OSError as error:
                    if error.errno != errno.ENETDOWN:  # said once when it is cut
                        raise
                    continue
                if number is not None:
                    self.seen.append(Seen(host, number))
                    self._arrived.set()

    def cut(self, host: Host) -> None:
        """Take the wire from `host` away."""
        with self.client.entered():
            run(["ip", "link", "set", host.name, "down"])

    def heal(self, host: Host) -> None:
        """Undo cut."""
        with self.client.entered():
            run(["ip", "link", "set", host.name, "up"])

    async def leads_to(self, host: str, mac: str = GUEST_MAC, *, within: float = 60) -> None:
        """Wait until the client's bridge sends frames for the guest to `host`."""
        with trio.fail_after(within):
            while True:
                with self.client.entered():
                    table = run(["bridge", "fdb", "show", "br", _BRIDGE])
                if any(line.startswith(f"{mac} dev {host} ") for line in table.splitlines()):
                    return
                await trio.sleep(0.01)

    def neighbours(self) -> dict[str, tuple[str, str]]:
        """MAC and state of each address that the client has in its ARP and neighbour caches."""
        with self.client.entered():
            entries = json.loads(run(["ip", "-j", "neighbour", "show"]))
        return {entry["dst"]: (entry.get("lladdr", ""), entry["state"][0]) for entry in entries}

    def mislead(self, address: str) -> None:
        """Have the client know a wrong MAC for an address."""
        with self.client.entered():
            run(["ip", "neighbour", "replace", address, "lladdr", WRONG_MAC, "dev", _BRIDGE, "nud", "stale"])

    async def more(self, host: str, count: int = 1, *, within: float = 60) -> None:
        """Wait until `count` more datagrams have come from `host` than have now."""
        wanted = len(self.numbers(host)) + count
        with trio.fail_after(within):
            while len(self.numbers(host)) < wanted:
                self._arrived = trio.Event()
                await self._arrived.wait()


@contextlib.contextmanager
def front(hosts: Sequence[Host], taps: Sequence[str] = (TAP,)) -> Iterator[Front]:
    """Taps, bridges and wires for `hosts`, whose own name spaces remove what is in them."""
    namespace = f"curling-{os.getpid()}-{next(_serial)}-client"
    client = Host("client", namespace, CLIENT_ADDRESS, hosts[0].directory.parent)
    run(["ip", "netns", "add", namespace])
    try:
        with client.entered():
            run(["ip", "link", "set", "lo", "up"])
            run(["ip", "link", "add", _BRIDGE, "type", "bridge"])
        for host in hosts:
            ends = ["name", _UPLINK, "netns", host.namespace, "type", "veth", "peer", "name", host.name]
            run(["ip", "link", "add", *ends, "netns", namespace])
            with client.entered():
                run(["ip", "link", "set", host.name, "master", _BRIDGE, "up"])
            with host.entered():
                run(["ip", "link", "add", _BRIDGE, "type", "bridge"])
                for tap in taps:
                    run(["ip", "tuntap", "add", tap, "mode", "tap"])
                for port in (*taps, _UPLINK):
                    run(["ip", "link", "set", port, "master", _BRIDGE, "up"])
                run(["ip", "link", "set", _BRIDGE, "up"])
        with client.entered():
            for address in CLIENT_ADDRESSES:
                nodad = ["nodad"] if ":" in address else []
                run(["ip", "address", "add", address, "dev", _BRIDGE, *nodad])
            for version in ("ipv4", "ipv6"):
                # What was heard a moment ago may be wrong a moment later here.
                (Path("/proc/sys/net") / version / f"neigh/{_BRIDGE}/locktime").write_text("0")
            run(["ip", "link", "set", _BRIDGE, "up"])
        yield Front(client)
    finally:
        client.kill_all()
        run(["ip", "netns", "delete", namespace])


def _number(frame: bytes) -> int | None:
    """The number of a datagram of the guest (see guest.c), or None for any other frame."""
    header = 14 + (frame[14] & 15) * 4 if len(frame) > 14 else 0
    if len(frame) < header + 24 or frame[12:14] != _IPV4 or frame[23] != socket.IPPROTO_UDP:
        return None
    port, _, _, magic, number = struct.unpack_from(">HHH", frame, header + 2) + struct.unpack_from(
        "<QQ", frame, header + 8
    )
    return int(number) if (port, magic) == (_DISCARD_PORT, _MAGIC) else None
