"""A network of two hosts and a client around a switch, of network namespaces; needs root.

      alpha: br0 - uplink ------- to-alpha .
      beta:  br0 - uplink ------- to-beta  +-- sw (a bridge in a namespace of its own)
      client: eth0 -------------- to-client'

The bridges learn as they do anywhere. IPv6 of client's eth0 is on, hosts have none on their bridges.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import re
import struct
import time
from collections.abc import Iterator
from typing import Any

from attrs import frozen

from .debs import run
from .hosts import Host, lone_host

CLIENT4, CLIENT6 = "198.51.100.1", "2001:db8::1"

_TIMER = re.compile(r"\b\w+_timer +[0-9.]+")

_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000


@frozen
class Segment:
    """The four; `alpha` and `beta` have the bridge br0, which is up."""

    alpha: Host
    beta: Host
    switch: Host
    client: Host

    def switch_port(self, mac: str) -> str | None:
        """Where the switch sends frames for `mac`; None: everywhere."""
        return way(self.switch, "sw", mac)

    def neighbour(self, address: str) -> tuple[str | None, list[str]]:
        """What the client's cache says about an address: the MAC and the states."""
        for entry in json.loads(command(self.client, "ip", "-j", "neigh", "show", address) or "[]"):
            return entry.get("lladdr"), entry["state"]
        return None, []


@contextlib.contextmanager
def segment() -> Iterator[Segment]:
    """The network, which is removed at the end."""
    with contextlib.ExitStack() as stack:
        alpha, beta, switch, client = (
            stack.enter_context(lone_host(name)) for name in ("alpha", "beta", "switch", "client")
        )
        command(switch, "ip", "link", "add", "sw", "type", "bridge")
        for host in (alpha, beta, client):
            end = "eth0" if host is client else "uplink"
            cable = ["ip", "link", "add", end, "netns", host.namespace, "type", "veth"]
            run([*cable, "peer", "name", f"to-{host.name}", "netns", switch.namespace])
            command(switch, "ip", "link", "set", f"to-{host.name}", "master", "sw", "up")
            if host is not client:
                command(host, "ip", "link", "add", "br0", "type", "bridge")
                command(host, "ip", "link", "set", end, "master", "br0")
                for name in ("br0", end):
                    command(host, "ip", "link", "set", name, "addrgenmode", "none")
                command(host, "ip", "link", "set", "br0", "up")
            command(host, "ip", "link", "set", end, "up")
        command(switch, "ip", "link", "set", "sw", "addrgenmode", "none", "up")
        command(client, "ip", "address", "add", f"{CLIENT4}/24", "dev", "eth0")
        command(client, "ip", "address", "add", f"{CLIENT6}/64", "dev", "eth0", "nodad")
        # Else the kernel keeps what it has heard for a second, whatever it hears then.
        with client.entered():
            for version in ("ipv4", "ipv6"):
                with open(f"/proc/sys/net/{version}/neigh/eth0/locktime", "w") as file:
                    file.write("0")
        for host in (alpha, beta, switch):
            wait_forwarding(host)
        yield Segment(alpha, beta, switch, client)


def wait_forwarding(host: Host) -> None:
    """Wait until all bridge ports of `host` pass frames: the kernel lets them a little after they are up."""
    deadline = time.monotonic() + 10
    while any(port["state"] != "forwarding" for port in json.loads(command(host, "bridge", "-j", "link"))):
        assert time.monotonic() < deadline, command(host, "bridge", "link")
        time.sleep(0.01)


def command(host: Host, *argv: str) -> str:
    """Run a program on `host` and return what it prints."""
    with host.entered():
        return run(list(argv))


def way(host: Host, bridge: str, mac: str, vlan: int | None = None) -> str | None:
    """The port behind which `bridge` knows `mac`."""
    for entry in table(host, bridge):
        if entry["mac"] == mac and entry.get("vlan") == vlan:
            return str(entry["ifname"])
    return None


def table(host: Host, bridge: str) -> list[dict[str, Any]]:
    """The MACs that `bridge` knows and that are not its own."""
    entries = json.loads(command(host, "bridge", "-j", "fdb", "show", "br", bridge) or "[]")
    return [entry for entry in entries if entry.get("master") == bridge and entry["state"] != "permanent"]


def picture(host: Host, mac: str) -> list[str]:
    """All that can be seen of a host's network, to be compared with later.

    But for timers, and for what bridges learn from anybody's frames: of that only where `mac` is.
    """
    return [
        f"{' '.join(argv)}: {_TIMER.sub('', line)}"
        for argv in (
            ("ip", "-d", "address"),
            ("ip", "route", "show", "table", "all"),
            ("ip", "-6", "route", "show", "table", "all"),
            ("bridge", "fdb"),
            ("bridge", "-d", "link"),
            ("bridge", "vlan"),
            ("tc", "qdisc", "show"),
        )
        for line in command(host, *argv).splitlines()
        if argv != ("bridge", "fdb") or line.startswith(mac) or "permanent" in line or "static" in line
    ]


def changes(before: list[str], after: list[str]) -> list[str]:
    """What is gone and what is new."""
    return [line for line in difflib.ndiff(before, after) if line[0] in "+-"]


def open_tap(host: Host, name: str) -> int:
    """Open a tap as QEMU does; the caller closes the descriptor. Reads do not wait."""
    with host.entered():
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, 0x4004_54CA, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd


HEADER = bytes(10)
"""struct virtio_net_hdr: stands before each frame on such a tap."""
