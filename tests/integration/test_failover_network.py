"""A VM's network comes to another host: everybody finds the guest there, and what fails leaves no trace."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import attrs
import outcome
import prctl
import pytest
import trio

from curling_fd.errors import AddressConflict, CurlingError, NetlinkError, NetworkConflict
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network import packets, steps
from curling_fd.network.failover import FailoverNetwork
from curling_fd.network.inject import Injector
from curling_fd.network.learn import Binding, Learned
from curling_fd.network.packet_socket import PacketSocket
from curling_fd.network.plan import Plan
from curling_fd.network.port import Port, Vlan
from curling_fd.network.ports import read_port
from curling_fd.network.snoop import snoop
from curling_fd.network.steps import Ledger
from curling_fd.network.taps import open_tun
from curling_fd.network.words import read_guest_address, read_host_address, read_route
from curling_fd.sentences import sentence
from tests.lab.hosts import Host, _set_namespace
from tests.lab.segment import (
    HEADER,
    Segment,
    changes,
    command,
    open_tap,
    picture,
    segment,
    wait_forwarding,
    way,
)

MAC = "52:54:00:12:34:56"
OLD = "52:54:00:00:00:66"
FOUR, SIX = "198.51.100.9", "2001:db8::9"
LEARNED = {"vnet0": (Binding(MAC, IPv4Address(FOUR)), Binding(MAC, IPv6Address(SIX)))}
PORT = Port("vnet0", macs=(MAC,), bridge="br0", flags={"learning": True, "flood": True})


@pytest.fixture(scope="module")
def shared() -> Iterator[Segment]:
    with segment() as made:
        yield made


@pytest.fixture
def net(shared: Segment, monkeypatch: pytest.MonkeyPatch) -> Iterator[Segment]:
    """The network, and this thread on beta; worker threads are not, and end with their work."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    async def run_sync(do: Callable[..., Any], *arguments: Any) -> Any:
        done, token = trio.Event(), trio.lowlevel.current_trio_token()
        results: list[outcome.Outcome[Any]] = []

        def work() -> None:
            _set_namespace(home)
            results.append(outcome.capture(do, *arguments))
            token.run_sync_soon(done.set)

        with trio.CancelScope(shield=True):
            threading.Thread(target=work).start()
            await done.wait()
        return results[0].unwrap()

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    try:
        with shared.beta.entered():
            yield shared
    finally:
        os.close(home)
        for name in ("vnet0", "vnet1"):
            for host in (shared.alpha, shared.beta):
                if name in command(host, "ip", "link"):
                    command(host, "ip", "link", "delete", name)


def no_problem(error: CurlingError) -> None:
    raise error


def network(plan: Plan | None = None, ports: Sequence[Port] = (PORT,), vm: str = "db1") -> FailoverNetwork:
    return FailoverNetwork(vm, plan or Plan(schedule=(0.0,)), ports)


def seen(net: Segment) -> list[str]:
    return picture(net.beta, MAC)


async def settled(check: Callable[[], bool]) -> None:
    """Wait until the kernels have passed a frame on."""
    with trio.fail_after(5):
        while not check():  # noqa: ASYNC110 - only the kernels know
            await trio.sleep(0.01)


def run_guest_on(host: Host) -> int:
    """A tap in br0 and a guest behind it that has said where it is."""
    command(host, "ip", "tuntap", "add", "vnet0", "mode", "tap", "vnet_hdr")
    command(host, "ip", "link", "set", "vnet0", "addrgenmode", "none", "master", "br0", "up")
    tap = open_tap(host, "vnet0")
    wait_forwarding(host)
    for frame in (
        packets.gratuitous_request(MAC, IPv4Address(FOUR)),
        packets.advertisement(MAC, IPv6Address(SIX)),
    ):
        os.write(tap, HEADER + frame)
    return tap


