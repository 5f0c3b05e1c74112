"""Writing the migration stream: what a waiting standby is fed, and RAM sections of chosen pages.

A standby whose large RAM blocks are mapped already needs no page of them in the stream: pages that are
not sent keep what they hold. What is left is small:

    magic, version
    configuration                as captured
    RAM START                    the block list, end mark, footer
    RAM END                      the pages of the small blocks, end mark, footer
    device state                 as captured; it brings its own end

The format is described in `curling_fd.vmstate.records`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from struct import Struct
from typing import TypeAlias

from curling_fd.errors import CheckpointTooLarge
from curling_fd.vmstate.records import (
    FLAG_MASK,
    HEADER_SIZE,
    MAGIC,
    PAGE_SIZE,
    PAGE_STRIDE,
    RAM_IDSTR,
    STREAM_VERSION,
    Block,
    RamFlag,
    RamLayout,
    SectionType,
)

Bytes: TypeAlias = bytes | bytearray | memoryview

_SECTION = Struct(">BI")
_BE32 = Struct(">I")
_BE64 = Struct(">Q")
# Plain ints: arithmetic with members of an IntFlag is many times as slow.
_PAGE = int(RamFlag.PAGE)
_FILL = int(RamFlag.FILL)
_CONTINUE = int(RamFlag.CONTINUE)
_ZERO_PAGE = bytes(PAGE_SIZE)
_CHUNK = 256 * 1024
_TAIL = HEADER_SIZE + _SECTION.size
"""End mark and footer."""


def restore_stream(
    configuration: bytes, layout: RamLayout, small: Mapping[str, Bytes], device_state: Bytes
) -> Iterator[Bytes]:
    """The stream that makes a waiting standby continue the VM, in pieces to be sent one after the other.

    Args:
        configuration: the section as captured (`records.Configuration.section`), empty if there was none.
        layout: as the scanner of the first pass found it.
        small: the content of the blocks that the standby does not map, by name. Borrowed until the
            iterator is exhausted.
        device_state: as captured, with the end mark it ends with. Borrowed likewise.

    Raises:
        ValueError: `small` has a block that is not in `layout` or is not of its size, or there is no
            device state. Raised at once, not by the iterator.
    """
    sizes = {block.name: block.size for block in layout.blocks}
    for name, content in small.items():
        if sizes.get(name) != len(content):
            raise ValueError(f"{len(content)} bytes for RAM block {name}, which has {sizes.get(name)}")
    if not len(device_state):
        raise ValueError("no device state")
    return _restore(configuration, layout, small, device_state)


def _restore(
    configuration: bytes, layout: RamLayout, small: Mapping[str, Bytes], device_state: Bytes
) -> Iterator[Bytes]:
    piece = bytearray(MAGIC + _BE32.pack(STREAM_VERSION) + configuration)
    piece += _named_section(layout, SectionType.START)
    piece += _BE64.pack(sum(block.size for block in layout.blocks) | RamFlag.BLOCK_LIST)
    for block in layout.blocks:
        piece += _name(block.name) + _BE64.pack(block.size)
    piece += _tail(layout)
    piece += _SECTION.pack(SectionType.END, layout.section_id)
    for block in layout.blocks:
        if block.name not in small:
            continue
        content = memoryview(small[block.name])
        flag, name = 0, _name(block.name)
        for address in range(0, block.size, PAGE_SIZE):
            page = bytes(content[address : address + PAGE_SIZE]).ljust(PAGE_SIZE, b"\0")
            if page == _ZERO_PAGE:
                piece += _BE64.pack(address | _FILL | flag) + name + b"\0"
            else:
                piece += _BE64.pack(address | _PAGE | flag) + name + page
            flag, name = _CONTINUE, b""
            if len(piece) >= _CHUNK:
                yield piece
                piece = bytearray()
    piece += _tail(layout)
    yield piece
    yield device_state


class RamSectionWriter:
    """Encodes one RAM section into a buffer of the caller's, whole pages copied there once.

    The writer borrows `buffer`, a writable contiguous memoryview of bytes, until `close`. It keeps room
    for the end of the section, so `close` always succeeds.

    Args:
        buffer: where the section goes.
        layout: the RAM blocks and the id of the section.
        kind: PART while more sections follow, END for the last one.
        start: the offset in `buffer` of the section's first byte.

    Attributes:
        end: the offset in `buffer` of the first byte not written.
    """

    def __init__(
        self,
        buffer: memoryview,
        layout: RamLayout,
        kind: SectionType = SectionType.END,
        start: int = 0,
    ) -> None:
        if kind not in (SectionType.PART, SectionType.END):
            raise ValueError(f"a RAM section of pages is PART or END, not {kind.name}")
        self._buffer = buffer
        self._layout = layout
        self._limit = len(buffer) - _TAIL
        self._last: Block | None = None
        self.end = start
        self._need(_SECTION.size)
        _SECTION.pack_into(buffer, start, kind, layout.section_id)
        self.end = start + _SECTION.size

    def page(self, block: Block, address: int, content: Bytes) -> None:
        """Adds the page at `address` of `block`; `content` is its 4096 bytes.

        Raises:
            CheckpointTooLarge: the buffer is full; nothing was added.
        """
        if len(content) != PAGE_SIZE:
            raise ValueError(f"a page of {len(content)} bytes")
        data = self._header(block, address, _PAGE, PAGE_SIZE)
        self.end = data + PAGE_SIZE
        self._buffer[data : self.end] = content

    def pages(self, block: Block, image: memoryview, addresses: Iterable[int]) -> None:
        """Adds the pages at `addresses` of `block`, whose content is that of `image` there.

        Raises:
            CheckpointTooLarge: the buffer is full; the pages before were added.
        """
        buffer, pack_into = self._buffer, _BE64.pack_into
        follows = _PAGE | _CONTINUE
        for address in addresses:
            if self._last is not block or address & FLAG_MASK:
                self.page(block, address, image[address : address + PAGE_SIZE])
                continue
            at = self.end
            data, after = at + HEADER_SIZE, at + PAGE_STRIDE
            if after > self._limit:
                raise CheckpointTooLarge(len(buffer))
            pack_into(buffer, at, address | follows)
            buffer[data:after] = image[address : address + PAGE_SIZE]
            self.end = after

    def zero(self, block: Block, address: int) -> None:
        """Adds the page at `address` of `block` as one of zeros.

        Raises:
            CheckpointTooLarge: the buffer is full; nothing was added.
        """
        data = self._header(block, address, _FILL, 1)
        self._buffer[data] = 0
        self.end = data + 1

    def close(self) -> int:
        """Ends the section and returns `end`, the offset of the first byte after it."""
        tail = _tail(self._layout)
        self._buffer[self.end : self.end + _TAIL] = tail
        self.end += _TAIL
        return self.end

    def _header(self, block: Block, address: int, kind: int, content: int) -> int:
        if address & FLAG_MASK:
            raise ValueError(f"{address:#x} is not the address of a page")
        buffer, at = self._buffer, self.end
        if block is self._last:
            self._need(HEADER_SIZE + content)
            _BE64.pack_into(buffer, at, address | kind | _CONTINUE)
            return at + HEADER_SIZE
        name = _name(block.name)
        self._need(HEADER_SIZE + len(name) + content)
        _BE64.pack_into(buffer, at, address | kind)
        at += HEADER_SIZE
        buffer[at : at + len(name)] = name
        self._last = block
        return at + len(name)

    def _need(self, size: int) -> None:
        if self.end + size > self._limit:
            raise CheckpointTooLarge(len(self._buffer))


def _named_section(layout: RamLayout, kind: SectionType) -> bytes:
    """The header of a section that begins RAM: START."""
    return (
        _SECTION.pack(kind, layout.section_id)
        + _name(RAM_IDSTR)
        + _BE32.pack(layout.instance_id)
        + _BE32.pack(layout.version)
    )


def _tail(layout: RamLayout) -> bytes:
    return _BE64.pack(RamFlag.END) + _SECTION.pack(SectionType.FOOTER, layout.section_id)


def _name(name: str) -> bytes:
    raw = name.encode()
    return bytes((len(raw),)) + raw
