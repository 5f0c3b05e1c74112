"""Clients of real servers in a KVM guest with two cards notice no more than a pause when its host dies.

With vhost-net and without, and in a VLAN.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import aclosing
from pathlib import Path

import trio
from attrs import evolve

from tests.lab.connections import connected
from tests.lab.debs import run
from tests.lab.guests import ServerGuest
from tests.lab.servers import REDIS
from tests.lab.traffic import Traffic

from .lab import Lab
from .steps import GUEST_MACS, SERVER_ADDRESSES, SERVERS, Machine

_COMMITTED = 10

#: Steps that each client makes before the host is lost, and after; and how much it moves at a time.
_STEPS = 5
_FILE = 1 << 20

_VLAN = 42
_IN_VLAN = Path(__file__).with_name("increments.py")

#: The bridges filter; the guest is in the VLAN, and a client of its own name space on beta.
_BRIDGE_IN_VLAN = f"""
ip link set br0 type bridge vlan_filtering 1
bridge vlan add dev eth1 vid {_VLAN}
"""
_TAP_IN_VLAN = f"""
bridge vlan delete dev vnet0 vid 1
bridge vlan add dev vnet0 vid {_VLAN} pvid untagged
"""
_CLIENT_IN_VLAN = f"""
ip netns add v-client
ip link add to-v type veth peer name eth0 netns v-client
ip link set to-v master br0 up
bridge vlan delete dev to-v vid 1
bridge vlan add dev to-v vid {_VLAN} pvid untagged
ip -n v-client link set eth0 up
ip -n v-client address add 198.51.100.101/24 dev eth0
ip -n v-client address add fd00:198::101/64 dev eth0 nodad
"""
_NO_VLAN = f"""
ip netns delete v-client || true
bridge vlan delete dev eth1 vid {_VLAN} || true
ip link set br0 type bridge vlan_filtering 0
"""


async def test_ssh_http_and_redis_on_two_cards_with_vhost_survive_the_loss_of_the_host(lab: Lab) -> None:
    await lab.protected(SERVERS)
    shown = await lab.committed(lab.alpha, _COMMITTED)
    assert shown["output"] == "plug", "the hosts' kernel has it"
    threads = await lab.alpha.agent.run("ps -eLo comm= | grep -c ^vhost-")
    assert int(threads.stdout) >= len(SERVERS.taps), "the kernel moves the packets"
    await survives(lab, SERVERS)


async def test_they_survive_it_without_vhost_too(lab: Lab) -> None:
    machine = evolve(SERVERS, vhost=False)
    await lab.protected(machine)
    shown = await lab.committed(lab.alpha, _COMMITTED)
    assert shown["output"] == "plug", "the hosts' kernel has it"
    await survives(lab, machine)


async def survives(lab: Lab, machine: Machine) -> None:
    """Clients of all kinds are at work when alpha loses its power, and go on at beta."""
    used = [address for addresses in SERVER_ADDRESSES[: len(machine.taps)] for address in addresses]
    assert isinstance(machine.guest, ServerGuest)
    traffic = Traffic(lab.client, machine.guest.servers(), used, file_bytes=_FILE)
    for address in used:
        await answers(lab, address)
    async with trio.open_nursery() as nursery:
        await nursery.start(traffic.run)
        await traffic.more(_STEPS, within=300)
        lab.timeline.note("client", f"all clients are at work: {traffic.gaps()}")
        traffic.measure()
        await lab.lose_power(lab.alpha)
        await lab.wait_state(lab.beta, "active", "connecting", "unprotected")
        found = neighbours(lab)
        lab.timeline.note("client", f"its caches when beta has the VM: {found}")
        await traffic.more(_STEPS, within=300)
        traffic.stop()
    lab.timeline.note("client", f"longest pauses in seconds: {traffic.gaps()}")
    assert min(traffic.gaps().values()) > 1, "each was under way when the host was lost"
    after = neighbours(lab)
    for addresses, mac, tap in zip(SERVER_ADDRESSES, GUEST_MACS, machine.taps, strict=False):
        assert {after[address] for address in addresses} == {mac}
        fdb = await lab.beta.agent.run(["bridge", "-j", "fdb", "show", "br", "br0"])
        assert {entry["ifname"] for entry in json.loads(fdb.stdout) if entry["mac"] == mac} == {tap}


async def answers(lab: Lab, address: str) -> None:
    """Wait until the guest is found there: a client gives up after three seconds, a busy lab takes longer."""
    with trio.fail_after(120):
        while True:
            with contextlib.suppress(OSError):
                async with connected(lab.client, address, REDIS):
                    return


def neighbours(lab: Lab) -> dict[str, str]:
    """The MAC of each address in the client's ARP and neighbour caches."""
    with lab.client.entered():
        entries = json.loads(run(["ip", "-j", "neighbour", "show"]))
    return {entry["dst"]: entry.get("lladdr", "") for entry in entries}


async def test_a_connection_in_a_vlan_survives_the_loss_of_the_host(lab: Lab) -> None:
    machine = evolve(SERVERS, taps=SERVERS.taps[:1])
    await lab.afresh(machine)
    try:
        await lab.on_each(lambda host: lab.script(host, _BRIDGE_IN_VLAN))
        await lab.script(lab.alpha, _TAP_IN_VLAN)
        await lab.script(lab.beta, _CLIENT_IN_VLAN)
        await lab.protected(machine)
        await lab.committed(lab.alpha, _COMMITTED)
        addresses = SERVER_ADDRESSES[0]
        command = ["ip", "netns", "exec", "v-client", "python3", "-u", "-c", _IN_VLAN.read_text(), *addresses]
        async with lab.beta.agent.start(command) as running, aclosing(running.lines()) as lines:
            counts = dict.fromkeys(addresses, 0)
            longest = dict.fromkeys(addresses, 0.0)
            goal = _STEPS
            with trio.fail_after(300):
                async for line in lines:
                    told = json.loads(line)
                    assert told["number"] == counts[told["address"]] + 1, "none is lost, and none done twice"
                    counts[told["address"]] += 1
                    longest[told["address"]] = max(longest[told["address"]], told["pause"])
                    if min(counts.values()) >= goal:
                        if lab.alpha.pid is None:
                            break
                        await lab.lose_power(lab.alpha)
                        goal = max(counts.values()) + _STEPS
        lab.timeline.note("client", f"longest pauses in seconds: {longest}")
        assert min(longest.values()) > 1, "both were under way when the host was lost"
        known = json.loads((await lab.beta.agent.run("ip -j -n v-client neighbour show")).stdout)
        macs = {entry["dst"]: entry.get("lladdr") for entry in known}
        assert {macs[address] for address in addresses} == {GUEST_MACS[0]}
        fdb = json.loads((await lab.beta.agent.run("bridge -j fdb show br br0")).stdout)
        ways = [(entry["ifname"], entry.get("vlan")) for entry in fdb if entry["mac"] == GUEST_MACS[0]]
        assert ways == [("vnet0", _VLAN)]
        port = json.loads((await lab.beta.agent.run("bridge -j vlan show dev vnet0")).stdout)
        assert [(vlan["vlan"], sorted(vlan["flags"])) for vlan in port[0]["vlans"]] == [
            (_VLAN, ["Egress Untagged", "PVID"])
        ]
    finally:
        await lab.power_on(*[host for host in lab.hosts if host.pid is None])
        await lab.on_each(lambda host: lab.script(host, _NO_VLAN))
        await lab.afresh()
