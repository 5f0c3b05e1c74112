"""QMP without I/O: whole lines however they are cut, and garbage that ends in one kind of error."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.qmp.protocol import (
    Decoder,
    Error,
    Event,
    Greeting,
    Message,
    QmpProtocolError,
    Return,
    encode_command,
)

thorough = settings(max_examples=150, deadline=None, derandomize=True)

# As QEMU 11.1.3 sent them.
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "Debian 1:11.1.3+ds-1"},'
    b' "capabilities": ["oob"]}}\r\n'
)
RETURN = b'{"return": {"status": "running", "running": true}, "id": 7}\r\n'
ERROR = b'{"id": 8, "error": {"class": "GenericError", "desc": "no such thing"}}\r\n'
EVENT = b'{"timestamp": {"seconds": 1700000000, "microseconds": 12}, "event": "STOP"}\r\n'
ALL = GREETING + EVENT + RETURN + ERROR
DECODED: list[Message] = [
    Greeting((11, 1, 3), "Debian 1:11.1.3+ds-1", frozenset({"oob"})),
    Event("STOP", {}, 1_700_000_000_000_012),
    Return(7, {"status": "running", "running": True}),
    Error(8, "GenericError", "no such thing"),
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def fed(data: bytes, cuts: list[int], **options: Any) -> list[Message]:
    decoder = Decoder(**options)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [message for start, end in itertools.pairwise(edges) for message in decoder.feed(data[start:end])]


def test_each_kind_of_message_is_understood() -> None:
    assert fed(ALL, []) == DECODED


@thorough
@given(st.lists(st.integers(0, len(ALL)), max_size=30))
def test_it_does_not_matter_how_the_bytes_are_cut(cuts: list[int]) -> None:
    assert fed(ALL, cuts) == DECODED


def test_byte_by_byte_each_message_comes_with_its_last_byte() -> None:
    decoder = Decoder()
    ends = [position for position in range(len(ALL)) if decoder.feed(ALL[position : position + 1])]
    assert ends == [position for position, byte in enumerate(ALL) if byte == ord("\n")]


def test_empty_lines_and_bare_newlines_are_no_messages() -> None:
    assert fed(b"\r\n \n" + RETURN + b"\n\n", []) == [DECODED[2]]


def test_a_newline_inside_a_string_is_escaped_and_ends_nothing() -> None:
    assert fed(b'{"return": "two\\nlines", "id": 1}\n', []) == [Return(1, "two\nlines")]


@thorough
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_garbage_is_decoded_or_refused_and_nothing_else(data: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(QmpProtocolError):
        assert fed(data + b"\n", cuts) == []
        assert not data.strip(), "only empty lines say nothing and are allowed"


@thorough
@given(
    st.dictionaries(
        st.sampled_from(["QMP", "return", "error", "event", "timestamp", "id", "data"]),
        json_values
        | st.fixed_dictionaries({"class": json_values, "desc": json_values})
        | st.fixed_dictionaries({"seconds": json_values, "microseconds": json_values})
        | st.fixed_dictionaries({"version": json_values, "capabilities": json_values}),
    )
)
def test_json_of_any_shape_is_decoded_or_refused_and_nothing_else(shape: dict[str, Any]) -> None:
    line = json.dumps(shape).encode() + b"\n"
    try:
        (message,) = fed(line, [])
    except QmpProtocolError:
        return
    assert isinstance(message, Greeting | Return | Error | Event)


@pytest.mark.parametrize(
    "line",
    [
        b"SSH-2.0-OpenSSH_9.2p1",
        b"HTTP/1.1 400 Bad Request",
        b"[]",
        b"7",
        b"{}",
        b'{"event": "STOP"}',
        b'{"error": {"class": "GenericError"}}',
        b'{"QMP": {"version": {"qemu": {"major": "x", "minor": 1, "micro": 1}}, "capabilities": []}}',
        b'{"return": 1',
        b"[" * 100_000,
        b"\xff\xfe\x00\x01",
    ],
    ids=lambda line: line[:20].decode("latin-1"),
)
def test_what_is_not_qmp_is_refused_with_its_beginning(line: bytes) -> None:
    with pytest.raises(QmpProtocolError) as caught:
        fed(line + b"\r\n", [])
    assert caught.value.got == line[:80].decode("utf-8", "backslashreplace")


def test_messages_before_the_garbage_of_an_earlier_feed_are_not_lost() -> None:
    decoder = Decoder()
    assert decoder.feed(RETURN + b"gar") == [DECODED[2]]
    with pytest.raises(QmpProtocolError):
        decoder.feed(b"bage\n")


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_line_longer_than_allowed_is_refused_before_it_ends(piece: int) -> None:
    decoder = Decoder(max_line=100)
    for _ in range(100 // piece):
        decoder.feed(b"x" * piece)
    with pytest.raises(QmpProtocolError):
        decoder.feed(b"x" * piece)


def test_the_longest_line_allowed_is_taken() -> None:
    line = b'{"return": "' + b"x" * 86 + b'"}'
    assert len(line) == 100
    assert len(fed(line + b"\n", [50], max_line=100)) == 1


@thorough
@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), json_values, max_size=3), st.booleans())
def test_a_command_is_one_line_of_json(name: str, arguments: dict[str, Any], out_of_band: bool) -> None:
    line = encode_command(name, arguments, 42, out_of_band=out_of_band)
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert line.isascii(), "no argument can smuggle in half a character"
    expected = {"exec-oob" if out_of_band else "execute": name, "id": 42}
    assert json.loads(line) == expected | ({"arguments": arguments} if arguments else {})


def test_a_long_answer_in_small_pieces_arrives_once_and_whole() -> None:
    data = b'{"return": "' + b"x" * (4 << 20) + b'"}\n'
    decoder, messages = Decoder(), []
    for start in range(0, len(data), 512):
        messages += decoder.feed(data[start : start + 512])
    assert messages == [Return(None, "x" * (4 << 20))]
