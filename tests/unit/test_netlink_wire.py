"""Netlink's frame: what the kernel answers is taken apart, and what is no netlink is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.netlink.wire import (
    NLMSG_DONE,
    NLMSG_ERROR,
    Message,
    Verdict,
    WireError,
    addressed,
    messages,
    verdict,
)


def message(kind: int, payload: bytes, flags: int = 0, sequence: int = 1) -> bytes:
    body = struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload
    return body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    body = struct.pack("=HH", 4 + len(value), kind) + value
    return body + bytes(-len(body) % 4)


REQUEST = message(36, b"payload!", 5)
WORDS = attribute(2, struct.pack("=I", 40)) + attribute(1, b"Exclusivity flag on\0")


def said(data: bytes) -> Verdict | None:
    (one,) = messages(data)
    return verdict(one)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (message(NLMSG_ERROR, struct.pack("=i", 0) + REQUEST[:16], 0x100), Verdict(0)),
        (message(NLMSG_ERROR, struct.pack("=i", -17) + REQUEST), Verdict(17)),
        (
            message(NLMSG_ERROR, struct.pack("=i", -17) + REQUEST[:16] + WORDS, 0x300),
            Verdict(17, "Exclusivity flag on"),
        ),
        (
            message(NLMSG_ERROR, struct.pack("=i", -17) + REQUEST + WORDS, 0x200),
            Verdict(17, "Exclusivity flag on"),
        ),
        (message(NLMSG_DONE, b""), Verdict(0)),
        (message(NLMSG_DONE, struct.pack("=i", -22) + WORDS, 0x200), Verdict(22, "Exclusivity flag on")),
        (message(36, b"1234"), None),
    ],
)
def test_an_acknowledgement_says_the_number_and_the_kernels_words(
    data: bytes, expected: Verdict | None
) -> None:
    assert said(data) == expected


def test_several_messages_in_one_datagram_are_told_apart() -> None:
    data = message(16, b"abc", 2, 7) + message(NLMSG_DONE, bytes(4), 0x10, 7)
    one, two = messages(data)
    assert one == Message(16, 2, 7, message(16, b"abc", 2, 7)[:19])
    assert not one.interrupted
    assert two.interrupted


def test_a_message_is_sent_again_under_another_number() -> None:
    assert addressed(REQUEST, 0x01020304) == message(36, b"payload!", 5, 0x01020304)


@pytest.mark.parametrize(
    "data",
    [
        b"1234",
        message(16, b"")[:-1],
        struct.pack("=IHHII", 15, 16, 0, 0, 0),
        struct.pack("=IHHII", 99, 16, 0, 0, 0),
        message(NLMSG_ERROR, b"12"),
        message(NLMSG_ERROR, bytes(12)),
    ],
)
def test_what_is_too_short_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        [verdict(one) for one in messages(data)]


@given(st.binary(max_size=200), st.sampled_from([0, 0x100, 0x200, 0x300]), st.sampled_from([2, 3]))
def test_any_bytes_are_read_or_refused(payload: bytes, flags: int, kind: int) -> None:
    for data in (payload, message(kind, payload, flags)):
        try:
            [verdict(one) for one in messages(data)]
        except WireError:
            pass