def misled_client(net: Segment) -> None:
    """The client believes the guest's addresses to be at another MAC."""
    for address in (FOUR, SIX):
        entry = [address, "lladdr", OLD, "dev", "eth0", "nud", "stale"]
        command(net.client, "ip", "neigh", "replace", *entry)


def arrivals(tap: int) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(os.read(tap, 4096)[len(HEADER) :])
        except BlockingIOError:
            return found


async def test_everybody_finds_the_guest_on_the_new_host_at_once(net: Segment) -> None:
    old = run_guest_on(net.alpha)
    await settled(lambda: net.switch_port(MAC) == "to-alpha" and way(net.beta, "br0", MAC) == "uplink")
    misled_client(net)
    with net.alpha.entered(), RouteSocket() as route:
        port = Port.decode(read_port(route, "vnet0", (MAC,)).encode())
    assert (port.bridge, port.mtu, port.vlans) == ("br0", 1500, None)

    failover = network(ports=[port])
    await failover.connect()
    new = open_tap(net.beta, "vnet0")
    os.close(old)
    await failover.prepare(LEARNED)
    # Before anybody has said anything, this host's own bridge knows.
    assert way(net.beta, "br0", MAC) == "vnet0"
    await failover.announce(LEARNED, no_problem)

    assert net.switch_port(MAC) == "to-beta"
    assert net.neighbour(FOUR)[0] == net.neighbour(SIX)[0] == MAC
    assert way(net.alpha, "br0", MAC) == "uplink"
    assert way(net.beta, "br0", MAC) == "vnet0"
    # The guest is not told about itself, and a frame of the client's comes to it and to nobody else.
    arrivals(new)
    to_guest = bytes.fromhex(MAC.replace(":", "")) + b"\x02\0\0\0\0\x01\x88\xb5" + bytes(46)
    send(net.client, "eth0", to_guest)
    await settled(lambda: to_guest in arrivals(new))
    os.close(new)
    assert await failover.withdraw() == []


def send(host: Host, interface: str, frame: bytes) -> None:
    with host.entered():
        opened = PacketSocket(interface)
    opened.send(frame)
    opened.close()


async def test_the_bridge_and_the_switch_learn_from_what_is_announced_alone(net: Segment) -> None:
    await network().connect()
    tap = open_tap(net.beta, "vnet0")
    command(net.beta, "ip", "link", "set", "vnet0", "up")
    assert way(net.beta, "br0", MAC) is None
    before = set(interfaces(net.beta))
    with RouteSocket() as route, Injector(route, open_tun(), socket.if_nametoindex("vnet0")) as injector:
        assert len(set(interfaces(net.beta)) - before) == 1
        injector.send(packets.reverse_request(MAC))
        assert way(net.beta, "br0", MAC) == "vnet0"
        await settled(lambda: net.switch_port(MAC) == "to-beta")
    assert set(interfaces(net.beta)) == before
    assert MAC not in [frame[6:12].hex(":") for frame in arrivals(tap)]
    os.close(tap)


def interfaces(host: Host) -> list[str]:
    return [line.split(":")[1].strip() for line in command(host, "ip", "-o", "link").splitlines()]


async def test_a_guests_own_tag_is_on_what_is_announced(net: Segment) -> None:
    learned = {"vnet0": (Binding(MAC, IPv4Address(FOUR), 10), Binding(MAC, IPv6Address(SIX), 20, True))}
    with net.client.entered():
        listener = PacketSocket("eth0", hear=True)
    failover = network()
    await failover.connect()
    tap = open_tap(net.beta, "vnet0")
    await failover.prepare(learned)
    await failover.announce(learned, no_problem)
    heard: set[tuple[int | None, object]] = set()

    def both() -> bool:
        while (one := listener.receive()) is not None:
            if (read := packets.parse(one.frame, one.vlan)) is not None:
                heard.add((read.vlan, read.target))
        return {(10, IPv4Address(FOUR)), (20, IPv6Address(SIX))} <= heard

    await settled(both)
    listener.close()
    os.close(tap)
    await failover.withdraw()


