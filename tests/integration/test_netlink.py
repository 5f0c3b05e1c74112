"""The kernel's network, asked over netlink: what it does, what it refuses, and in which words."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import prctl
import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from curling_fd.errors import NetlinkError
from curling_fd.netlink.links import find_link, link, link_of, links
from curling_fd.netlink.socket import (
    RTM_DELLINK,
    RTM_GETADDR,
    RTM_GETQDISC,
    RTM_NEWLINK,
    RTM_NEWQDISC,
    RTMGRP_LINK,
    RouteSocket,
)
from curling_fd.netlink.wire import NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL
from curling_fd.sentences import sentence
from tests.lab.hosts import Host


@pytest.fixture
def route(lone: Host) -> Iterator[RouteSocket]:
    with lone.entered(), RouteSocket() as made:
        yield made


def new_link(name: str, kind: str = "ifb") -> ifinfmsg:
    message = ifinfmsg()
    message["attrs"] = [("IFLA_IFNAME", name), ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind)]})]
    return message


def create(route: RouteSocket, name: str, kind: str = "ifb") -> None:
    flags = NLM_F_CREATE | NLM_F_EXCL
    route.request(new_link(name, kind), RTM_NEWLINK, flags, what=f"the interface {name}")


def test_an_interface_is_made_found_and_deleted(route: RouteSocket) -> None:
    create(route, "one")
    found = link(route, "one")
    assert (found.name, found.kind, found.up) == ("one", "ifb", False)
    assert link(route, found.index) == found
    assert [each.name for each in links(route)] == ["lo", "one"]
    message = ifinfmsg()
    message["index"] = found.index
    route.request(message, RTM_DELLINK, what="the interface one")
    assert find_link(route, "one") is None
    assert find_link(route, found.index) is None


def test_what_is_there_already_is_told_by_its_number_and_name(route: RouteSocket) -> None:
    create(route, "one")
    with pytest.raises(NetlinkError) as caught:
        create(route, "one")
    assert caught.value.errno == errno.EEXIST
    said = sentence(caught.value)
    assert said.text == "The kernel refused the interface one: File exists (EEXIST, error 17)."
    assert "already" in said.remedy


@pytest.mark.parametrize("which", ["none", 4711, "", "a name longer than fifteen"])
def test_an_interface_that_is_not_there_is_enodev(route: RouteSocket, which: str | int) -> None:
    with pytest.raises(NetlinkError) as caught:
        link(route, which)
    assert str(which) in str(caught.value)
    assert caught.value.errno == errno.ENODEV


def test_the_kernels_own_words_are_in_the_error(route: RouteSocket) -> None:
    create(route, "one")
    message = tcmsg()
    message["index"] = link(route, "one").index
    message["handle"] = 0x10000
    message["parent"] = 0xFFFFFFFF
    message["attrs"] = [("TCA_KIND", "no_such")]
    with pytest.raises(NetlinkError) as caught:
        route.request(message, RTM_NEWQDISC, NLM_F_CREATE, what="the qdisc no_such on one")
    assert caught.value.errno == errno.ENOENT
    assert "qdisc kind is unknown" in str(caught.value)


def test_without_the_right_it_is_eperm(lone: Host) -> None:
    caught: list[NetlinkError] = []

    def refused() -> None:
        # Capabilities are a thread's own: this one gives one up, and ends.
        with lone.entered(), RouteSocket() as route:
            prctl.cap_effective.net_admin = False
            try:
                create(route, "one")
            except NetlinkError as error:
                caught.append(error)
            finally:
                prctl.cap_effective.net_admin = True

    thread = threading.Thread(target=refused)
    thread.start()
    thread.join()
    assert caught[0].errno == errno.EPERM
    assert "CAP_NET_ADMIN" in sentence(caught[0]).remedy


def test_what_belongs_to_another_is_ebusy(route: RouteSocket) -> None:
    create(route, "port", "veth")
    create(route, "br0", "bridge")
    bridge, port = link(route, "br0"), link(route, "port")
    message = ifinfmsg()
    message["index"] = port.index
    message["attrs"] = [("IFLA_MASTER", bridge.index)]
    route.request(message, RTM_NEWLINK, what="port as a port of br0")
    assert link(route, "port").master == bridge.index
    message = new_link("macvlan0", "macvlan")
    message["attrs"].append(("IFLA_LINK", port.index))
    with pytest.raises(NetlinkError, match="macvlan0 on port") as caught:
        route.request(message, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, what="the interface macvlan0 on port")
    assert caught.value.errno == errno.EBUSY
    assert "Another program" in sentence(caught.value).remedy


def test_one_object_is_asked_for_and_answered(route: RouteSocket) -> None:
    message = tcmsg()
    message["index"] = link(route, "lo").index
    message["parent"] = 0xFFFFFFFF
    (answer,) = route.ask(message, RTM_GETQDISC, NLM_F_ECHO, what="the qdisc of lo")
    assert answer.get_attr("TCA_KIND") == "noqueue"


def test_a_dump_of_many_is_whole(route: RouteSocket) -> None:
    for number in range(200):
        create(route, f"dev{number}", "bridge")
    names = {each.name for each in links(route)}
    assert names == {"lo"} | {f"dev{number}" for number in range(200)}
    addresses = route.dump(ifaddrmsg(), RTM_GETADDR, what="the addresses")
    assert {address.get_attr("IFA_ADDRESS") for address in addresses} == {"127.0.0.1", "::1"}


def test_a_socket_with_groups_hears_and_does_not_ask(route: RouteSocket, lone: Host) -> None:
    with lone.entered(), RouteSocket(groups=RTMGRP_LINK) as listener:
        assert listener.announcements() == []
        create(route, "one")
        (announced,) = listener.announcements()
        assert announced["header"]["type"] == RTM_NEWLINK
        assert link_of(announced).name == "one"
        with pytest.raises(RuntimeError):
            links(listener)


def test_announcements_that_were_lost_are_told_as_lost(route: RouteSocket, lone: Host) -> None:
    with lone.entered(), RouteSocket(groups=RTMGRP_LINK) as listener:
        for number in range(300):
            create(route, f"dev{number}", "bridge")
        with pytest.raises(OSError, match="No buffer space") as caught:
            listener.announcements()
        assert caught.value.errno == errno.ENOBUFS
        assert listener.announcements() == [], "what is older than the loss would only mislead"


def test_threads_share_a_socket(route: RouteSocket) -> None:
    found: set[int] = set()

    def ask() -> None:
        for _ in range(50):
            found.add(link(route, "lo").index)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {link(route, "lo").index}


def test_a_closed_socket_says_so(lone: Host) -> None:
    with lone.entered():
        route = RouteSocket()
    route.close()
    route.close()
    assert route.fileno() == -1
    with pytest.raises(NetlinkError, match="Bad file descriptor"):
        links(route)
