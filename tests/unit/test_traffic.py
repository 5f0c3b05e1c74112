"""The bytes of every message about qdiscs and filters, field by field."""

from __future__ import annotations

import struct

import pytest
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from curling_fd.netlink.socket import (
    RTM_DELQDISC,
    RTM_DELTFILTER,
    RTM_GETQDISC,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    encode,
)
from curling_fd.netlink.traffic import (
    Filter,
    PlugAction,
    Qdisc,
    filter_of,
    found_filter,
    ingress_qdisc,
    plug_qdisc,
    qdisc_of,
    redirect,
    root_qdisc_question,
)
from curling_fd.netlink.wire import NLM_F_CREATE, NLM_F_EXCL

NEW = NLM_F_CREATE | NLM_F_EXCL


def golden(message: tcmsg, kind: int, flags: int = 0) -> str:
    return encode(message, kind, flags).hex(" ", 4)


def test_an_ingress_qdisc() -> None:
    assert golden(ingress_qdisc(3), RTM_NEWQDISC, NEW) == (
        "30000000 24000506 00000000 00000000 "  # length, type, REQUEST|ACK|EXCL|CREATE, sequence, port
        "00000000 03000000 0000ffff f1ffffff 00000000 "  # family, interface 3, ffff:, TC_H_INGRESS, info
        "0c000100 696e6772 65737300"  # TCA_KIND "ingress"
    )
    assert golden(ingress_qdisc(3), RTM_DELQDISC) == (
        "30000000 25000500 00000000 00000000 00000000 03000000 0000ffff f1ffffff 00000000 "
        "0c000100 696e6772 65737300"
    )


def test_a_new_plug_with_its_limit() -> None:
    assert golden(plug_qdisc(7, PlugAction.BUFFER, 0x01000000), RTM_NEWQDISC, NEW) == (
        "3c000000 24000506 00000000 00000000 "
        "00000000 07000000 00000100 ffffffff 00000000 "  # interface 7, 1:, TC_H_ROOT
        "09000100 706c7567 00000000 "  # TCA_KIND "plug"
        "0c000200 00000000 00000001"  # TCA_OPTIONS: struct tc_plug_qopt {action, limit}
    )


@pytest.mark.parametrize(
    ("action", "limit", "option"),
    [
        (PlugAction.BUFFER, 0, "00000000 00000000"),
        (PlugAction.RELEASE_ONE, 0, "01000000 00000000"),
        (PlugAction.RELEASE_INDEFINITE, 0, "02000000 00000000"),
        (PlugAction.LIMIT, 0xFFFFFFFF, "03000000 ffffffff"),
    ],
)
def test_every_order_to_a_plug(action: PlugAction, limit: int, option: str) -> None:
    assert golden(plug_qdisc(7, action, limit), RTM_NEWQDISC) == (
        "3c000000 24000500 00000000 00000000 "  # neither EXCL nor CREATE: it must be there
        "00000000 07000000 00000100 ffffffff 00000000 09000100 706c7567 00000000 "
        f"0c000200 {option}"
    )


def test_the_redirection_of_all_that_a_port_receives() -> None:
    assert golden(redirect(3, 7), RTM_NEWTFILTER, NEW) == (
        "70000000 2c000506 00000000 00000000 "
        "00000000 03000000 01000000 f2ffffff 00030200 "  # handle 1, parent ffff:fff2, priority 2, ETH_P_ALL
        "0d000100 6d617463 68616c6c 00000000 "  # TCA_KIND "matchall"
        "3c000200 "  # TCA_OPTIONS
        "38000200 "  # TCA_MATCHALL_ACT
        "34000100 "  # the first action
        "0b000100 6d697272 65640000 "  # TCA_ACT_KIND "mirred"
        "24000280 "  # TCA_ACT_OPTIONS, nested
        "20000200 00000000 00000000 04000000 00000000 00000000 01000000 07000000"
        # TCA_MIRRED_PARMS: index, capab, TC_ACT_STOLEN, refcnt, bindcnt, TCA_EGRESS_REDIR, interface 7
    )


def test_the_end_of_a_filter_that_was_found() -> None:
    found = Filter("matchall", 2, 0x0300, 1, 7)
    assert golden(found_filter(3, found), RTM_DELTFILTER) == (
        "34000000 2d000500 00000000 00000000 "
        "00000000 03000000 01000000 f2ffffff 00030200 "
        "0d000100 6d617463 68616c6c 00000000"
    )


def test_the_question_for_a_root_qdisc() -> None:
    assert golden(root_qdisc_question(7), RTM_GETQDISC) == (
        "24000000 26000500 00000000 00000000 00000000 07000000 00000000 ffffffff 00000000"
    )


def attribute(kind: int, value: bytes) -> bytes:
    body = struct.pack("=HH", 4 + len(value), kind) + value
    return body + bytes(-len(body) % 4)


def answer(kind: int, body: bytes) -> tcmsg:
    message = tcmsg(struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body)
    message.decode()
    return message


def test_the_statistics_of_a_plug_are_read() -> None:
    queue = struct.pack("=IIIII", 12, 1176, 3, 0, 0)
    body = struct.pack("=IiIII", 0, 7, 0x10000, 0xFFFFFFFF, 2)
    body += attribute(1, b"plug\0") + attribute(7, attribute(1, bytes(12)) + attribute(3, queue))
    assert qdisc_of(answer(RTM_NEWQDISC, body)) == Qdisc(7, "plug", 0x10000, 0xFFFFFFFF, 12, 1176, 3)


def test_our_filter_is_known_by_where_it_leads() -> None:
    message = encode(redirect(3, 7), RTM_NEWTFILTER)
    assert filter_of(answer(RTM_NEWTFILTER, message[16:])) == Filter("matchall", 2, 0x0300, 1, 7)


def test_a_filter_of_others_leads_nowhere() -> None:
    body = struct.pack("=IiIII", 0, 3, 0x80000800, 0xFFFF0000, 1 << 16 | 0x0008)
    foreign = answer(RTM_NEWTFILTER, body + attribute(1, b"u32\0") + attribute(2, b"what ever it is."))
    assert filter_of(foreign) == Filter("u32", 1, 8, 0x80000800, None)