async def test_the_guest_waits_behind_a_port_that_lets_nothing_out_or_in(net: Segment) -> None:
    failover = network()
    await failover.connect()
    tap = open_tap(net.beta, "vnet0")
    # What a QEMU says by itself when it has loaded a checkpoint, as a rehearsal too.
    with pytest.raises(OSError, match="Input/output error"):
        os.write(tap, HEADER + packets.reverse_request(MAC))
    send(net.client, "eth0", packets.gratuitous_request(OLD, IPv4Address(FOUR)))
    await settled(lambda: net.switch_port(OLD) == "to-client")
    assert arrivals(tap) == []
    await failover.prepare(LEARNED)
    # Now the port is open, and the kernel itself may have something to say. What was sent before is lost.
    old = bytes.fromhex(OLD.replace(":", ""))
    assert [frame for frame in arrivals(tap) if frame[6:12] == old] == []
    os.close(tap)
    await failover.withdraw()


async def test_all_is_as_before_when_the_guest_has_left(net: Segment) -> None:
    before = seen(net)
    failover = network(full_plan())
    await failover.prepare(LEARNED)
    during = "\n".join(changes(before, seen(net)))
    assert "192.0.2.80/24" in during and "proto 67" in during and "vnet0" in during
    assert await failover.withdraw() == []
    assert changes(before, seen(net)) == []
    assert await failover.withdraw() == []


def full_plan(**changes: Any) -> Plan:
    plan = Plan(
        host_addresses=(
            read_host_address("192.0.2.80/24 dev br0 metric 50 label br0:vip"),
            read_host_address("2001:db8:1::80/64 dev br0"),
        ),
        routes=(
            read_route("10.9.0.0/16 via 192.0.2.9 metric 50 table 100"),
            read_route("10.9.0.0/16 via 192.0.2.9 dev br0 metric 7 src 192.0.2.80"),
            read_route("2001:db8:9::/48 via 2001:db8:1::9"),
            read_route("blackhole 10.8.0.0/16"),
            read_route("default dev br0 table 1000"),
        ),
        patience=0.05,
        schedule=(0.0,),
    )
    return attrs.evolve(plan, **changes)


async def test_addresses_and_routes_are_added_in_order_with_metric_and_table(net: Segment) -> None:
    failover = network(full_plan())
    await failover.prepare(LEARNED)
    assert "10.9.0.0/16 via 192.0.2.9 dev br0 table 100 proto 67 metric 50" in routes(net.beta)
    assert "10.9.0.0/16 via 192.0.2.9 dev br0 proto 67 src 192.0.2.80 metric 7" in routes(net.beta)
    assert "blackhole 10.8.0.0/16 proto 67" in routes(net.beta)
    assert "default dev br0 table 1000 proto 67 scope link" in routes(net.beta)
    shown = command(net.beta, "ip", "address", "show", "dev", "br0")
    assert "192.0.2.80/24 metric 50" in shown and "br0:vip" in shown
    assert "2001:db8:1::80/64" in shown and "tentative" not in shown
    await failover.withdraw()


def routes(host: Host) -> str:
    # ip(8) puts "linkdown" behind routes while nobody has the tap open.
    shown = command(host, "ip", "route", "show", "table", "all")
    return "\n".join(line.removesuffix(" linkdown").strip() for line in shown.splitlines())


async def test_doing_it_again_changes_nothing_and_so_does_a_daemon_that_was_started_anew(
    net: Segment,
) -> None:
    before = seen(net)
    failover = network(full_plan())
    await failover.prepare(LEARNED)
    during = seen(net)
    await failover.prepare(LEARNED)
    assert changes(during, seen(net)) == []
    again = FailoverNetwork("db1", full_plan(), [PORT], Ledger(steps.decode(failover.ledger.encode())))
    await again.prepare(LEARNED)
    assert changes(during, seen(net)) == []
    assert await again.withdraw() == []
    assert changes(before, seen(net)) == []


