"""Addresses and routes as a VM's file has them: read, or refused with the reason, and written anew."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.network.words import (
    GuestAddress,
    HostAddress,
    Route,
    read_guest_address,
    read_host_address,
    read_route,
)

READERS = {"host": read_host_address, "route": read_route, "guest": read_guest_address}


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("10.9.0.0/16 via 192.0.2.9", Route(ip_network("10.9.0.0/16"), ip_address("192.0.2.9"))),
        ("10.9.0.1 dev br0", Route(ip_network("10.9.0.1/32"), interface="br0")),
        ("default via 192.0.2.9", Route(ip_network("0.0.0.0/0"), ip_address("192.0.2.9"))),
        ("default via fe80::1 dev br0", Route(ip_network("::/0"), ip_address("fe80::1"), "br0")),
        (
            "10.9.0.0/16 onlink metric 5 table main dev br0 via 192.0.2.9 src 192.0.2.80",
            Route(
                ip_network("10.9.0.0/16"),
                ip_address("192.0.2.9"),
                "br0",
                5,
                254,
                ip_address("192.0.2.80"),
                True,
            ),
        ),
        ("blackhole 10.0.0.0/8 metric 9", Route(ip_network("10.0.0.0/8"), metric=9, kind="blackhole")),
        ("unicast 10.0.0.0/8 dev a table default", Route(ip_network("10.0.0.0/8"), interface="a", table=253)),
    ],
)
def test_a_route_is_read_as_ip_would(text: str, route: Route) -> None:
    assert read_route(text) == route
    assert read_route(str(route)) == route


@pytest.mark.parametrize(
    ("what", "text", "said"),
    [
        ("route", "", "nothing is said where DESTINATION"),
        ("route", "blackhole", "nothing is said where DESTINATION"),
        ("route", "10.9.0.0/16", "leads nowhere: add via GATEWAY or dev NAME"),
        ("route", "10.9.0.1/16 dev a", "the network is 10.9.0.0/16"),
        ("route", "10.9/16 dev a", "'10.9/16' is not a network"),
        ("route", "10.9.0.0/16 vía 192.0.2.9", "did you mean via?"),
        ("route", "10.9.0.0/16 metrik 5", "did you mean metric?"),
        ("route", "10.9.0.0/16 onlnk x", "did you mean onlink?"),
        ("route", "10.9.0.0/16 nexthop via", "known are via, dev, metric, table, src, onlink"),
        ("route", "10.9.0.0/16 via", "nothing stands behind via"),
        ("route", "10.9.0.0/16 dev a dev b", "dev is said twice"),
        ("route", "10.9.0.0/16 via 2001:db8::1", "another IP version"),
        ("route", "10.9.0.0/16 via gateway", "'gateway' behind via is not an IP address"),
        ("route", "10.9.0.0/16 via 192.0.2.9 onlink", "onlink needs dev NAME"),
        ("route", "blackhole 10.0.0.0/8 dev a", "leave out via and dev"),
        ("route", "10.9.0.0/16 dev a metric -1", "'-1' behind metric is not a number"),
        ("route", "10.9.0.0/16 dev a metric 4294967296", "from 0 to 4294967295"),
        ("route", "10.9.0.0/16 dev a table local", "kernel's own"),
        ("route", "10.9.0.0/16 dev a table 255", "kernel's own"),
        ("route", "10.9.0.0/16 dev a table wan", "'wan' is not a routing table"),
        ("route", "10.9.0.0/16 dev a table 0", "from 1 to"),
        ("route", "10.9.0.0/16 dev a/b", "is not the name of an interface"),
        ("host", "", "nothing is said"),
        ("host", "192.0.2.80 dev a", "has no prefix length: add /32"),
        ("host", "2001:db8::1 dev a", "add /128"),
        ("host", "192.0.2.80/33 dev a", "'33' is not a prefix length from 0 to 32"),
        ("host", "192.0.2.80/ dev a", "'' is not a prefix length"),
        ("host", "192.0.2.80/24", "add dev NAME"),
        ("host", "host.example/24 dev a", "is not an IP address"),
        ("host", "224.0.0.1/32 dev a", "not an address that a host can have"),
        ("host", "0.0.0.0/32 dev a", "not an address that a host can have"),
        ("host", "fe80::1%a/64 dev a", "is not an IP address"),
        ("host", "192.0.2.80/24 dev a scope site", "is not one of the scopes global, link, host"),
        ("host", "192.0.2.80/24 dev a label b", "a:WORD"),
        ("host", "192.0.2.80/24 dev a label ab", "a:WORD"),
        ("host", "2001:db8::1/64 dev a label a:1", "for IPv4"),
        ("host", "192.0.2.80/24 brd + dev a", "'brd' is not known here"),
        ("guest", "", "nothing is said"),
        ("guest", "198.51.100", "is not an IP address"),
        ("guest", "198.51.100.9 mac 01:00:5e:00:00:01", "is not the MAC of a NIC"),
        ("guest", "198.51.100.9 mac 5254.0012.3456", "is not the MAC of a NIC"),
        ("guest", "198.51.100.9 vlan 4095", "from 1 to 4094"),
        ("guest", "198.51.100.9 dev eth0", "'dev' is not known here"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(what: str, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        READERS[what](text)


names = st.from_regex(r"[a-z][a-z0-9.-]{0,14}", fullmatch=True)
numbers = st.integers(0, 0xFFFF_FFFF)
stations = st.ip_addresses(network="198.18.0.0/15") | st.ip_addresses(network="2001:db8::/32")


@given(
    st.builds(
        HostAddress,
        stations,
        st.integers(0, 32),
        names,
        st.none() | numbers,
        st.none() | st.sampled_from(["global", "link", "host"]),
    )
)
def test_a_host_address_is_written_as_it_is_read(address: HostAddress) -> None:
    assert read_host_address(str(address)) == address


@given(
    st.builds(
        GuestAddress,
        stations,
        st.none() | st.just("52:54:00:12:34:56"),
        st.none() | st.integers(1, 4094),
    )
)
def test_a_guest_address_is_written_as_it_is_read(address: GuestAddress) -> None:
    assert read_guest_address(str(address)) == address


WORDS = """
    default blackhole via dev src table metric onlink scope label mac vlan global main 10.0.0.0/8 10.0.0.1/8
    10.0.0.1 ::/0 2001:db8::/32 fe80::1 52:54:00:12:34:56 br0 br0:1 7 -1 99999999999
"""


@given(st.lists(st.sampled_from(WORDS.split()) | st.text(max_size=6), max_size=9).map(" ".join))
def test_any_words_are_read_or_refused(text: str) -> None:
    for reader in READERS.values():
        try:
            read = reader(text)
        except ValueError:
            continue
        assert reader(str(read)) == read
