"""The frame around netlink messages: headers, acknowledgements with the kernel's words, ends of dumps.

    u32 length (header included) | u16 type | u16 flags | u32 sequence | u32 port      then the payload
    NLMSG_ERROR   s32 -errno | the request's header [| its payload] [| attributes]     errno 0: acknowledged
    NLMSG_DONE    s32 -errno [| attributes]                                            the end of a dump

Native byte order; messages and attributes begin at multiples of 4. Source: include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from attrs import frozen

NLMSG_ERROR = 2
NLMSG_DONE = 3

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_ECHO = 0x008
NLM_F_DUMP_INTR = 0x010
NLM_F_REPLACE = 0x100
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

# On an acknowledgement these bits mean something else.
_CAPPED = 0x100
_HAS_ATTRIBUTES = 0x200

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SEQUENCE_AT = 8
_TYPE_MASK = 0x3FFF
_MESSAGE_TEXT = 1


@frozen
class Message:
    """One message, header included, as it came."""

    kind: int
    flags: int
    sequence: int
    data: bytes

    @property
    def interrupted(self) -> bool:
        """What is dumped changed meanwhile: entries may be missing or there twice."""
        return bool(self.flags & NLM_F_DUMP_INTR)


@frozen
class Verdict:
    """How a request went: errno (0 when it was done) and the kernel's words, if it had some."""

    number: int
    words: str = ""


class WireError(ValueError):
    """The bytes are no netlink messages."""


def addressed(packet: bytes, sequence: int) -> bytes:
    """The encoded message `packet` with that sequence number."""
    assert len(packet) % 4 == 0, "so that another may follow"
    return packet[:_SEQUENCE_AT] + struct.pack("=I", sequence) + packet[_SEQUENCE_AT + 4 :]


def messages(datagram: bytes) -> Iterator[Message]:
    """Take apart what one `recv` gave.

    Raises:
        WireError: a length leads out of it.
    """
    at = 0
    while at < len(datagram):
        if len(datagram) - at < _HEADER.size:
            raise WireError(f"{len(datagram) - at} bytes are no header")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, at)
        if not _HEADER.size <= length <= len(datagram) - at:
            raise WireError(f"a message of {length} bytes in {len(datagram) - at}")
        yield Message(kind, flags, sequence, datagram[at : at + length])
        at += _aligned(length)


def verdict(message: Message) -> Verdict | None:
    """What NLMSG_ERROR and NLMSG_DONE say, None for any other message.

    Raises:
        WireError: it is shorter than it must be.
    """
    if message.kind not in (NLMSG_ERROR, NLMSG_DONE):
        return None
    data = message.data
    if len(data) < _HEADER.size + 4:
        # A kernel may end a dump without a number.
        if message.kind == NLMSG_DONE:
            return Verdict(0)
        raise WireError("an acknowledgement without a number")
    (negative,) = struct.unpack_from("=i", data, _HEADER.size)
    at = _HEADER.size + 4
    if message.kind == NLMSG_ERROR:
        if len(data) < at + _HEADER.size:
            raise WireError("an acknowledgement without the request's header")
        request_length = _HEADER.unpack_from(data, at)[0]
        at += _HEADER.size if message.flags & _CAPPED else _aligned(request_length)
    words = _words(data, at) if message.flags & _HAS_ATTRIBUTES else ""
    return Verdict(-negative, words)


def _words(data: bytes, at: int) -> str:
    while len(data) - at >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            break
        if kind & _TYPE_MASK == _MESSAGE_TEXT:
            text = data[at + _ATTRIBUTE.size : at + length]
            return text.split(b"\0", 1)[0].decode("utf-8", "replace")
        at += _aligned(length)
    return ""


def _aligned(length: int) -> int:
    return length + 3 & ~3