async def test_what_a_daemon_left_that_died_before_it_could_remember_is_known_as_ours(net: Segment) -> None:
    before = seen(net)
    await network(full_plan()).prepare(LEARNED)
    again = network(full_plan())
    await again.prepare(LEARNED)
    assert await again.withdraw() == []
    assert changes(before, seen(net)) == []


async def test_a_tap_that_was_there_is_used_and_left_as_it_was(net: Segment) -> None:
    command(net.beta, "ip", "tuntap", "add", "vnet0", "mode", "tap", "vnet_hdr")
    command(net.beta, "ip", "link", "set", "vnet0", "addrgenmode", "none", "mtu", "1400", "up")
    before = seen(net)
    failover = network()
    await failover.prepare(LEARNED)
    tap = open_tap(net.beta, "vnet0")
    shown = command(net.beta, "ip", "-d", "link", "show", "vnet0")
    assert "master br0" in shown and "mtu 1400" in shown and "UP" in shown
    os.close(tap)
    assert await failover.withdraw() == []
    # The kernel joins this group on an interface that comes up only when there is a carrier.
    group = "bridge fdb: 33:33:00:00:00:01 dev vnet0 self permanent"
    assert [line for line in changes(before, seen(net)) if group not in line] == []


async def test_a_port_is_made_as_it_is_on_the_primary(net: Segment) -> None:
    made = ["vnet0", "mode", "tap", "multi_queue", "vnet_hdr", "user", "1000", "group", "1001"]
    command(net.alpha, "ip", "tuntap", "add", *made)
    command(net.alpha, "ip", "link", "set", "vnet0", "master", "br0", "mtu", "1400", "txqueuelen", "500")
    flags = ["learning", "off", "flood", "off", "isolated", "on", "hairpin", "on"]
    command(net.alpha, "bridge", "link", "set", "dev", "vnet0", *flags)
    with net.alpha.entered(), RouteSocket() as route:
        there = read_port(route, "vnet0", (MAC,))
    assert (there.owner, there.group, there.multi_queue, there.queue_length) == (1000, 1001, True, 500)
    failover = network(ports=[there])
    await failover.connect()
    with RouteSocket() as route:
        assert read_port(route, "vnet0", (MAC,)) == there
    shown = command(net.beta, "ip", "link", "show", "vnet0")
    assert "fe:54:00:12:34:56" in shown and "alias curling: db1" in shown and "UP" not in shown
    await failover.withdraw()


async def test_two_ports_go_to_the_bridges_that_the_file_names(net: Segment) -> None:
    command(net.beta, "ip", "link", "add", "br1", "type", "bridge")
    ports = [PORT, attrs.evolve(PORT, name="vnet1", macs=(OLD,), bridge="elsewhere")]
    failover = network(Plan(bridges={"elsewhere": "br1"}, schedule=(0.0,)), ports)
    await failover.prepare({})
    shown = command(net.beta, "ip", "-o", "link")
    assert "master br0" in next(line for line in shown.splitlines() if "vnet0" in line)
    assert "master br1" in next(line for line in shown.splitlines() if "vnet1" in line)
    await failover.withdraw()
    command(net.beta, "ip", "link", "delete", "br1")


# What does not go.


