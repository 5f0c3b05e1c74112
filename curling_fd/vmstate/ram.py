"""The body of a RAM section: pages found at C speed, without copying or looking at any of them.

In a run of pages of one block every record has the same length, so the flags of a whole run are one
strided slice of the buffer. Only where runs end does Python look at a single header.
`curling_fd.vmstate.records` has the format.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from struct import Struct
from typing import NoReturn

from curling_fd.vmstate.cursor import Cursor, Incomplete, Malformed
from curling_fd.vmstate.records import (
    FILL_STRIDE,
    FLAG_MASK,
    HEADER_SIZE,
    MAX_BLOCKS,
    PAGE_SIZE,
    PAGE_STRIDE,
    Block,
    BlockTable,
    Event,
    FillRun,
    PageRun,
    RamFlag,
)

# Plain ints: comparing with members of an IntFlag is several times as slow.
_PAGE = int(RamFlag.PAGE)
_FILL = int(RamFlag.FILL)
_CONTINUE = int(RamFlag.CONTINUE)
_PAGE_CONTINUE = _PAGE | _CONTINUE
_FILL_CONTINUE = _FILL | _CONTINUE
_BLOCK_LIST = int(RamFlag.BLOCK_LIST)
_END = int(RamFlag.END)
_FLUSH = int(RamFlag.MULTIFD_FLUSH)

_FOREIGN = {
    RamFlag.XBZRLE: "a page sent with the capability xbzrle",
    RamFlag.HOOK: "an RDMA record",
    RamFlag.COMPRESSED: "a page sent with the capability compress",
}

_be64 = Struct(">Q").unpack_from

# The seventh byte of a header holds four bits of the address and four of flags, which a run has not.
_NO_HIGH_FLAGS = bytes(range(0, 256, 16))
_SHORTEST_LOOK = 8
_LONGEST_LOOK = 4096


class RamBody:
    """Scans the bodies of RAM sections, one after the other; knows the block list and the last block.

    QEMU keeps its "same block as before" across sections, and from the first pass across all
    checkpoints of a COLO session (`last_sent_block` in `migration/ram.c` is reset when a migration is
    set up, and the checkpoint loop sets up none): so `last_block` must be handed on.

    Attributes:
        blocks: the block list, None before it was seen.
        last_block: the block of the last page.
        midway: a body has begun, and its end mark has not been seen.
        pages: pages seen so far.
        fills: fill records seen so far.
    """

    __slots__ = (
        "_by_name",
        "_check",
        "_list",
        "_look",
        "_report",
        "_unlisted",
        "blocks",
        "fills",
        "last_block",
        "midway",
        "pages",
    )

    def __init__(
        self,
        blocks: tuple[Block, ...] | None = None,
        last_block: str | None = None,
        *,
        check_addresses: bool = False,
        report_runs: bool = True,
    ) -> None:
        self.midway = False
        self.pages = 0
        self.fills = 0
        self.blocks = blocks
        self._by_name = _by_name(blocks or ())
        self.last_block = None if last_block is None else self._by_name[last_block.encode()]
        self._check = check_addresses
        self._report = report_runs
        self._list: list[Block] | None = None
        self._unlisted = 0
        self._look = _SHORTEST_LOOK

    def scan(self, buf: memoryview, start: int, end: int, events: list[Event]) -> int:
        """Consumes the whole records in `buf[start:end]`, up to and including an end mark.

        Returns the offset of the first byte not consumed; appends to `events`.

        Raises:
            Malformed: what stands there is no RAM body.
        """
        self.midway = True
        pos = start
        if self._list is not None:
            pos = self._read_list(buf, pos, end, events)
        while end - pos >= HEADER_SIZE and self._list is None:
            header: int = _be64(buf, pos)[0]
            flags = header & FLAG_MASK
            kind = flags & ~_CONTINUE
            data = pos + HEADER_SIZE
            if kind in (_PAGE, _FILL):
                block = self.last_block
                if flags == kind:
                    if data == end or (name_end := data + 1 + buf[data]) > end:
                        break
                    block = self._named(buf, data, name_end)
                    data = name_end
                elif block is None:
                    raise Malformed(pos, "a page of the same block as the one before, and there is none")
                stride = PAGE_STRIDE if kind == _PAGE else FILL_STRIDE
                after = data + stride - HEADER_SIZE
                if after > end:
                    break
                count = 1
                if end - after >= stride and buf[after + 7] == kind | _CONTINUE:
                    count += self._run_length(buf, after, end, stride)
                if kind == _PAGE:
                    self.pages += count
                else:
                    self.fills += count
                if self._report or self._check:
                    run = (PageRun if kind == _PAGE else FillRun)(block, header - flags, data, count)
                    if self._check:
                        _check_run(buf, pos, run, stride)
                    if self._report:
                        events.append(run)
                self.last_block = block
                pos = data + count * stride - HEADER_SIZE
            elif header == _END:
                self.midway = False
                return data
            elif header == _FLUSH:
                pos = data
            elif flags == _BLOCK_LIST:
                self._list = []
                self._unlisted = header - flags
                pos = self._read_list(buf, data, end, events)
            else:
                _refuse(pos, header)
        return pos

    def _named(self, buf: memoryview, start: int, end: int) -> Block:
        """The block that the u8 length and name in `buf[start:end]` say."""
        name = bytes(buf[start + 1 : end])
        block = self._by_name.get(name)
        if block is None:
            raise Malformed(start, f"a page of {name[:40]!r}, which is not in the block list")
        return block

    def _run_length(self, buf: memoryview, pos: int, end: int, stride: int) -> int:
        """How many whole records from `pos` on have the flags of the first, `stride` apart.

        How far it looks ahead stays in proportion to what it finds, now and the time before, however
        much of the buffer is filled: so the cost of a scan is linear, also where runs are short.
        """
        flags = bytes((buf[pos + 7],))
        available = (end - pos) // stride
        found = 0
        look = self._look
        while found < available:
            look = min(look, available - found)
            headers = _headers(buf, pos, look, stride)
            same = look - len(headers[7::HEADER_SIZE].lstrip(flags))
            highs = headers[6 : same * HEADER_SIZE : HEADER_SIZE]
            if highs.translate(None, _NO_HIGH_FLAGS):
                return found + next(index for index, byte in enumerate(highs) if byte & 0x0F)
            found += same
            if same < look:
                break
            pos += same * stride
            look = min(look * 4, _LONGEST_LOOK)
        self._look = min(2 * found + _SHORTEST_LOOK, _LONGEST_LOOK)
        return found

    def _read_list(self, buf: memoryview, pos: int, end: int, events: list[Event]) -> int:
        """Reads what is there of the block list; `_list` is None again when it is complete."""
        blocks = self._list
        assert blocks is not None
        cursor = Cursor(buf, pos, end)
        try:
            while self._unlisted:
                pos = cursor.at
                name = cursor.name("a RAM block")
                size = cursor.be64()
                if size > self._unlisted:
                    raise Malformed(pos, f"RAM block {name} is larger than what is left of the whole")
                if len(blocks) == MAX_BLOCKS:
                    raise Malformed(pos, f"more than {MAX_BLOCKS} RAM blocks")
                blocks.append(Block(name, size))
                self._unlisted -= size
        except Incomplete:
            return pos
        table = tuple(blocks)
        by_name = _by_name(table)
        if len(by_name) != len(table):
            raise Malformed(pos, "two RAM blocks of the same name")
        if self.blocks is not None and self.blocks != table:
            raise Malformed(pos, "the RAM blocks are not those of the first pass")
        if self.blocks is None:
            self.blocks = table
            self._by_name = by_name
        self._list = None
        events.append(BlockTable(table))
        return cursor.at


def page_addresses(buf: memoryview, run: PageRun | FillRun) -> array[int]:
    """The addresses in its block of all pages of `run`, in the order of the stream.

    `buf` is the buffer that was scanned, with the run where it was.
    """
    addresses = array("Q", (run.address,))
    more = run.count - 1
    if not more:
        return addresses
    stride = PAGE_STRIDE if isinstance(run, PageRun) else FILL_STRIDE
    headers = _headers(buf, run.data + stride - HEADER_SIZE, more, stride)
    # In a run the flags fill the last byte and no more.
    headers[HEADER_SIZE - 1 :: HEADER_SIZE] = bytes(more)
    rest = array("Q", bytes(headers))
    if sys.byteorder == "little":
        rest.byteswap()
    addresses.extend(rest)
    return addresses


def fill_bytes(buf: memoryview, run: FillRun) -> bytes:
    """The byte each page of `run` is filled with, in the order of `page_addresses`."""
    return buf[run.data : run.data + (run.count - 1) * FILL_STRIDE + 1 : FILL_STRIDE].tobytes()


def _headers(buf: memoryview, pos: int, count: int, stride: int) -> bytearray:
    """`count` headers, the first at `pos`, `stride` apart: one after the other."""
    records = buf[pos : pos + count * stride]
    if stride == PAGE_STRIDE:
        return bytearray(records.cast("Q")[:: PAGE_STRIDE // HEADER_SIZE])
    headers = bytearray(records)
    del headers[HEADER_SIZE::FILL_STRIDE]
    return headers


def _check_run(buf: memoryview, pos: int, run: PageRun | FillRun, stride: int) -> None:
    """Refuses a run, whose first header is at `pos`, with a page outside its block."""
    block = run.block
    # QEMU rounds the memory behind a block up to whole pages.
    last = (block.size + FLAG_MASK & ~FLAG_MASK) - PAGE_SIZE
    addresses = page_addresses(buf, run)
    if max(addresses) <= last:
        return
    index, address = next((index, address) for index, address in enumerate(addresses) if address > last)
    if index:
        pos = run.data + index * stride - HEADER_SIZE
    raise Malformed(pos, f"a page at {address:#x} of {block.name}, which has {block.size:#x} bytes")


def _by_name(blocks: Iterable[Block]) -> dict[bytes, Block]:
    return {block.name.encode(): block for block in blocks}


def _refuse(pos: int, header: int) -> NoReturn:
    flags = header & FLAG_MASK
    for flag, meaning in _FOREIGN.items():
        if flags & ~_CONTINUE == flag:
            raise Malformed(pos, meaning)
    raise Malformed(pos, f"a RAM record with flags {flags:#x} and address {header - flags:#x}")
