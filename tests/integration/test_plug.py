"""Putting plugs into place: refused where they cannot be, and then nothing is left of it.

What a plug does with packets is tested in tests/vm/test_plug.py: this machine's kernel may have none.
"""

from __future__ import annotations

import subprocess

import pytest

from curling_fd.errors import ModuleMissing, OutputError, PortTaken
from curling_fd.netlink.links import link
from curling_fd.netlink.socket import RouteSocket
from curling_fd.output.placement import Placement, interface_name, lead_in, leftovers, remove
from curling_fd.output.plug import PlugHold
from curling_fd.sentences import sentence
from tests.lab.debs import run
from tests.lab.hosts import Host, lone_host

LIMIT = 16 << 20


def state(host: Host) -> str:
    """All that `attach` could change, as the tools of others see it."""
    with host.entered():
        return run(["ip", "-d", "link"]) + run(["tc", "qdisc"])


def port(host: Host, name: str = "vnet0") -> None:
    with host.entered():
        run(["ip", "tuntap", "add", name, "mode", "tap"])
        run(["ip", "link", "set", name, "addrgenmode", "none"])
        run(["ip", "link", "set", name, "up"])


def kernel_has_plug() -> bool:
    with lone_host("plug") as host, host.entered():
        return not subprocess.run(
            ["tc", "qdisc", "add", "dev", "lo", "root", "plug"], capture_output=True
        ).returncode


async def attach(host: Host, *ports: str) -> PlugHold:
    hold = PlugHold(ports, limit=LIMIT, vm="db1")
    with host.entered():
        await hold.attach()
    return hold


async def test_attaching_is_done_whole_or_names_the_missing_module_and_leaves_nothing(lone: Host) -> None:
    port(lone)
    before = state(lone)
    if kernel_has_plug():
        hold = await attach(lone, "vnet0")
        assert state(lone) != before
        await hold.detach()
    else:
        with pytest.raises(ModuleMissing) as caught:
            await attach(lone, "vnet0")
        assert (caught.value.what, caught.value.module) == ("vnet0", "sch_plug")
        assert "linux-image-amd64" in sentence(caught.value).remedy
    assert state(lone) == before
    with lone.entered(), RouteSocket() as route:
        assert leftovers(route) == []


@pytest.mark.parametrize("there", [["ingress"], ["clsact"]])
async def test_a_port_with_somebody_elses_qdisc_is_refused(lone: Host, there: list[str]) -> None:
    port(lone, "vnet0")
    port(lone, "vnet1")
    with lone.entered():
        run(["tc", "qdisc", "add", "dev", "vnet1", *there])
    before = state(lone)
    with pytest.raises(PortTaken) as caught:
        await attach(lone, "vnet0", "vnet1")
    assert (caught.value.what, caught.value.qdisc) == ("vnet1", there[0])
    assert f"tc qdisc del dev vnet1 {there[0]}" in sentence(caught.value).remedy
    assert state(lone) == before


async def test_a_port_that_is_not_there_is_named(lone: Host) -> None:
    port(lone)
    before = state(lone)
    with pytest.raises(OutputError, match="vnet7") as caught:
        await attach(lone, "vnet0", "vnet7")
    assert caught.value.what == "vnet7"
    assert state(lone) == before


async def test_an_interface_of_the_name_we_need_is_not_touched(lone: Host) -> None:
    port(lone)
    with lone.entered():
        run(["ip", "link", "add", "plug-vnet0", "type", "ifb"])
        run(["ip", "link", "set", "plug-vnet0", "alias", "curling:db1"])
    before = state(lone)
    with pytest.raises(OutputError, match="an interface plug-vnet0 is there already, of db1"):
        await attach(lone, "vnet0")
    assert state(lone) == before


async def test_what_is_left_over_without_a_port_is_found_and_taken_away(lone: Host) -> None:
    port(lone)
    before = state(lone)
    with lone.entered():
        run(["ip", "link", "add", "plug-vnet0", "type", "ifb"])
        run(["ip", "link", "set", "plug-vnet0", "alias", "curling:db1"])
        run(["ip", "link", "add", "ifb9", "type", "ifb"])
        with RouteSocket() as route:
            (left,) = leftovers(route)
            assert leftovers(route, ["db2"]) == []
        assert (left.vm, left.complete, left.placements[0].interface) == ("db1", False, "plug-vnet0")
        hold = PlugHold.adopt(left, limit=LIMIT)
        await hold.drop()
        await hold.detach()
        await hold.detach()
        run(["ip", "link", "delete", "ifb9"])
    assert state(lone) == before


def test_a_redirection_that_fails_leaves_no_qdisc(lone: Host) -> None:
    port(lone)
    before = state(lone)
    with lone.entered(), RouteSocket() as route:
        placement = Placement("vnet0", link(route, "vnet0").index, "plug-vnet0", 4711)
        with pytest.raises(OutputError):
            lead_in(route, placement)
        assert state(lone) == before
        remove(route, placement)
    assert state(lone) == before


def test_names_of_interfaces_fit_and_differ() -> None:
    assert interface_name("vnet0") == "plug-vnet0"
    assert interface_name("a234567890") == "plug-a234567890"
    long = [
        interface_name(name) for name in ("a2345678901", "tap4fb1c2d3-9a", "tap4fb1c2d3-9b", "\u00e9" * 7)
    ]
    assert len(set(long)) == 4
    assert all(len(name.encode()) == 15 and name.startswith("plug-") for name in long)


def test_a_hold_without_ports_or_with_one_twice_is_refused() -> None:
    for ports in ([], ["vnet0", "vnet0"]):
        with pytest.raises(ValueError, match="ports that differ"):
            PlugHold(ports, limit=LIMIT, vm="db1")
