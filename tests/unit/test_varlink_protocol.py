"""Varlink messages, without a socket."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curling_fd.errors import VarlinkError
from curling_fd.varlink import protocol
from curling_fd.varlink.protocol import Call, MessageReader, Reply

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)


def outcome(chunks: list[bytes], limit: int) -> list[Any]:
    """Everything a reader makes of `chunks`: the messages, then how it ended."""
    reader = MessageReader(limit)
    seen: list[Any] = []
    try:
        for chunk in chunks:
            reader.feed(chunk)
            while (message := reader.next_message()) is not None:
                seen.append(message)
        reader.check_end()
        seen.append("end")
    except VarlinkError as error:
        seen.append("too long" if "more than" in error.problem else "error")
    return seen


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.lists(objects, max_size=5), st.lists(st.integers(min_value=0)))
def test_messages_arrive_whole_however_the_stream_is_cut(messages: list[Any], places: list[int]) -> None:
    data = b"".join(protocol.encode(message) for message in messages)
    assert outcome(cut(data, places), 1 << 20) == [*messages, "end"]


@given(
    st.binary(max_size=60) | st.text('{}[]:,"\\uda0 \0', max_size=60).map(str.encode),
    st.lists(st.integers(min_value=0)),
)
@example(b'{"a": NaN}\0', [])
@example(b'{"a": "\\ud800"}\0', [])
@example(b"\0", [])
def test_garbage_ends_the_same_way_however_it_is_cut(data: bytes, places: list[int]) -> None:
    whole = outcome([data], 20)
    assert outcome(cut(data, places), 20) == whole
    assert outcome([data[i : i + 1] for i in range(len(data))], 20) == whole


@pytest.mark.parametrize(
    "message",
    [b"", b"null", b"[]", b'"x"', b"{", b'{"a": NaN}', b'{"a": Infinity}', b"\xff{}", b'{"a": "\\udfff"}',
     b"[" * 100_000, '{"a": 1}'.encode("utf-16"), b'{"a": ' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(message: bytes) -> None:
    reader = MessageReader()
    reader.feed(message + b"\0" + protocol.encode({"method": "a.b"}))
    with pytest.raises(VarlinkError):
        reader.next_message()
    with pytest.raises(VarlinkError):
        reader.next_message()


def test_a_message_may_have_a_mebibyte_and_no_byte_more() -> None:
    fits = b'{"a":"' + b"x" * (protocol.MESSAGE_LIMIT - 8) + b'"}'
    reader = MessageReader()
    reader.feed(fits + b"\0")
    assert reader.next_message() is not None
    reader.feed(fits + b" \0")
    with pytest.raises(VarlinkError, match="more than 1048576 bytes"):
        reader.next_message()


def test_an_endless_message_is_cut_off_before_its_end_comes() -> None:
    reader = MessageReader()
    reader.feed(b"x" * (protocol.MESSAGE_LIMIT + 1))
    with pytest.raises(VarlinkError):
        reader.next_message()


@given(st.text(), objects, st.sampled_from([(), ("more",), ("oneway",), ("upgrade",), ("more", "upgrade")]))
def test_a_call_reads_back_as_it_was_written(
    name: str, parameters: dict[str, Any], flags: tuple[str, ...]
) -> None:
    call = Call("a." + name, parameters, **dict.fromkeys(flags, True))
    assert protocol.parse_call(protocol.decode(protocol.encode_call(call)[:-1])) == call


@given(objects, st.none() | st.text(), st.booleans())
def test_a_reply_reads_back_as_it_was_written(
    parameters: dict[str, Any], error: str | None, continues: bool
) -> None:
    reply = Reply(parameters, error=error, continues=continues and error is None)
    assert protocol.parse_reply(protocol.decode(protocol.encode_reply(reply)[:-1])) == reply


def test_what_varlinkctl_sends_is_understood() -> None:
    sent = b'{"method":"org.varlink.service.GetInfo","parameters":{}}\0'
    reader = MessageReader()
    reader.feed(sent)
    assert protocol.parse_call(reader.next_message() or {}) == Call("org.varlink.service.GetInfo", {})


@pytest.mark.parametrize("message", [{"method": "a.b"}, {"method": "a.b", "parameters": None, "more": None}])
def test_absent_and_null_are_the_same(message: dict[str, Any]) -> None:
    assert protocol.parse_call(message) == Call("a.b", {})


def test_vendor_extensions_of_a_call_pass() -> None:
    assert protocol.parse_call({"method": "a.b", "com.example": {"x": 1}}) == Call("a.b", {})


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"method": 3},
        {"method": "nodot"},
        {"method": "a.b", "parameters": []},
        {"method": "a.b", "more": 1},
        {"method": "a.b", "oneway": "yes"},
        {"method": "a.b", "oneway": True, "more": True},
    ],
)
def test_what_is_no_call_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(VarlinkError):
        protocol.parse_call(message)


@pytest.mark.parametrize(
    "message", [{"error": 1}, {"parameters": 1}, {"continues": 1}, {"error": "a", "continues": True}]
)
def test_what_is_no_reply_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(VarlinkError):
        protocol.parse_reply(message)


@pytest.mark.parametrize("parameters", [{"a": float("nan")}, {"a": b"bytes"}, {"a": object()}])
def test_what_json_cannot_say_is_not_written(parameters: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        protocol.encode_reply(Reply(parameters))


def test_written_messages_hold_no_nul_but_the_last_byte() -> None:
    data = protocol.encode({"a": "nul \0 inside"})
    assert data.count(0) == 1
    assert json.loads(data[:-1]) == {"a": "nul \0 inside"}
