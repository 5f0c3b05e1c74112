"""NBD, the protocol of network block devices: numbers, layouts and what both ends share. No I/O.

Newstyle negotiation only, with structured replies and the metadata context `base:allocation`; integers are
big endian. Source: doc/proto.md of https://github.com/NetworkBlockDevice/nbd. Names here are those of that
document without their prefix.

A negotiation is a generator of `Step`s, see `Steps`: it says what it wants to send and how many bytes it
wants to read, and whoever runs it has the socket. It never asks for a byte more than the message it is
reading has, so nothing of what follows is read with it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator
from enum import IntEnum, IntFlag
from typing import TypeAlias, TypeVar

from attrs import frozen

from curling_fd.errors import NbdError

T = TypeVar("T")

Step: TypeAlias = int | bytes
"""An int: read exactly that many bytes (one or more) and send them into the generator. Bytes: write them."""

Steps: TypeAlias = Generator[Step, bytes, T]
"""A conversation in steps, ending in a T. After a write it is sent b""; a failed step is thrown into it."""

NBD_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

GREETING = struct.Struct(">8s8sH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
ERROR = struct.Struct(">IH")
HOLE = struct.Struct(">QI")
OFFSET = struct.Struct(">Q")
EXTENT = struct.Struct(">II")
UINT32 = struct.Struct(">I")
UINT16 = struct.Struct(">H")

ALLOCATION = "base:allocation"
"""The metadata context that says where holes and zeroes are."""

LONGEST_STRING = 4096
"""Bytes of a name or a message, at most."""

LONGEST_MESSAGE = 1 << 16
"""Bytes of an option or of a reply to one, at most: more than any use of the options known here needs."""

LARGEST_BLOCK = 32 << 20
"""Bytes of data in one request or one chunk, at most; what QEMU and libnbd take for granted."""


class Handshake(IntFlag):
    """Flags of the greeting, and the client's answer to them."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """Replies to options; from ERR_UNSUP on they are errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009


REP_ERROR = 0x80000000
"""The bit that all errors among the replies have, those that are not known here too."""


class Info(IntEnum):
    """Kinds of information in a reply to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_RESIZE = 512
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


class ChunkKind(IntEnum):
    """Kinds of a structured reply's chunk; those with bit 15 are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_ERROR = 0x8000
CHUNK_DONE = 1

STATE_HOLE = 1
STATE_ZERO = 2


class Errno(IntEnum):
    """The errors there are on the wire, with the numbers they have there."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_TO_WIRE = {
    errno.EPERM: Errno.EPERM,
    errno.EACCES: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.ENOMEM: Errno.ENOMEM,
    errno.EINVAL: Errno.EINVAL,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
    errno.EOVERFLOW: Errno.EOVERFLOW,
    errno.EOPNOTSUPP: Errno.ENOTSUP,
    errno.ESHUTDOWN: Errno.ESHUTDOWN,
}
_FROM_WIRE: dict[int, int] = {
    Errno.EPERM: errno.EPERM,
    Errno.EIO: errno.EIO,
    Errno.ENOMEM: errno.ENOMEM,
    Errno.EINVAL: errno.EINVAL,
    Errno.ENOSPC: errno.ENOSPC,
    Errno.EOVERFLOW: errno.EOVERFLOW,
    Errno.ENOTSUP: errno.EOPNOTSUPP,
    Errno.ESHUTDOWN: errno.ESHUTDOWN,
}


def wire_errno(number: int | None) -> Errno:
    """The error that says on the wire what `number` says here; EIO for all that cannot be said."""
    return _TO_WIRE.get(number or 0, Errno.EIO)


def host_errno(number: int) -> int:
    """The errno of this host for `number` from the wire; EINVAL for one that is not known."""
    return _FROM_WIRE.get(number, errno.EINVAL)


@frozen
class Request:
    """A request. `kind` is a Command, or a number that is none; `offset` and `length` are bytes."""

    kind: int
    flags: int
    cookie: int
    offset: int
    length: int

    def encode(self) -> bytes:
        """The header; of a WRITE `length` bytes of data follow it."""
        return REQUEST.pack(REQUEST_MAGIC, self.flags, self.kind, self.cookie, self.offset, self.length)


@frozen
class Extent:
    """`length` bytes of which is known: not allocated (`hole`), read as zeroes (`zero`)."""

    length: int
    hole: bool
    zero: bool

    @property
    def state(self) -> int:
        return (STATE_HOLE if self.hole else 0) | (STATE_ZERO if self.zero else 0)


@frozen
class BlockSizes:
    """What a server takes: offsets and lengths are multiples of `minimum`, better ones of `preferred`.

    `maximum` is the most bytes of data in one request. All in bytes.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = LARGEST_BLOCK


def option(kind: int, data: bytes = b"") -> bytes:
    """Write an option."""
    return OPTION.pack(OPTION_MAGIC, kind, len(data)) + data


def option_reply(kind: int, reply: int, data: bytes = b"") -> bytes:
    """Write a reply to the option `kind`."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, kind, reply, len(data)) + data


def prefixed(text: str) -> bytes:
    """`text` behind its length."""
    data = text.encode()
    return UINT32.pack(len(data)) + data


class Cursor:
    """Reads the parts of one message, which is there as a whole.

    Every method raises NbdError where the message does not hold what it should.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        if length > len(self._data) - self._at:
            raise NbdError(f"a message that ends {length - (len(self._data) - self._at)} bytes too early")
        self._at += length
        return self._data[self._at - length : self._at]

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next numbers, as `layout` has them."""
        return layout.unpack(self.take(layout.size))

    def number(self, layout: struct.Struct = UINT32) -> int:
        """The next number."""
        return self.numbers(layout)[0]

    def text(self, length: int) -> str:
        """The next `length` bytes as text."""
        return text(self.take(length))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        """Say that the message ends here."""
        if self._at != len(self._data):
            raise NbdError(f"a message with {len(self._data) - self._at} bytes more than it says")


def text(data: bytes) -> str:
    """`data` as a name or a message.

    Raises:
        NbdError: it is too long, holds a NUL, or is not UTF-8.
    """
    if len(data) > LONGEST_STRING or 0 in data:
        raise NbdError("a name that is too long or holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise NbdError("a name that is not UTF-8") from None
