"""Made-up first passes and checkpoints, as QEMU would send them, for tests of what takes them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from curling_fd.link.frames import CheckpointHead
from curling_fd.vmstate.records import Block, RamLayout, SectionType
from curling_fd.vmstate.restore import RamSectionWriter

PAGE = 4096
CONFIGURATION = b"\x07\x00\x00\x00\x0dpc-i440fx-7.2"

Pages = Iterable[tuple[Block, int, bytes]]


def name(text: str) -> bytes:
    return bytes((len(text.encode()),)) + text.encode()


def beginning(layout: RamLayout, *, configuration: bytes = CONFIGURATION) -> bytes:
    """The pass up to its first page: magic, configuration, and the section with the block list."""
    out = b"QEVM" + struct.pack(">I", 3) + configuration
    out += struct.pack(">BI", SectionType.START, layout.section_id) + name("ram")
    out += struct.pack(">II", layout.instance_id, layout.version)
    out += block_list(layout.blocks) + struct.pack(">Q", 0x10)
    return out + struct.pack(">BI", SectionType.FOOTER, layout.section_id)


def block_list(blocks: Sequence[Block]) -> bytes:
    out = struct.pack(">Q", sum(block.size for block in blocks) | 0x04)
    return out + b"".join(name(block.name) + struct.pack(">Q", block.size) for block in blocks)


def ram_section(layout: RamLayout, pages: Pages, kind: SectionType = SectionType.PART) -> bytes:
    """A section with `pages`; one that is all zero is sent as a fill record, as QEMU does."""
    pages = list(pages)
    buffer = bytearray(64 + len(pages) * (PAGE + 300))
    writer = RamSectionWriter(memoryview(buffer), layout, kind)
    for block, address, content in pages:
        if any(content):
            writer.page(block, address, content)
        else:
            writer.zero(block, address)
    return bytes(buffer[: writer.close()])


def checkpoint(layout: RamLayout, pages: Pages, device: bytes, *, boundary_us: int = 1) -> bytes:
    """The payload of a CHECKPOINT frame."""
    ram = ram_section(layout, pages, SectionType.END) + bytes((SectionType.END_OF_VM_STATE,))
    return CheckpointHead(len(ram), len(device), 0, boundary_us).encode() + ram + device


def images(blocks: Sequence[Block]) -> dict[str, bytearray]:
    """Fresh images of `blocks`, by name, in whole pages, and at least one."""
    return {block.name: bytearray(max(1, -(-block.size // PAGE)) * PAGE) for block in blocks}


def written(images: Mapping[str, bytearray], pages: Pages) -> None:
    """Write `pages` into `images`."""
    for block, address, content in pages:
        images[block.name][address : address + PAGE] = content
