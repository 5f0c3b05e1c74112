"""Requests to the kernel have the bytes that bridge(8) 6.1 sends for the same, and answers are read."""

from __future__ import annotations

import struct
from typing import Any, cast

import pytest
from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from curling_fd.netlink.socket import RouteSocket, encode
from curling_fd.network import fdb, kernel
from curling_fd.network.port import Vlan

MAC = "52:54:00:12:34:56"


class Recorder:
    """In place of a RouteSocket: keeps what is asked, answers what it is told."""

    def __init__(self, *answers: nlmsg) -> None:
        self.asked: list[str] = []
        self.answers = list(answers)

    def request(self, message: nlmsg, kind: int, flags: int = 0, *, what: str) -> None:
        packet = encode(message, kind, flags)
        # The sequence number is the socket's.
        self.asked.append(" ".join(packet[at : at + 4].hex() for at in range(0, len(packet), 4)))

    def ask(self, message: nlmsg, kind: int, flags: int = 0, *, what: str) -> list[Any]:
        self.request(message, kind, flags, what=what)
        return self.answers

    dump = ask


def socket(*answers: nlmsg) -> tuple[Recorder, RouteSocket]:
    recorder = Recorder(*answers)
    return recorder, cast(RouteSocket, recorder)


@pytest.mark.parametrize(
    ("vlans", "add", "golden"),
    [
        (
            [Vlan(10, 10, pvid=True, untagged=True)],
            True,
            "2c000000 13000500 00000000 00000000 07000000 03000000 00000000 00000000 "
            "0c001a00 08000200 06000a00",
        ),
        (
            [Vlan(20, 30)],
            True,
            "34000000 13000500 00000000 00000000 07000000 03000000 00000000 00000000 "
            "14001a00 08000200 08001400 "
            "08000200 10001e00",
        ),
        (
            [Vlan(1, 1)],
            False,
            "2c000000 11000500 00000000 00000000 07000000 03000000 00000000 00000000 "
            "0c001a00 08000200 00000100",
        ),
    ],
    ids=["vlan add vid 10 pvid untagged", "vlan add vid 20-30", "vlan del vid 1"],
)
def test_vlans_are_set_as_bridge_does(vlans: list[Vlan], add: bool, golden: str) -> None:
    recorder, route = socket()
    kernel.set_vlans(route, 3, "t0", vlans, add=add)
    assert recorder.asked == [golden]


def test_without_vlans_nothing_is_asked() -> None:
    recorder, route = socket()
    kernel.set_vlans(route, 3, "t0", [], add=True)
    assert recorder.asked == []


def test_the_way_to_a_mac_is_set_as_bridge_does() -> None:
    recorder, route = socket()
    fdb.point(route, fdb.Entry(MAC, 10, 3), "t0")
    assert recorder.asked == [
        "30000000 1c000505 00000000 00000000 07000000 03000000 02000400 0a000200 52540012 34560000 06000500 "
        "0a000000"
    ]


def test_the_way_to_a_mac_is_asked_for_with_its_bridge_and_vlan() -> None:
    answer = ndmsg()
    answer["ifindex"], answer["state"] = 5, fdb.NUD_NOARP
    recorder, route = socket(answer)
    found = fdb.find(route, 2, MAC, 10)
    assert found == fdb.Entry(MAC, 10, 5, fdb.NUD_NOARP) and not found.learned
    (asked,) = recorder.asked
    # The same attributes as `bridge fdb get`, in another order.
    assert set(asked.split()[7:]) >= {"0a000200", "08000900", "06000500", "0a000000"}


def test_vlans_of_a_port_are_read_with_their_ranges() -> None:
    def info(flags: int, id: int) -> bytes:
        return struct.pack("=HHHH", 8, 2, flags, id)

    spec = info(0x06, 10) + info(0x08, 20) + info(0x10, 30) + info(0x0C, 40) + info(0x14, 41) + info(0, 99)

    def answer(index: int, spec: bytes) -> ifinfmsg:
        body = struct.pack("=BxHiII", 7, 1, index, 0, 0) + struct.pack("=HH", 4 + len(spec), 26) + spec
        message = ifinfmsg(struct.pack("=IHHII", 16 + len(body), 16, 0, 0, 0) + body)
        message.decode()
        return message

    _, route = socket(answer(2, info(0, 7)), answer(3, spec))
    assert kernel.vlans(route, 3, "t0") == (
        Vlan(10, 10, pvid=True, untagged=True),
        Vlan(20, 30),
        Vlan(40, 41, untagged=True),
        Vlan(99, 99),
    )
