"""A VM's port as it travels to the other host."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.network.packets import is_mac
from curling_fd.network.port import BRIDGE_FLAGS, Port, Vlan, is_name, own_mac

MAC = "52:54:00:12:34:56"

names = st.text(min_size=1, max_size=15).filter(is_name)
macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":")).filter(is_mac)
vlans = st.lists(
    st.tuples(st.integers(1, 4094), st.booleans()), unique_by=lambda vlan: vlan[0], max_size=8
).map(lambda ids: tuple(Vlan(id, id, False, untagged) for id, untagged in ids))
ports = st.builds(
    Port,
    names,
    st.integers(68, 65535),
    st.lists(macs, max_size=3).map(tuple),
    st.none() | names,
    st.none() | vlans,
    st.dictionaries(st.sampled_from(sorted(BRIDGE_FLAGS.values())), st.booleans()),
    st.none() | st.integers(0, 0xFFFF_FFFE),
    st.none() | st.integers(0, 0xFFFF_FFFE),
    st.booleans(),
    st.integers(0, 1_000_000),
)


@given(ports)
def test_a_port_travels_as_json(port: Port) -> None:
    assert Port.decode(json.loads(json.dumps(port.encode()))) == port


def test_a_newer_peer_may_say_more_and_an_older_one_less() -> None:
    assert Port.decode({"name": "vnet0", "colour": "blue", "flags": {"colour": True}}) == Port("vnet0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 1}, "name of a port is '1'"),
        ({"name": "../x"}, "'../x' is not the name"),
        ({"name": ""}, "'' is not the name"),
        ({"name": "a b"}, "is not the name"),
        ({"name": "x" * 16}, "is not the name"),
        ({"bridge": "a/b"}, "not the name of a bridge"),
        ({"mtu": 67}, "mtu of a port is 67"),
        ({"mtu": True}, "mtu of a port is 'True'"),
        ({"mtu": "1500"}, "mtu of a port"),
        ({"macs": "a"}, "macs of a port"),
        ({"macs": ["ff:ff:ff:ff:ff:ff"]}, "macs of a port"),
        ({"macs": [MAC] * 17}, "macs of a port"),
        ({"owner": -1}, "owner of a port"),
        ({"owner": 0xFFFFFFFF}, "owner of a port"),
        ({"vlans": [1]}, "a VLAN of a port is 1"),
        ({"vlans": [[1, 4095, False, False]]}, "a VLAN of a port"),
        ({"vlans": [[2, 1, False, False]]}, "a VLAN of a port"),
        ({"vlans": [[1, 2, True, False]]}, "a VLAN of a port"),
        ({"vlans": [[1, 1, 1, False]]}, "a VLAN of a port"),
        ({"vlans": [[5, 9, False, False], [1, 5, False, False]]}, "in one VLAN twice"),
        ({"vlans": [[n, n, True, False] for n in (1, 2)]}, "two for untagged frames"),
        ({"multi_queue": 1}, "multi_queue of a port"),
        ({"flags": []}, "flags of a port"),
        ({"queue_length": -1}, "queue_length of a port"),
    ],
)
def test_a_port_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Port.decode(Port("vnet0").encode() | change)


@pytest.mark.parametrize("value", [None, [], "vnet0", {}])
def test_what_describes_no_port_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="port"):
        Port.decode(value)


def test_the_taps_own_mac_is_high_and_never_one_of_the_guests() -> None:
    assert own_mac([MAC], "vnet0") == "fe:54:00:12:34:56"
    assert own_mac(["fe:54:00:12:34:56"], "vnet0") == "fa:54:00:12:34:56"
    assert own_mac([MAC, "fe:54:00:12:34:56"], "vnet0") == "fa:54:00:12:34:56"
    assert own_mac([], "vnet0") == "fe:76:6e:65:74:30"


@given(st.lists(macs, max_size=3), names)
def test_the_taps_own_mac_is_one_that_a_station_can_have(taken: list[str], name: str) -> None:
    mac = own_mac(taken, name)
    assert is_mac(mac) and mac not in taken and int(mac[:2], 16) & 2


def test_the_vlan_of_untagged_frames() -> None:
    assert Port("a", vlans=(Vlan(1, 4), Vlan(5, 5, pvid=True))).pvid == 5
    assert Port("a", vlans=(Vlan(1, 1),)).pvid is None
    assert Port("a").pvid is None
