"""The words of QEMU's migration stream: its constants, and the things a scanner finds in one.

The format is QEMU's own and has no specification but its source: `migration/savevm.c` (sections),
`migration/ram.c` (RAM records) and docs/devel/migration. All integers are big endian.

    stream   "QEVM" be32 3, then sections by their type byte
    07       configuration: see `curling_fd.vmstate.configuration`
    08       command: be16 id, be16 length, payload
    01 04    START, FULL: be32 section id, u8 + idstr, be32 instance id, be32 version, body, footer
    02 03    PART, END: be32 section id, body, footer
    footer   7e be32 section id
    00       end of the VM state

    A body of `ram` is a list of be64 `address | flags`, the flags in the low 12 bits:
    002      a page filled with one byte, which follows
    004      the block list: the address is the sum of the sizes; per block u8 + name, be64 size
    008      a page: its 4096 bytes follow
    010      the end of the body
    200      multifd flush: nothing follows
    020      added to 002 and 008: the page is of the same block as the one before it; without it
             u8 + the block's name stands between the be64 and the content
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TypeAlias

from attrs import define, frozen

MAGIC = b"QEVM"
STREAM_VERSION = 3
RAM_IDSTR = "ram"
RAM_VERSION = 4

PAGE_BITS = 12
PAGE_SIZE = 1 << PAGE_BITS
HEADER_SIZE = 8
PAGE_STRIDE = HEADER_SIZE + PAGE_SIZE
"""From one page to the next of the same block, in bytes of stream."""
FILL_STRIDE = HEADER_SIZE + 1
"""From one fill record to the next of the same block, in bytes of stream."""
FLAG_MASK = PAGE_SIZE - 1

# Limits on what is believed. QEMU stays far below all of them; names are bounded by their u8 length.
MAX_BLOCKS = 1024
MAX_CONFIGURATION = 4096
MAX_COMMAND = 4096


class SectionType(IntEnum):
    """The byte a section begins with."""

    END_OF_VM_STATE = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class RamFlag(IntFlag):
    """The low 12 bits of a RAM record's be64."""

    FILL = 0x002
    BLOCK_LIST = 0x004
    PAGE = 0x008
    END = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESSED = 0x100
    MULTIFD_FLUSH = 0x200


class CommandId(IntEnum):
    """The ids of command sections that matter here; QEMU has more."""

    OPEN_RETURN_PATH = 1
    PING = 2
    PACKAGED = 7
    ENABLE_COLO = 8
    SWITCHOVER_START = 11


@frozen
class Block:
    """One of the VM's RAM blocks: its name in QEMU and its size in bytes."""

    name: str
    size: int


@frozen
class RamLayout:
    """What the first pass says about RAM, and every later checkpoint relies on."""

    blocks: tuple[Block, ...]
    section_id: int
    instance_id: int = 0
    version: int = RAM_VERSION


# What a scanner reports. Offsets are into the buffer of the `scan` call that reported the event.


@frozen
class Configuration:
    """The configuration section, whole, from its type byte on; `machine` is the machine type in it."""

    section: bytes
    machine: str


@frozen
class Command:
    """A command section."""

    id: int
    payload: bytes


@frozen
class SectionStart:
    """A section of `ram` begins: `offset` is that of its type byte."""

    kind: SectionType
    offset: int


@frozen
class SectionEnd:
    """A section of `ram` ended: `offset` is that of the first byte after its footer."""

    offset: int


@frozen
class BlockTable:
    """The block list."""

    blocks: tuple[Block, ...]


@define
class PageRun:
    """`count` pages of one block, each record `PAGE_STRIDE` after the one before it.

    Page k's content is the `PAGE_SIZE` bytes at `data + k * PAGE_STRIDE`. Page 0 has the guest
    address `address` in the block; the others' are read with `curling_fd.vmstate.ram.page_addresses`,
    for dirty pages are seldom neighbours.
    """

    block: Block
    address: int
    data: int
    count: int


@define
class FillRun:
    """`count` pages of one block, each filled with one byte; page k's is at `data + k * FILL_STRIDE`."""

    block: Block
    address: int
    data: int
    count: int


@frozen
class EndOfVmState:
    """The end of a checkpoint's live part; `offset` is that of the first byte after it."""

    offset: int


@frozen
class DeviceState:
    """From `offset` to the end of the stream there is device state, whose length nobody says."""

    offset: int


Event: TypeAlias = (
    Configuration
    | Command
    | SectionStart
    | SectionEnd
    | BlockTable
    | PageRun
    | FillRun
    | EndOfVmState
    | DeviceState
)