@pytest.mark.parametrize(
    ("make", "plan", "port", "kind", "number", "said"),
    [
        (
            [],
            Plan(bridge="br7"),
            PORT,
            NetworkConflict,
            None,
            ["br7", "vnet0", "no such interface", "[network]"],
        ),
        ([], Plan(bridge="uplink"), PORT, NetworkConflict, None, ["uplink", "not a bridge"]),
        (
            [],
            Plan(),
            attrs.evolve(PORT, vlans=(Vlan(10, 10, pvid=True, untagged=True), Vlan(20, 30))),
            NetworkConflict,
            None,
            ["br0", "does not tell VLANs apart", "10, 20-30", "vlan_filtering 1"],
        ),
        (
            ["ip link add vnet0 type ifb"],
            Plan(),
            PORT,
            NetworkConflict,
            None,
            ["vnet0", "not a tap but of the kind ifb"],
        ),
        (
            ["ip tuntap add vnet0 mode tap multi_queue"],
            Plan(),
            PORT,
            NetworkConflict,
            None,
            ["vnet0", "more than one queue"],
        ),
        (
            ["ip address add 192.0.2.80/24 dev br0"],
            None,
            PORT,
            NetworkConflict,
            None,
            ["192.0.2.80/24 dev br0", "br0 has it", "not Curling's"],
        ),
        (
            ["ip address add 192.0.2.80/32 dev lo"],
            None,
            PORT,
            NetworkConflict,
            None,
            ["192.0.2.80/24 dev br0", "lo has it"],
        ),
        (
            ["ip route add 10.8.0.0/16 dev br0"],
            None,
            PORT,
            NetworkConflict,
            None,
            ["blackhole 10.8.0.0/16", "same metric"],
        ),
        (
            ["ip route add 10.9.0.0/16 dev br0 metric 50 table 100"],
            None,
            PORT,
            NetworkConflict,
            None,
            ["10.9.0.0/16 via 192.0.2.9 metric 50 table 100"],
        ),
        (
            [],
            Plan(host_addresses=(read_host_address("192.0.2.80/24 dev eth9"),)),
            PORT,
            NetlinkError,
            errno.ENODEV,
            ["eth9"],
        ),
        (
            [],
            Plan(routes=(read_route("10.9.0.0/16 dev br0"), read_route("10.10.0.0/16 dev eth9"))),
            PORT,
            NetlinkError,
            errno.ENODEV,
            ["eth9"],
        ),
        (
            [],
            Plan(routes=(read_route("10.9.0.0/16 dev br0"), read_route("10.10.0.0/16 via 203.0.113.1"))),
            PORT,
            NetlinkError,
            errno.ENETUNREACH,
            ["10.10.0.0/16 via 203.0.113.1"],
        ),
        (
            [],
            Plan(),
            attrs.evolve(PORT, mtu=65535),
            NetlinkError,
            errno.EINVAL,
            ["vnet0"],
        ),
    ],
    ids=[
        "ENODEV of the bridge",
        "no bridge",
        "no VLANs",
        "no tap",
        "other queues",
        "EEXIST of an address",
        "address elsewhere",
        "EEXIST of a route",
        "EEXIST of a route in a table",
        "ENODEV of an address",
        "ENODEV of a route",
        "ENETUNREACH",
        "EINVAL of the MTU",
    ],
)
async def test_what_does_not_go_is_told_by_its_name_and_leaves_no_trace(
    net: Segment,
    make: list[str],
    plan: Plan | None,
    port: Port,
    kind: type[CurlingError],
    number: int | None,
    said: list[str],
) -> None:
    for line in make:
        command(net.beta, *line.split())
    before = seen(net)
    try:
        with pytest.raises(kind) as caught:
            await network(plan or full_plan(), [port]).prepare(LEARNED)
        words = sentence(caught.value)
        for word in said:
            assert word in words.text + words.remedy
        assert getattr(caught.value, "errno", None) == number
        assert changes(before, seen(net)) == []
    finally:
        for line in make:
            undo = line.replace(" add ", " delete ").replace(" multi_queue", "").replace(" type ifb", "")
            command(net.beta, *(undo + " multi_queue" * ("multi_queue" in line)).split())


