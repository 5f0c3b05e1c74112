"""How a client and a server of NBD agree: with each other, with what is written down, and with nonsense."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.errors import NbdError
from curling_fd.nbd import client, server
from curling_fd.nbd.client import Remote
from curling_fd.nbd.protocol import (
    ALLOCATION,
    LONGEST_MESSAGE,
    BlockSizes,
    Flag,
    Info,
    Option,
    Rep,
    option,
    option_reply,
    prefixed,
)
from curling_fd.nbd.server import Export, Session
from tests.unit.nbd_streams import Outcome, talk

GREETING = b"NBDMAGICIHAVEOPT\0\3"
FLAGS = b"\0\0\0\3"
DISK = Export("disk", 1 << 30, allocation=True)
OTHER = Export("other", 12345)


def served(*options: bytes, exports: tuple[Export, ...] = (DISK, OTHER)) -> Outcome[Session | None]:
    return talk(server.negotiate(exports), FLAGS + b"".join(options))


def replies(outcome: Outcome[Session | None]) -> list[tuple[int, int, bytes]]:
    """Option, reply and data of each reply."""
    data = outcome.sent.removeprefix(GREETING)
    found = []
    while data:
        magic, kind, reply, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        found.append((kind, reply, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def info(kind: Option, name: str, *wanted: int) -> bytes:
    return option(kind, prefixed(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted))


def contexts(kind: Option, name: str, *queries: str) -> bytes:
    return option(kind, prefixed(name) + struct.pack(">I", len(queries)) + b"".join(map(prefixed, queries)))


STRUCTURED = option(Option.STRUCTURED_REPLY)


def test_it_begins_as_the_source_says() -> None:
    assert talk(server.negotiate([DISK]), b"").sent == GREETING


def test_an_export_is_chosen_with_go() -> None:
    outcome = served(info(Option.GO, "disk", Info.BLOCK_SIZE))
    assert outcome.result == Session("disk")
    assert replies(outcome) == [
        (7, 3, struct.pack(">HQH", 0, 1 << 30, 1 | 4 | 8 | 32 | 64)),
        (7, 3, struct.pack(">HIII", 3, 1, 4096, 32 << 20)),
        (7, 1, b""),
    ]


def test_info_tells_the_same_and_chooses_nothing() -> None:
    outcome = served(info(Option.INFO, "other", Info.NAME))
    assert not outcome.over
    assert [reply for _, reply, _ in replies(outcome)] == [Rep.INFO, Rep.INFO, Rep.INFO, Rep.ACK]
    assert (6, 3, b"\0\1other") in replies(outcome)


@pytest.mark.parametrize(("flags", "zeroes"), [(b"\0\0\0\3", b""), (b"\0\0\0\1", bytes(124))])
def test_the_old_way_to_choose_works(flags: bytes, zeroes: bytes) -> None:
    outcome = talk(server.negotiate([DISK]), flags + option(Option.EXPORT_NAME, b"disk"))
    assert outcome.result == Session("disk")
    assert outcome.sent == GREETING + struct.pack(">QH", 1 << 30, 0x6D) + zeroes


def test_the_old_way_has_no_word_for_an_export_that_is_not_there() -> None:
    outcome = served(option(Option.EXPORT_NAME, b"tape"))
    assert outcome.error is not None and "'tape'" in outcome.error.problem


def test_an_export_that_is_not_there_is_not_known() -> None:
    outcome = served(info(Option.GO, "tape"), info(Option.GO, "disk"))
    assert replies(outcome)[0][1] == Rep.ERR_UNKNOWN
    assert outcome.result == Session("disk")


def test_exports_are_listed() -> None:
    assert replies(served(option(Option.LIST))) == [
        (3, 2, b"\0\0\0\4disk"),
        (3, 2, b"\0\0\0\5other"),
        (3, 1, b""),
    ]


def test_a_client_may_leave_without_choosing() -> None:
    outcome = served(option(Option.ABORT))
    assert outcome.over and outcome.result is None
    assert replies(outcome) == [(2, 1, b"")]


def test_a_client_that_leaves_need_not_wait_for_the_answer() -> None:
    steps = server.negotiate([DISK])
    assert next(steps) == GREETING
    for received in (b"", FLAGS, option(Option.ABORT)):
        steps.send(received)
    with pytest.raises(StopIteration) as stop:
        steps.throw(NbdError("the connection broke"))
    assert stop.value.value is None


def test_tls_is_refused_and_what_is_not_known_too() -> None:
    outcome = served(
        option(Option.STARTTLS), option(11), option(0x7FFFFFFF, b"data"), info(Option.GO, "disk")
    )
    assert [reply for _, reply, _ in replies(outcome)][:3] == [Rep.ERR_POLICY, Rep.ERR_UNSUP, Rep.ERR_UNSUP]
    assert outcome.result == Session("disk")


def test_structured_replies_and_block_status_are_had_when_asked_for() -> None:
    outcome = served(
        STRUCTURED,
        contexts(Option.SET_META_CONTEXT, "disk", "qemu:dirty-bitmap:x", ALLOCATION),
        info(Option.GO, "disk"),
    )
    assert (10, 4, b"\0\0\0\1base:allocation") in replies(outcome)
    assert outcome.result == Session("disk", structured=True, allocation=True)


def test_block_status_is_for_the_export_it_was_asked_for() -> None:
    asked = contexts(Option.SET_META_CONTEXT, "disk", ALLOCATION)
    assert served(STRUCTURED, asked, info(Option.GO, "other")).result == Session("other", structured=True)


def test_the_last_choice_of_contexts_counts() -> None:
    asked = contexts(Option.SET_META_CONTEXT, "disk", ALLOCATION)
    taken_back = contexts(Option.SET_META_CONTEXT, "disk")
    outcome = served(STRUCTURED, asked, taken_back, info(Option.GO, "disk"))
    assert outcome.result == Session("disk", structured=True)


def test_contexts_are_listed_without_being_chosen() -> None:
    for queries in ((), ("base:",), (ALLOCATION,)):
        outcome = served(
            STRUCTURED, contexts(Option.LIST_META_CONTEXT, "disk", *queries), info(Option.GO, "disk")
        )
        assert (9, 4, b"\0\0\0\0base:allocation") in replies(outcome)
        assert outcome.result == Session("disk", structured=True)


@pytest.mark.parametrize("kind", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_structured_replies(kind: Option) -> None:
    assert replies(served(contexts(kind, "disk", ALLOCATION)))[0][1] == Rep.ERR_INVALID


@pytest.mark.parametrize(
    "broken",
    [
        option(Option.LIST, b"x"),
        option(Option.STRUCTURED_REPLY, b"x"),
        option(Option.GO),
        option(Option.GO, b"\0\0\0\5disk\0\0"),
        option(Option.GO, b"\xff\xff\xff\xffdisk\0\0"),
        option(Option.GO, b"\0\0\0\4disk\0\2\0\1"),
        option(Option.GO, b"\0\0\0\4disk\0\0rest"),
        option(Option.GO, b"\0\0\0\4di\0k\0\0"),
        option(Option.GO, b"\0\0\0\4di\xffk\0\0"),
    ],
)
def test_an_option_that_is_wrong_in_itself_is_invalid_and_no_more(broken: bytes) -> None:
    outcome = served(broken, info(Option.GO, "disk"))
    assert replies(outcome)[0][1] == Rep.ERR_INVALID
    assert outcome.result is not None


def test_who_needs_larger_blocks_says_so() -> None:
    large = Export("disk", 1 << 20, BlockSizes(minimum=4096))
    outcome = served(info(Option.GO, "disk"), info(Option.GO, "disk", Info.BLOCK_SIZE), exports=(large,))
    assert replies(outcome)[0][1] == Rep.ERR_BLOCK_SIZE_REQD
    assert outcome.result == Session("disk")


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\7",
        FLAGS + b"IHAVEOPS" + bytes(8),
        FLAGS + struct.pack(">8sII", b"IHAVEOPT", Option.GO, LONGEST_MESSAGE + 1),
        FLAGS + option(Option.LIST) * 100,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_breaks_the_rules_ends_the_connection(data: bytes) -> None:
    assert talk(server.negotiate([DISK]), data).error is not None


def meet(name: str, exports: list[Export]) -> tuple[Outcome[Remote], Outcome[Session | None]]:
    """Have a client and a server talk until neither says more."""
    to_server = b""
    while True:
        theirs = talk(server.negotiate(exports), to_server)
        ours = talk(client.negotiate(name), theirs.sent)
        if ours.sent == to_server:
            return ours, theirs
        to_server = ours.sent


@pytest.mark.parametrize("allocation", [True, False])
def test_our_client_and_our_server_agree(allocation: bool) -> None:
    disk = Export("dïsk", 512, BlockSizes(512, 4096, 1 << 20), read_only=True, allocation=allocation)
    ours, theirs = meet("dïsk", [OTHER, disk])
    assert theirs.result == Session("dïsk", structured=True, allocation=allocation)
    flags = Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.SEND_DF
    assert ours.result == Remote(
        512, flags, disk.blocks, structured=True, allocation=1 if allocation else None
    )


def test_our_client_says_what_the_server_said_no_with_and_leaves() -> None:
    ours, theirs = meet("tape", [DISK])
    assert ours.error is not None and "there is no export 'tape'" in ours.error.problem
    assert theirs.over and theirs.result is None


def test_our_client_takes_a_server_without_structured_replies() -> None:
    no = option_reply(Option.STRUCTURED_REPLY, Rep.ERR_UNSUP)
    size = option_reply(Option.GO, Rep.INFO, struct.pack(">HQH", 0, 4096, 1))
    outcome = talk(client.negotiate("x"), GREETING + no + size + option_reply(Option.GO, Rep.ACK))
    assert outcome.result == Remote(4096, Flag.HAS_FLAGS)


@pytest.mark.parametrize(
    "data",
    [
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"NBDMAGICIHAVEOPT\0\0",
        GREETING + option_reply(Option.GO, Rep.ACK),
        GREETING + option_reply(Option.STRUCTURED_REPLY, Rep.SERVER) * 2000,
        GREETING + struct.pack(">QIII", 0x3E889045565A9, 8, 1, 1 << 20),
        GREETING + option_reply(8, Rep.ERR_UNSUP) + option_reply(7, Rep.ACK),
        GREETING + option_reply(8, Rep.ERR_UNSUP) + option_reply(7, Rep.INFO, b"\0") + option_reply(7, 1),
        GREETING
        + option_reply(8, Rep.ERR_UNSUP)
        + option_reply(7, Rep.INFO, struct.pack(">HIII", 3, 0, 0, 0))
        + option_reply(7, Rep.ACK),
    ],
)
def test_our_client_gives_a_server_up_that_breaks_the_rules(data: bytes) -> None:
    assert talk(client.negotiate("x"), data).error is not None


OPTIONS = st.one_of(
    st.builds(
        option,
        st.one_of(st.sampled_from(Option), st.integers(0, 0xFFFFFFFF)),
        st.one_of(st.binary(max_size=40), st.just(prefixed("disk")), st.just(prefixed("disk") + b"\0\0")),
    ),
    st.builds(
        info, st.sampled_from((Option.INFO, Option.GO)), st.sampled_from(("disk", "x")), st.integers(0, 9)
    ),
    st.just(STRUCTURED),
    st.builds(
        contexts,
        st.sampled_from((Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)),
        st.sampled_from(("disk", "other", "x")),
        st.sampled_from((ALLOCATION, "base:", "qemu:")),
    ),
)
REPLIES = st.builds(
    option_reply,
    st.sampled_from((Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO)),
    st.one_of(st.sampled_from(Rep), st.integers(0, 0xFFFFFFFF)),
    st.one_of(
        st.just(b""),
        st.binary(max_size=20),
        st.just(b"\0\0\0\1base:allocation"),
        st.builds(lambda size: struct.pack(">HQH", 0, size, 1), st.integers(0, 2**64 - 1)),
        st.builds(lambda *sizes: struct.pack(">HIII", 3, *sizes), *[st.integers(0, 2**32 - 1)] * 3),
    ),
)


@settings(max_examples=300)
@given(st.lists(OPTIONS, max_size=8), st.binary(max_size=30), st.integers(0, 400), st.integers(0, 255))
def test_a_server_serves_refuses_or_waits_whatever_it_is_told(
    options: list[bytes], tail: bytes, at: int, flip: int
) -> None:
    data = bytearray(FLAGS + b"".join(options) + tail)
    data[at % len(data)] ^= flip
    outcome = talk(server.negotiate([DISK, OTHER]), bytes(data))
    if outcome.over and outcome.result is not None:
        assert outcome.result.export in ("disk", "other")
        assert outcome.result.structured or not outcome.result.allocation
    if not outcome.over and outcome.error is None:
        assert len(data) - outcome.consumed <= LONGEST_MESSAGE, "it waits for more"


@settings(max_examples=300)
@given(st.lists(REPLIES, max_size=8), st.binary(max_size=30), st.integers(0, 400), st.integers(0, 255))
def test_a_client_connects_gives_up_or_waits_whatever_it_is_told(
    told: list[bytes], tail: bytes, at: int, flip: int
) -> None:
    data = bytearray(GREETING + b"".join(told) + tail)
    data[at % len(data)] ^= flip
    outcome = talk(client.negotiate("disk"), bytes(data))
    if outcome.over:
        assert outcome.result is not None
        blocks = outcome.result.blocks
        assert 0 < blocks.minimum <= blocks.maximum
