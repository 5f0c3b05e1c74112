"""The messages of QEMU's checkpoint loop: the numbers of QEMU's enum, and nothing else accepted."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.capture.colo import (
    MAX_DEVICE_STATE,
    MESSAGE_SIZE,
    RETURN_PATH_SHUT,
    SIZE_MESSAGE_SIZE,
    Message,
    device_state_size,
    encode,
    expect,
)
from curling_fd.errors import ColoError

thorough = settings(max_examples=100, deadline=None, derandomize=True)

# `enum COLOMessage` in QEMU's qapi/migration.json, in its order.
QEMU = (
    "CHECKPOINT_READY",
    "CHECKPOINT_REQUEST",
    "CHECKPOINT_REPLY",
    "VMSTATE_SEND",
    "VMSTATE_SIZE",
    "VMSTATE_RECEIVED",
    "VMSTATE_LOADED",
)


def test_the_messages_have_qemus_numbers() -> None:
    assert [(message.name, int(message)) for message in Message] == [(name, n) for n, name in enumerate(QEMU)]


def test_messages_are_encoded_one_after_another() -> None:
    assert encode(Message.CHECKPOINT_READY) == b"\0\0\0\0"
    assert encode(Message.VMSTATE_RECEIVED, Message.VMSTATE_LOADED) == b"\0\0\0\5\0\0\0\6"
    assert encode() == b""


def test_shut_on_the_return_path_is_type_1_with_4_bytes_of_zero() -> None:
    assert bytes.fromhex("0001 0004 00000000") == RETURN_PATH_SHUT


@pytest.mark.parametrize("due", Message)
@pytest.mark.parametrize("sent", Message)
def test_only_the_message_that_is_due_is_accepted(due: Message, sent: Message) -> None:
    data = memoryview(encode(sent))
    assert len(data) == MESSAGE_SIZE
    if sent is due:
        expect(data, due)
        return
    with pytest.raises(ColoError) as caught:
        expect(data, due)
    assert caught.value.problem == f"QEMU sent {sent.name} where {due.name} was due"


@thorough
@given(st.integers(7, 0xFFFF_FFFF))
def test_a_number_that_is_no_message_is_named(number: int) -> None:
    with pytest.raises(ColoError, match=f"message {number} "):
        expect(struct.pack(">I", number), Message.VMSTATE_SEND)


@thorough
@given(st.integers(1, MAX_DEVICE_STATE) | st.sampled_from([1, MAX_DEVICE_STATE]))
def test_a_size_of_device_state_is_read(size: int) -> None:
    data = encode(Message.VMSTATE_SIZE) + struct.pack(">Q", size)
    assert len(data) == SIZE_MESSAGE_SIZE
    assert device_state_size(data) == size
    assert device_state_size(memoryview(data)) == size


@pytest.mark.parametrize("size", [0, MAX_DEVICE_STATE + 1, 1 << 63, (1 << 64) - 1])
def test_an_absurd_size_of_device_state_is_refused(size: int) -> None:
    with pytest.raises(ColoError, match=f"{size} bytes"):
        device_state_size(encode(Message.VMSTATE_SIZE) + struct.pack(">Q", size))


def test_another_message_in_place_of_the_size_is_refused() -> None:
    with pytest.raises(ColoError, match="VMSTATE_SEND where VMSTATE_SIZE"):
        device_state_size(encode(Message.VMSTATE_SEND) + struct.pack(">Q", 10))