async def test_without_the_right_nothing_is_done(net: Segment) -> None:
    before = seen(net)
    prctl.cap_effective.net_admin = False
    try:
        with pytest.raises(NetlinkError) as caught:
            await network(full_plan()).prepare(LEARNED)
    finally:
        prctl.cap_effective.net_admin = True
    assert caught.value.errno == errno.EPERM
    assert "vnet0" in caught.value.what
    assert changes(before, seen(net)) == []


async def test_what_is_another_programs_is_left_to_it(net: Segment) -> None:
    """A tap that is open already, and for one queue: EBUSY."""
    command(net.beta, "ip", "tuntap", "add", "vnet0", "mode", "tap")
    tap = open_tap(net.beta, "vnet0")
    command(net.beta, "ip", "link", "add", "over", "link", "vnet0", "type", "macvlan")
    before = seen(net)
    # A macvlan has the frames of its lower interface: it cannot be a bridge's port as well.
    with pytest.raises(NetlinkError) as caught:
        await network().prepare(LEARNED)
    assert caught.value.errno == errno.EBUSY
    assert "vnet0" in caught.value.what
    assert changes(before, seen(net)) == []
    command(net.beta, "ip", "link", "delete", "over")
    os.close(tap)


async def test_a_port_that_was_renamed_meanwhile_is_named_and_removed_all_the_same(net: Segment) -> None:
    before = seen(net)
    failover = network()
    await failover.connect()
    command(net.beta, "ip", "link", "set", "vnet0", "name", "vnet1")
    with pytest.raises(NetlinkError) as caught:
        await failover.prepare(LEARNED)
    assert caught.value.errno == errno.ENODEV
    assert "vnet0" in caught.value.what
    assert await failover.withdraw() == []
    assert changes(before, seen(net)) == []


async def test_a_port_that_was_deleted_meanwhile_is_nobodys_problem_in_the_end(net: Segment) -> None:
    before = seen(net)
    failover = network(full_plan())
    await failover.prepare(LEARNED)
    command(net.beta, "ip", "link", "delete", "vnet0")
    command(net.beta, "ip", "address", "delete", "192.0.2.80/24", "dev", "br0")
    # One of the same name is somebody else's.
    command(net.beta, "ip", "tuntap", "add", "vnet0", "mode", "tap")
    assert await failover.withdraw() == []
    command(net.beta, "ip", "link", "delete", "vnet0")
    assert changes(before, seen(net)) == []


async def test_an_address_that_somebody_else_has_is_not_taken(net: Segment) -> None:
    command(net.client, "ip", "address", "add", "192.0.2.80/24", "dev", "eth0")
    mac = client_mac(net)
    before = seen(net)
    plan = full_plan(patience=5.0)
    with trio.fail_after(4), pytest.raises(AddressConflict) as caught:
        await network(plan).prepare(LEARNED)
    assert (caught.value.address, caught.value.mac) == ("192.0.2.80", mac)
    assert mac in sentence(caught.value).text
    assert changes(before, seen(net)) == []
    command(net.client, "ip", "address", "delete", "192.0.2.80/24", "dev", "eth0")
    command(net.client, "ip", "address", "add", "2001:db8:1::80/64", "dev", "eth0", "nodad")
    with trio.fail_after(4), pytest.raises(AddressConflict) as caught:
        await network(plan).prepare(LEARNED)
    assert (caught.value.address, caught.value.mac) == ("2001:db8:1::80", mac)
    command(net.client, "ip", "address", "delete", "2001:db8:1::80/64", "dev", "eth0")
    assert changes(before, seen(net)) == []


def client_mac(net: Segment) -> str:
    return command(net.client, "ip", "-br", "link", "show", "eth0").split()[2]


