"""Reading the rare, small records: a position in a buffer that may end too early.

The pages, which are nearly all of a stream, are not read through this: see `curling_fd.vmstate.ram`.
"""

from __future__ import annotations

from struct import Struct

_BE16 = Struct(">H")
_BE32 = Struct(">I")
_BE64 = Struct(">Q")


class Incomplete(Exception):
    """The record goes on beyond the bytes that are there."""


class Malformed(Exception):
    """What stands at `at` (an offset into the buffer) cannot be; `problem` says why."""

    def __init__(self, at: int, problem: str) -> None:
        super().__init__(at, problem)
        self.at = at
        self.problem = problem


class Cursor:
    """Reads big-endian integers and byte strings from `buf[at:end]`, moving `at`.

    Every method raises `Incomplete` when it would pass `end`.
    """

    __slots__ = ("at", "buf", "end")

    def __init__(self, buf: memoryview, at: int, end: int) -> None:
        self.buf = buf
        self.at = at
        self.end = end

    def _advance(self, size: int) -> int:
        at = self.at
        if self.end - at < size:
            raise Incomplete
        self.at = at + size
        return at

    def u8(self) -> int:
        """One byte."""
        return self.buf[self._advance(1)]

    def be16(self) -> int:
        """Two bytes."""
        return int(_BE16.unpack_from(self.buf, self._advance(2))[0])

    def be32(self) -> int:
        """Four bytes."""
        return int(_BE32.unpack_from(self.buf, self._advance(4))[0])

    def be64(self) -> int:
        """Eight bytes."""
        return int(_BE64.unpack_from(self.buf, self._advance(8))[0])

    def bytes(self, size: int) -> bytes:
        """`size` bytes, copied."""
        at = self._advance(size)
        return bytes(self.buf[at : at + size])

    def name(self, what: str) -> str:
        """A u8 length and that many bytes of printable text; `what` names it in the error."""
        at = self.at
        raw = self.bytes(self.u8())
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = ""
        if not name or not name.isprintable():
            raise Malformed(at, f"{what} is not a name: {raw[:40]!r}")
        return name
