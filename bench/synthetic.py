"""Checkpoints nobody captured: pages of noise, scattered over a RAM block, in QEMU's own encoding."""

from __future__ import annotations

import os
import random

from curling_fd.link.frames import HEAD_SIZE, CheckpointHead
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import PAGE_SIZE, Block, RamLayout, SectionType
from curling_fd.vmstate.restore import RamSectionWriter, restore_stream

RAM = Block("pc.ram", 512 << 20)
LAYOUT = RamLayout((RAM,), section_id=1)

#: About what a small PC has.
DEVICE_STATE = bytes(range(256)) * 80


def first_pass() -> bytes:
    """A pass in which all pages are as they were: the block list and nothing else."""
    stream = b"".join(restore_stream(b"", LAYOUT, {}, DEVICE_STATE))
    return stream[: -len(DEVICE_STATE)]


def checkpoint(pages: int, seed: int = 0) -> tuple[Buffer, CheckpointHead]:
    """A checkpoint of `pages` pages; the buffer is the caller's."""
    noise = memoryview(os.urandom(1 << 20) * 2)
    chosen = random.Random(seed).sample(range(RAM.size // PAGE_SIZE), pages)
    buffer = Buffer("bench-checkpoint", (pages + 64) * (PAGE_SIZE + 64) + (1 << 20), prefault=1 << 40)
    writer = RamSectionWriter(buffer.view, LAYOUT, SectionType.END)
    # In runs of neighbours, as a guest's memory is dirtied.
    for number, page in enumerate(sorted(chosen)):
        offset = number * 64 % (1 << 20)
        writer.page(RAM, page * PAGE_SIZE, noise[offset : offset + PAGE_SIZE])
    ram = writer.close() + 1
    buffer.view[ram - 1] = 0
    end = ram + len(DEVICE_STATE)
    buffer.view[ram:end] = DEVICE_STATE
    return buffer, CheckpointHead(ram, len(DEVICE_STATE), 0, 0)


def payload(head: CheckpointHead, buffer: Buffer) -> bytes:
    """The whole payload of the frame, for what works on bytes."""
    return head.encode() + bytes(buffer.view[: head.payload_size - HEAD_SIZE])
