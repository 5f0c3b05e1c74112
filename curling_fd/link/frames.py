"""The link between two daemons: frames, without I/O.

Everything on a link is a frame:

    header   40 bytes   magic, kind, flags, generation, sequence, length of the payload, CRC-32 of these
    payload  `length` bytes
    trailer  28 bytes   "CMIT", sequence, XXH3-128 of header and payload

A frame counts only when its trailer has arrived and agrees with what came before it (I1). The digest is
there against faults, not against attackers; those are TLS's business. Integers are big endian.

The payload of CHECKPOINT is a `CheckpointHead` and then the RAM sections in QEMU's own encoding, the device
state, and the disk log. The payload of BULK, a piece of a first pass, is whole records of the migration
stream; that of DISK a disk log (`curling_fd.disk.log`). Payloads of OFFER and WANT are made in
`curling_fd.disk.compare`. All others are JSON objects or empty. Who sends what, and when, is in
docs/protocol.md.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import xxhash
from attrs import frozen

from curling_fd.errors import FrameError

#: Version of everything in this file and in docs/protocol.md. Both sides must have the same.
PROTOCOL = 3

_MAGIC = b"CRLG"
_COMMIT = b"CMIT"
_HEADER = struct.Struct(">4sBB2xQQQ")
_CRC = struct.Struct(">I4x")
_TRAILER = struct.Struct(">4sQ16s")
_HEAD = struct.Struct(">QQQQ")

HEADER_SIZE = _HEADER.size + _CRC.size
TRAILER_SIZE = _TRAILER.size
HEAD_SIZE = _HEAD.size

#: Longest JSON payload, in bytes: a QEMU command line with room.
MAX_JSON = 1 << 20


class Kind(IntEnum):
    """What a frame is. P: primary to backup; B: backup to primary; both: either."""

    HELLO = 1  # P: who I am, which VM, which generation
    WELCOME = 2  # B
    REFUSE = 3  # B: an error that ends the link
    DEFINE = 4  # P: the VM: command line, machine, sizes
    PREPARED = 5  # B: the standby waits
    BULK = 6  # P: a piece of the first pass
    BULK_ACK = 7  # B: its buffer is free again
    CHECKPOINT = 8  # P
    ACK = 9  # B: the checkpoint is committed
    HEARTBEAT = 10  # both
    NOTE = 11  # P: the operator paused or resumed the guest
    END = 12  # P: protection ends, drop the replica
    HANDOVER = 13  # P: run the VM from the last committed checkpoint
    TAKEN = 14  # B: it runs here, with this generation
    REST = 15  # both: our daemon is about to be restarted
    RESTING = 16  # both: everything of yours is answered, and nothing more comes before you are back
    PROBE = 17  # in place of HELLO, and from either host: how are you?
    FACTS = 18  # the answer
    DISK = 19  # P: what is to be written to the copies of the disks, before the first checkpoint
    DISK_ACK = 20  # B: that is done
    OFFER = 21  # P: digests of what is on a disk
    WANT = 22  # B: which of these blocks the copy lacks


#: Kinds whose payload goes to a memfd; the payload of the others, but for BYTES, is JSON or empty.
RAW = frozenset({Kind.BULK, Kind.CHECKPOINT, Kind.DISK})

#: Kinds whose payload is bytes of a form of its own, no longer than a JSON object may be.
BYTES = frozenset({Kind.OFFER, Kind.WANT})


@frozen
class Header:
    """A frame's header. `length` is that of the payload in bytes."""

    kind: Kind
    generation: int
    sequence: int
    length: int

    def encode(self) -> bytes:
        body = _HEADER.pack(_MAGIC, self.kind, 0, self.generation, self.sequence, self.length)
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, data: bytes | memoryview, *, max_raw: int) -> Header:
        """Read a header of 40 bytes.

        Args:
            max_raw: the longest BULK, CHECKPOINT or DISK payload the caller has room for, in bytes.

        Raises:
            FrameError: it is damaged, of an unknown kind, or too long.
        """
        magic, kind, flags, generation, sequence, length = _HEADER.unpack(data[: _HEADER.size])
        (crc,) = _CRC.unpack(data[_HEADER.size :])
        if magic != _MAGIC:
            raise FrameError("this is not a Curling link")
        if crc != zlib.crc32(data[: _HEADER.size]) or any(data[_HEADER.size + 4 :]) or flags:
            raise FrameError("a frame's header was damaged on the way")
        try:
            kind = Kind(kind)
        except ValueError:
            raise FrameError(f"a frame of unknown kind {kind}") from None
        if length > (max_raw if kind in RAW else MAX_JSON):
            raise FrameError(f"a {kind.name} frame of {length} bytes, more than was agreed")
        return cls(kind, generation, sequence, length)


@frozen
class CheckpointHead:
    """How a checkpoint's payload divides, in bytes, and when its boundary was.

    `boundary_us` is the primary's wall clock in microseconds since the Unix epoch; it is only reported.
    """

    ram: int
    device: int
    disk: int
    boundary_us: int

    @property
    def payload_size(self) -> int:
        return HEAD_SIZE + self.ram + self.device + self.disk

    def encode(self) -> bytes:
        return _HEAD.pack(self.ram, self.device, self.disk, self.boundary_us)

    @classmethod
    def decode(cls, data: memoryview, length: int) -> CheckpointHead:
        """Read the head from the first bytes of a payload of `length` bytes.

        Raises:
            FrameError: the parts do not add up to `length`.
        """
        if length < HEAD_SIZE:
            raise FrameError("a checkpoint too short for its head")
        head = cls(*_HEAD.unpack(data[:HEAD_SIZE]))
        if head.payload_size != length:
            raise FrameError("a checkpoint whose parts do not add up to its length")
        return head


def digest(header: bytes, *payload: bytes | memoryview) -> bytes:
    """XXH3-128 of a header and the parts of its payload: 16 bytes."""
    state = xxhash.xxh3_128(header)
    for part in payload:
        state.update(part)
    return state.digest()


def encode_trailer(sequence: int, frame_digest: bytes) -> bytes:
    """The commit record of a frame."""
    return _TRAILER.pack(_COMMIT, sequence, frame_digest)


def check_trailer(data: bytes | memoryview, sequence: int, frame_digest: bytes) -> None:
    """Check a trailer of 28 bytes against what came before it.

    Raises:
        FrameError: it does not agree: the frame must not count.
    """
    if _TRAILER.unpack(data) != (_COMMIT, sequence, frame_digest):
        raise FrameError("a frame was damaged on the way: its digest does not match")


def encode_json(
    kind: Kind, generation: int, sequence: int = 0, content: Mapping[str, Any] | None = None
) -> bytes:
    """A whole frame with a JSON payload, or an empty one."""
    payload = json.dumps(content, separators=(",", ":")).encode() if content is not None else b""
    return encode_bytes(kind, generation, sequence, payload)


def encode_bytes(kind: Kind, generation: int, sequence: int, payload: bytes) -> bytes:
    """A whole frame with a payload that is not in a memfd."""
    header = Header(kind, generation, sequence, len(payload)).encode()
    return header + payload + encode_trailer(sequence, digest(header, payload))


def decode_json(payload: bytes) -> dict[str, Any]:
    """The JSON object in `payload`; an empty payload is an empty object.

    Raises:
        FrameError: it is no JSON object.
    """
    if not payload:
        return {}
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise FrameError("a frame whose content is no JSON object")
    return content
