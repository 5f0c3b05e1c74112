"""The messages of QEMU's COLO checkpoint loop, without I/O.

Each is one big-endian 32-bit number, as in `enum COLOMessage` of QEMU's qapi/migration.json:

    QEMU                                 Curling
    CHECKPOINT_REQUEST  ->                            guest running
                        <-  CHECKPOINT_REPLY
    VMSTATE_SEND        ->                            guest stopped: the epoch's boundary
    RAM sections, one byte 00
    VMSTATE_SIZE, be64 n, n bytes of device state ->
                        <-  VMSTATE_RECEIVED
                        <-  VMSTATE_LOADED            guest runs again
"""

from __future__ import annotations

import struct
from enum import IntEnum

from curling_fd.errors import ColoError

MESSAGE_SIZE = 4

#: VMSTATE_SIZE and its be64.
SIZE_MESSAGE_SIZE = 12

#: Device state of a VM is some 100 KB; a size past this is no device state.
MAX_DEVICE_STATE = 256 << 20

#: With `return-path` on (QEMU 11), QEMU enters the loop only after MIG_RP_MSG_SHUT (be16 type 1, be16
#: length 4, be32 value 0), as in migration/migration.c.
RETURN_PATH_SHUT = struct.pack(">HHI", 1, 4, 0)


class Message(IntEnum):
    CHECKPOINT_READY = 0
    CHECKPOINT_REQUEST = 1
    CHECKPOINT_REPLY = 2
    VMSTATE_SEND = 3
    VMSTATE_SIZE = 4
    VMSTATE_RECEIVED = 5
    VMSTATE_LOADED = 6


def encode(*messages: Message) -> bytes:
    """The bytes of `messages`, one after another."""
    return struct.pack(f">{len(messages)}I", *messages)


def expect(data: bytes | memoryview, message: Message) -> None:
    """Check that `data`, 4 bytes, is `message`.

    Raises:
        ColoError: it is something else.
    """
    (number,) = struct.unpack(">I", data)
    if number != message:
        raise ColoError(f"QEMU sent {_name(number)} where {message.name} was due")


def device_state_size(data: bytes | memoryview) -> int:
    """The number of bytes of device state that the VMSTATE_SIZE message `data`, 12 bytes, announces.

    Raises:
        ColoError: it is another message, or the size is absurd.
    """
    expect(data[:MESSAGE_SIZE], Message.VMSTATE_SIZE)
    (size,) = struct.unpack(">Q", data[MESSAGE_SIZE:])
    if not 0 < size <= MAX_DEVICE_STATE:
        raise ColoError(f"QEMU announced {size} bytes of device state")
    return int(size)


def _name(number: int) -> str:
    return Message(number).name if number in Message._value2member_map_ else f"message {number}"