async def test_an_address_of_the_hosts_is_announced_when_it_has_come(net: Segment) -> None:
    plan = Plan(
        host_addresses=(
            read_host_address("198.51.100.80/24 dev br0"),
            read_host_address("2001:db8::80/64 dev br0"),
        ),
        patience=0.02,
        schedule=(0.0,),
    )
    for address in ("198.51.100.80", "2001:db8::80"):
        command(net.client, "ip", "neigh", "replace", address, "lladdr", OLD, "dev", "eth0", "nud", "stale")
    failover = network(plan, ports=[])
    await failover.prepare({})
    await failover.announce({}, no_problem)
    mac = command(net.beta, "ip", "-br", "link", "show", "br0").split()[2]
    for address in ("198.51.100.80", "2001:db8::80"):
        await settled(lambda address=address: net.neighbour(address)[0] == mac)  # type: ignore[misc]
    await failover.withdraw()


async def test_what_cannot_be_announced_is_told_and_the_rest_is_announced(net: Segment) -> None:
    ports = [PORT, attrs.evolve(PORT, name="vnet1", macs=(OLD,))]
    failover = network(ports=ports)
    await failover.prepare(LEARNED)
    tap = open_tap(net.beta, "vnet0")
    command(net.beta, "ip", "link", "delete", "vnet1")
    problems: list[CurlingError] = []
    opened = set(os.listdir("/proc/self/fd"))
    await failover.announce(LEARNED, problems.append)
    assert set(os.listdir("/proc/self/fd")) == opened
    (problem,) = problems
    assert isinstance(problem, NetlinkError) and problem.errno == errno.ENODEV and "vnet1" in problem.what
    await settled(lambda: net.switch_port(MAC) == "to-beta")
    os.close(tap)
    await failover.withdraw()


