"""The stream a standby is fed, and the writer of RAM sections, read back by the scanner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.errors import CheckpointTooLarge
from curling_fd.vmstate.ram import page_addresses
from curling_fd.vmstate.records import (
    Block,
    BlockTable,
    Configuration,
    DeviceState,
    FillRun,
    PageRun,
    RamLayout,
    SectionType,
)
from curling_fd.vmstate.restore import Bytes, RamSectionWriter, restore_stream
from curling_fd.vmstate.scanner import Scanner
from tests.unit.scanner_reference import Item, check

RAM = Block("pc.ram", 1 << 32)
BIOS = Block("pc.bios", 0x4000)
ODD = Block("/rom@etc/odd", 0x1800)
REST = Block("/rom@etc/rest", 0x800)
LAYOUT = RamLayout((RAM, BIOS, ODD, REST), section_id=3, instance_id=5)
CONFIGURATION = b"\x07\x00\x00\x00\x0dpc-i440fx-7.2"
DEVICES = b"\x04\x00\x00\x00\x09\x05timer" + bytes(8) + b"state\x00"
BIOS_BYTES = b"\x01" * 4096 + bytes(4096) + bytes(4095) + b"\x02" + bytes(4096)


def read_back(stream: list[Bytes]) -> tuple[Scanner, bytes]:
    data = b"".join(stream)
    check(data, None, None, cuts=range(0, len(data), 1000), check_addresses=True)
    scanner = Scanner.for_pass(check_addresses=True)
    assert scanner.scan(memoryview(data), 0, len(data)) == len(data)
    return scanner, data


def test_a_restore_stream_brings_the_small_blocks_and_the_device_state() -> None:
    small = {"pc.bios": BIOS_BYTES, "/rom@etc/odd": b"\x07" * 0x1800}
    scanner, data = read_back(list(restore_stream(CONFIGURATION, LAYOUT, small, memoryview(DEVICES))))
    assert scanner.layout == LAYOUT
    assert scanner.device_state_offset is not None
    assert data[scanner.device_state_offset :] == DEVICES
    events = scanner.drain()
    assert events[0] == Configuration(CONFIGURATION, "pc-i440fx-7.2")
    assert BlockTable(LAYOUT.blocks) in events
    assert isinstance(events[-1], DeviceState)
    images = {block.name: bytearray(block.size + 4095 & ~4095) for block in (BIOS, ODD)}
    for run in events:
        if isinstance(run, PageRun):
            for k, address in enumerate(page_addresses(memoryview(data), run)):
                at = run.data + k * 4104
                images[run.block.name][address : address + 4096] = data[at : at + 4096]
    assert images["pc.bios"] == BIOS_BYTES
    assert images["/rom@etc/odd"] == b"\x07" * 0x1800 + bytes(0x800)


def test_pages_of_zeros_are_sent_as_fill_records_so_that_old_content_goes() -> None:
    scanner, data = read_back(list(restore_stream(b"", LAYOUT, {"pc.bios": BIOS_BYTES}, DEVICES)))
    fills = [event for event in scanner.events if isinstance(event, FillRun)]
    addresses = [address for run in fills for address in page_addresses(memoryview(data), run)]
    assert addresses == [0x1000, 0x3000]
    assert scanner.pages == 2
    assert data.count(b"pc.bios") == 2, "once in the block list, once before the first page"


def test_the_size_of_a_restore_stream_does_not_depend_on_the_mapped_blocks() -> None:
    huge = RamLayout((Block("pc.ram", 1 << 46), *LAYOUT.blocks[1:]), 3, 5)
    sizes = {
        sum(len(piece) for piece in restore_stream(CONFIGURATION, layout, {}, DEVICES))
        for layout in (LAYOUT, huge)
    }
    assert len(sizes) == 1


def test_a_large_small_block_comes_in_pieces() -> None:
    vga = Block("vga.vram", 1 << 20)
    layout = RamLayout((RAM, vga), 2)
    stream = list(restore_stream(b"", layout, {"vga.vram": b"\x01" * vga.size}, DEVICES))
    assert len(stream) > 3
    assert max(len(piece) for piece in stream) < 300 * 1024
    assert read_back(stream)[0].pages == 256


@pytest.mark.parametrize(
    ("small", "devices"),
    [
        ({"pc.bios": bytes(0x3000)}, DEVICES),
        ({"unknown": bytes(0x1000)}, DEVICES),
        ({}, b""),
    ],
)
def test_what_does_not_fit_the_layout_is_refused_before_anything_is_sent(
    small: dict[str, bytes], devices: bytes
) -> None:
    with pytest.raises(ValueError, match=r"RAM block|device state"):
        restore_stream(CONFIGURATION, LAYOUT, small, devices)


def as_checkpoint(buffer: bytearray, end: int) -> list[Item]:
    data = bytes(buffer[:end]) + b"\x00"
    outcome = check(data, LAYOUT, None, cuts=range(0, len(data), 777), check_addresses=True)
    assert not outcome.bad
    assert outcome.consumed == len(data)
    return outcome.items


pages_to_write = st.lists(
    st.tuples(st.sampled_from((RAM, BIOS, ODD)), st.sampled_from((0, 0x1000)), st.integers(0, 2)), max_size=30
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pages_to_write, st.sampled_from((SectionType.PART, SectionType.END)), st.integers(0, 9))
def test_what_the_writer_encodes_the_scanner_finds(
    chosen: list[tuple[Block, int, int]], kind: SectionType, start: int
) -> None:
    buffer = bytearray(30 * 4200)
    writer = RamSectionWriter(memoryview(buffer), LAYOUT, kind, start)
    expected: list[Item] = [("start", int(kind), 0)]
    for block, address, byte in chosen:
        if byte:
            writer.page(block, address, bytes((byte,)) * 4096)
            expected.append(("page", block.name, address, writer.end - start - 4096))
            assert buffer[writer.end - 4096 : writer.end] == bytes((byte,)) * 4096
        else:
            writer.zero(block, address)
            expected.append(("fill", block.name, address, 0))
    end = writer.close()
    expected += [("end", end - start), ("eof", end - start + 1)]
    assert as_checkpoint(buffer[start:], end - start) == expected
    assert not any(buffer[:start])
    assert not any(buffer[end:])


def test_many_pages_of_an_image_are_written_like_one_after_the_other() -> None:
    image = memoryview(bytes(page & 0xFF for page in range(16) for _ in range(4096)))
    addresses = [0x5000, 0x1000, 0xF000, 0]
    together, apart = bytearray(40_000), bytearray(40_000)
    writer = RamSectionWriter(memoryview(together), LAYOUT)
    writer.pages(BIOS, image, [0x3000])
    writer.pages(RAM, image, addresses)
    writer.pages(BIOS, image, iter(()))
    writer.close()
    writer = RamSectionWriter(memoryview(apart), LAYOUT)
    for block, address in [(BIOS, 0x3000), *((RAM, address) for address in addresses)]:
        writer.page(block, address, image[address : address + 4096])
    writer.close()
    assert together == apart


def test_a_full_buffer_is_said_and_what_was_written_stays_a_whole_section() -> None:
    buffer = bytearray(5 + (8 + 7 + 4096) + 4104 + 9 + 13)
    writer = RamSectionWriter(memoryview(buffer), LAYOUT)
    writer.page(RAM, 0, b"\x01" * 4096)
    writer.pages(RAM, memoryview(bytes(1 << 16)), [0x1000])
    writer.zero(RAM, 0x2000)
    before = bytes(buffer)
    with pytest.raises(CheckpointTooLarge) as caught:
        writer.zero(RAM, 0x3000)
    assert caught.value.limit == len(buffer)
    with pytest.raises(CheckpointTooLarge):
        writer.page(BIOS, 0, bytes(4096))
    with pytest.raises(CheckpointTooLarge):
        writer.pages(RAM, memoryview(bytes(1 << 16)), [0x4000])
    assert buffer == before
    assert writer.close() == len(buffer)
    assert [item[0] for item in as_checkpoint(buffer, len(buffer))] == [
        "start",
        "page",
        "page",
        "fill",
        "end",
        "eof",
    ]


def test_a_buffer_too_small_for_an_empty_section_is_refused_at_once() -> None:
    with pytest.raises(CheckpointTooLarge):
        RamSectionWriter(memoryview(bytearray(17)), LAYOUT)
    assert RamSectionWriter(memoryview(bytearray(18)), LAYOUT).close() == 18


def test_addresses_that_are_none_and_half_pages_are_refused() -> None:
    writer = RamSectionWriter(memoryview(bytearray(10_000)), LAYOUT)
    writer.zero(RAM, 0)
    for address in (1, 0x1001, 0x800):
        with pytest.raises(ValueError, match="not the address"):
            writer.zero(RAM, address)
        with pytest.raises(ValueError, match="not the address"):
            writer.pages(RAM, memoryview(bytes(0x4000)), [address])
    with pytest.raises(ValueError, match="4095 bytes"):
        writer.page(RAM, 0, bytes(4095))
    with pytest.raises(ValueError, match="PART or END"):
        RamSectionWriter(memoryview(bytearray(100)), LAYOUT, SectionType.START)
