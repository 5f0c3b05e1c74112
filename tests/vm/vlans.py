"""Runs inside a lab host, with its kernel: a failover of a VM's network in VLANs, between name spaces.

      host: br0 (filters) - uplink ---- to-host . sw (filters)
      client: eth0.10, eth0.20 - eth0 - to-client'        both cables are trunks of 10 and 20

The guest's untagged frames are in VLAN 10, and it puts tag 20 on others. Prints what was found as JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
from ipaddress import IPv4Address, IPv6Address

import trio

from curling_fd.errors import CurlingError
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network.failover import FailoverNetwork
from curling_fd.network.learn import Binding
from curling_fd.network.plan import Plan
from curling_fd.network.port import Port, Vlan
from curling_fd.network.ports import read_port

MAC, WRONG = "52:54:00:12:34:56", "52:54:00:00:00:66"
BINDINGS = (
    Binding(MAC, IPv4Address("198.51.100.9")),
    Binding(MAC, IPv6Address("2001:db8:10::9")),
    Binding(MAC, IPv4Address("203.0.113.9"), 20),
    Binding(MAC, IPv6Address("2001:db8:20::9"), 20),
)
PORT = Port(
    "vnet9",
    macs=(MAC,),
    bridge="br9",
    vlans=(Vlan(10, 10, pvid=True, untagged=True), Vlan(20, 30)),
    flags={"learning": True},
)

SET_UP = """
ip netns add v-switch
ip netns add v-client
ip -n v-switch link add sw type bridge vlan_filtering 1 vlan_default_pvid 0
ip link add br9 type bridge vlan_filtering 1
ip link add uplink9 type veth peer name to-host netns v-switch
ip -n v-client link add eth0 type veth peer name to-client netns v-switch
ip link set uplink9 master br9 up
ip link set br9 up
ip -n v-switch link set to-host master sw up
ip -n v-switch link set to-client master sw up
ip -n v-switch link set sw up
ip -n v-client link set eth0 up
bridge vlan add dev uplink9 vid 10
bridge vlan add dev uplink9 vid 20
bridge -n v-switch vlan add dev to-host vid 10
bridge -n v-switch vlan add dev to-host vid 20
bridge -n v-switch vlan add dev to-client vid 10
bridge -n v-switch vlan add dev to-client vid 20
"""
TEAR_DOWN = (
    "ip link delete br9",
    "ip link delete uplink9",
    "ip netns delete v-switch",
    "ip netns delete v-client",
)


def sh(line: str) -> str:
    return subprocess.run(line.split(), check=True, capture_output=True, text=True).stdout


def set_up() -> None:
    for line in SET_UP.strip().splitlines():
        sh(line)
    for vlan, four, six in ((10, "198.51.100", "2001:db8:10:"), (20, "203.0.113", "2001:db8:20:")):
        name = f"eth0.{vlan}"
        sh(f"ip -n v-client link add link eth0 name {name} type vlan id {vlan}")
        sh(f"ip -n v-client link set {name} up")
        for address, length in ((f"{four}.1", 24), (f"{six}:1", 64)):
            nodad = " nodad" if ":" in address else ""
            sh(f"ip -n v-client address add {address}/{length} dev {name}{nodad}")
        for version in ("ipv4", "ipv6"):
            sh(f"ip netns exec v-client sysctl -qw net/{version}/neigh/{name}/locktime=0")
    for known in BINDINGS:
        name = f"eth0.{known.vlan or 10}"
        sh(f"ip -n v-client neigh replace {known.address} lladdr {WRONG} dev {name} nud stale")


def picture() -> list[str]:
    return [
        line
        for command in ("ip address show dev br9", "bridge vlan", "bridge fdb show br br9", "bridge -d link")
        for line in sh(command).splitlines()
    ]


def ways(bridge: str, where: str = "") -> dict[str, str]:
    entries = json.loads(sh(f"bridge -j {where} fdb show br {bridge}"))
    return {str(entry.get("vlan")): entry["ifname"] for entry in entries if entry["mac"] == MAC}


def neighbours() -> dict[str, str]:
    entries = json.loads(sh("ip -j -n v-client neigh show"))
    return {entry["dst"]: entry.get("lladdr", "") for entry in entries}


async def failover() -> dict[str, object]:
    found: dict[str, object] = {"wrong before": sorted(set(neighbours().values()))}
    problems: list[CurlingError] = []
    before = picture()
    network = FailoverNetwork("db1", Plan(schedule=(0.0,)), [PORT])
    learned = {PORT.name: BINDINGS}
    await network.connect()
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, 0x4004_54CA, struct.pack("16sH22x", PORT.name.encode(), 0x5002))
    await network.prepare(learned)
    found["ways when prepared"] = ways("br9")
    await network.announce(learned, problems.append)
    with trio.move_on_after(10):
        while set(neighbours().values()) != {MAC}:  # noqa: ASYNC110 - only the kernel knows
            await trio.sleep(0.05)
    found["problems"] = list(map(str, problems))
    found["neighbours"] = neighbours()
    found["ways in the host"] = ways("br9")
    found["ways in the switch"] = ways("sw", "-n v-switch")
    with RouteSocket() as route:
        there = read_port(route, PORT.name, PORT.macs)
    found["port"] = there.encode()
    found["port is as on the primary"] = (there.vlans, there.bridge) == (PORT.vlans, PORT.bridge)
    os.close(tap)
    found["left over"] = [str(error) for error in await network.withdraw()]
    found["changed"] = sorted(set(picture()) ^ set(before))
    return found


if __name__ == "__main__":
    try:
        set_up()
        print(json.dumps(trio.run(failover)))
    finally:
        for line in TEAR_DOWN:
            subprocess.run(line.split(), capture_output=True)