async def test_a_guests_addresses_are_learned_from_what_passes_its_port(net: Segment) -> None:
    learned = Learned()
    command(net.beta, "ip", "tuntap", "add", "vnet0", "mode", "tap", "vnet_hdr")
    command(net.beta, "ip", "link", "set", "vnet0", "addrgenmode", "none", "master", "br0", "up")
    tap = open_tap(net.beta, "vnet0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snoop, "vnet0", learned)
        await trio.testing.wait_all_tasks_blocked()
        os.write(tap, HEADER + packets.gratuitous_request(MAC, IPv4Address(FOUR), 10))
        os.write(tap, HEADER + packets.advertisement(MAC, IPv6Address(SIX)))
        os.write(tap, HEADER + packets.probe(MAC, IPv4Address("198.51.100.10")))
        await settled(lambda: learned.changes == 2)
        assert learned.bindings == (Binding(MAC, IPv4Address(FOUR), 10), Binding(MAC, IPv6Address(SIX)))
        # Somebody else takes one over.
        send(net.client, "eth0", packets.advertisement(OLD, IPv6Address(SIX)))
        await settled(lambda: len(learned.bindings) == 1)
        # Down and up again, it goes on.
        command(net.beta, "ip", "link", "set", "vnet0", "down")
        command(net.beta, "ip", "link", "set", "vnet0", "up")
        os.write(tap, HEADER + packets.gratuitous_request(MAC, IPv4Address(FOUR)))
        await settled(lambda: len(learned.bindings) == 2)
        nursery.cancel_scope.cancel()
    os.close(tap)


async def test_the_addresses_of_the_file_are_announced_with_the_only_mac(net: Segment) -> None:
    misled_client(net)
    plan = Plan(addresses=(read_guest_address(FOUR), read_guest_address(SIX)), schedule=(0.0,))
    failover = network(plan)
    await failover.prepare({})
    tap = open_tap(net.beta, "vnet0")
    await failover.announce({}, no_problem)
    await settled(lambda: net.neighbour(FOUR)[0] == net.neighbour(SIX)[0] == MAC)
    assert failover.homeless({}) == ()
    two = network(plan, [PORT, attrs.evolve(PORT, name="vnet1", macs=(OLD,))])
    assert two.homeless({}) == (FOUR, SIX)
    os.close(tap)
    await failover.withdraw()


async def test_what_the_kernel_removes_along_with_our_address_is_put_back(net: Segment) -> None:
    """With the last address of an interface go its routes, with the first of a network the others of it."""
    command(net.beta, "ip", "route", "add", "10.77.0.0/16", "dev", "br0", "metric", "3")
    before = seen(net)
    failover = network(full_plan())
    await failover.prepare(LEARNED)
    theirs = ["192.0.2.5/24", "dev", "br0", "label", "br0:dhcp", "valid_lft", "3600", "preferred_lft", "1800"]
    command(net.beta, "ip", "address", "add", *theirs)
    command(net.beta, "ip", "route", "add", "10.78.0.0/16", "via", "192.0.2.9", "src", "192.0.2.5")
    assert await failover.withdraw() == []
    shown = command(net.beta, "ip", "address", "show", "dev", "br0")
    assert "192.0.2.5/24 brd" in shown or "192.0.2.5/24 scope global" in shown
    assert "br0:dhcp" in shown and "valid_lft 3" in shown
    assert "10.77.0.0/16 dev br0 scope link metric 3" in routes(net.beta)
    assert "10.78.0.0/16 via 192.0.2.9 dev br0 src 192.0.2.5" in routes(net.beta)
    command(net.beta, "ip", "route", "delete", "10.78.0.0/16")
    command(net.beta, "ip", "address", "delete", "192.0.2.5/24", "dev", "br0")
    for line in command(net.beta, "ip", "route", "show").splitlines():
        command(net.beta, "ip", "route", "delete", *line.removesuffix("linkdown ").split())
    command(net.beta, "ip", "route", "add", "10.77.0.0/16", "dev", "br0", "metric", "3")
    assert changes(before, seen(net)) == []
    command(net.beta, "ip", "route", "delete", "10.77.0.0/16")


async def test_a_mac_that_is_the_hosts_own_is_refused(net: Segment) -> None:
    own = command(net.beta, "ip", "-br", "link", "show", "uplink").split()[2]
    before = seen(net)
    with pytest.raises(NetworkConflict) as caught:
        await network(ports=[attrs.evolve(PORT, macs=(own,))]).prepare({})
    assert own in str(caught.value) and "br0" in str(caught.value)
    assert changes(before, seen(net)) == []


async def test_a_fixed_way_to_the_guest_is_turned_for_as_long_as_it_is_here(net: Segment) -> None:
    command(net.beta, "bridge", "fdb", "add", MAC, "dev", "uplink", "master", "static")
    before = seen(net)
    failover = network()
    await failover.connect()
    tap = open_tap(net.beta, "vnet0")
    await failover.prepare(LEARNED)
    assert way(net.beta, "br0", MAC) == "vnet0"
    os.close(tap)
    assert await failover.withdraw() == []
    assert changes(before, seen(net)) == []
    command(net.beta, "bridge", "fdb", "delete", MAC, "dev", "uplink", "master")


async def test_what_is_prepared_and_cut_short_is_undone(net: Segment) -> None:
    before = seen(net)
    with trio.move_on_after(0.2) as scope:
        await network(full_plan(patience=5.0)).prepare(LEARNED)
    assert scope.cancelled_caught
    assert changes(before, seen(net)) == []


async def test_what_the_bridge_knew_of_the_guest_is_brought_back_when_it_cannot_come(net: Segment) -> None:
    tap = run_guest_on(net.alpha)
    await settled(lambda: way(net.beta, "br0", MAC) == "uplink")
    before = seen(net)
    failover = network(Plan(routes=(read_route("10.10.0.0/16 via 203.0.113.1"),)))
    await failover.connect()
    waiting = open_tap(net.beta, "vnet0")
    with pytest.raises(NetlinkError):
        await failover.prepare(LEARNED)
    assert way(net.beta, "br0", MAC) == "uplink"
    os.close(waiting)
    await failover.withdraw()
    assert changes(before, seen(net)) == []
    os.close(tap)
