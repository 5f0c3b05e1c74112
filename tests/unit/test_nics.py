"""What `info network` says, as QEMU 7.2 and 11.1 printed it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from curling_fd.output.nics import Nic, parse_nics

SEEN = """\
st0: index=0,type=stream,
rtl8139.0: index=0,type=nic,model=rtl8139,macaddr=52:54:00:12:34:56
 \\ #net079: index=0,type=user,net=10.0.2.0,restrict=off
nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33
 \\ hn0: index=0,type=tap,ifname=tapx,script=no,downscript=no
e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57
 \\ hn1: index=0,type=user,net=10.0.2.0,restrict=off
"""


def test_cards_are_told_from_netdevs_and_know_what_is_behind_them() -> None:
    assert parse_nics(SEEN) == (
        Nic("rtl8139.0", "52:54:00:12:34:56", "#net079", "user"),
        Nic("nic0", "52:54:00:11:22:33", "hn0", "tap", tap="tapx"),
        Nic("e1000.0", "52:54:00:12:34:57", "hn1", "user"),
    )


def test_a_card_with_several_queues_is_one() -> None:
    queue = "nic0: index={0},type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33\r\n"
    queue += " \\ hn0: index={0},type=tap,fd={0}\r\n"
    text = "".join(queue.format(number) for number in range(4))
    assert parse_nics(text) == (Nic("nic0", "52:54:00:11:22:33", "hn0", "tap", fd=0),)


def test_a_card_that_is_connected_to_nothing_has_no_netdev() -> None:
    text = "e1000.1: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\n"
    assert parse_nics(text + SEEN)[0] == Nic("e1000.1", "52:54:00:12:34:57", None, None)
    assert parse_nics(text) == (Nic("e1000.1", "52:54:00:12:34:57", None, None),)


def test_a_vm_without_a_network_has_no_cards() -> None:
    assert parse_nics("") == ()


@given(st.text())
def test_any_other_text_does_no_harm(text: str) -> None:
    parse_nics(text)
