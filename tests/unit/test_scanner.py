"""The migration stream scanner, record by record."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from curling_fd.errors import StreamError
from curling_fd.vmstate import ram
from curling_fd.vmstate.ram import fill_bytes, page_addresses
from curling_fd.vmstate.records import (
    MAX_BLOCKS,
    PAGE_STRIDE,
    Block,
    BlockTable,
    Command,
    Configuration,
    DeviceState,
    EndOfVmState,
    Event,
    FillRun,
    PageRun,
    RamLayout,
    SectionEnd,
    SectionStart,
    SectionType,
)
from curling_fd.vmstate.scanner import Scanner

RAM = Block("pc.ram", 0x100000)
VGA = Block("vga.vram", 0x10000)
LAYOUT = RamLayout((RAM, VGA), section_id=2)

MAGIC = b"QEVM" + struct.pack(">I", 3)
CONFIGURATION = b"\x07" + struct.pack(">I", 4) + b"q35x"
START = b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, 4)
END = b"\x03" + struct.pack(">I", 2)
PART = b"\x02" + struct.pack(">I", 2)
TAIL = struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", 2)
DEVICE = b"\x04" + struct.pack(">I", 9) + b"\x05timer" + struct.pack(">II", 0, 2) + b"state"


def page(address: int, block: Block | None = None, flags: int = 0x08) -> bytes:
    content = bytes((address >> 12 & 0xFF,)) * 4096
    if block is None:
        return struct.pack(">Q", address | flags | 0x20) + content
    return struct.pack(">Q", address | flags) + name(block.name) + content


def fill(address: int, block: Block | None = None, byte: int = 0) -> bytes:
    if block is None:
        return struct.pack(">Q", address | 0x22) + bytes((byte,))
    return struct.pack(">Q", address | 0x02) + name(block.name) + bytes((byte,))


def name(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def table(*blocks: Block, total: int | None = None) -> bytes:
    size = sum(block.size for block in blocks) if total is None else total
    entries = b"".join(name(block.name) + struct.pack(">Q", block.size) for block in blocks)
    return struct.pack(">Q", size | 0x04) + entries


BEGIN = MAGIC + CONFIGURATION + START + table(RAM, VGA) + TAIL


def scan(scanner: Scanner, data: bytes) -> tuple[list[Event], int]:
    end = scanner.scan(memoryview(data), 0, len(data))
    return scanner.drain(), end


def checkpoint(data: bytes, last_block: str | None = None, **options: bool) -> list[Event]:
    events, end = scan(Scanner.for_checkpoint(LAYOUT, last_block, **options), data)
    assert end == len(data)
    return events


def problem_of(scanner: Scanner, data: bytes) -> StreamError:
    with pytest.raises(StreamError) as caught:
        scan(scanner, data)
    return caught.value


def test_a_pass_is_found_from_its_magic_to_its_device_state() -> None:
    scanner = Scanner.for_pass()
    data = BEGIN + PART + page(0x3000, RAM) + page(0x9000) + TAIL + END + fill(0, VGA, 7) + TAIL + DEVICE
    events, end = scan(scanner, data)
    at = len(BEGIN)
    assert events == [
        Configuration(CONFIGURATION, "q35x"),
        SectionStart(SectionType.START, len(MAGIC + CONFIGURATION)),
        BlockTable((RAM, VGA)),
        SectionEnd(at),
        SectionStart(SectionType.PART, at),
        PageRun(RAM, 0x3000, at + 5 + 8 + 7, 2),
        SectionEnd(at + 5 + 8 + 7 + 4096 + PAGE_STRIDE + 13),
        SectionStart(SectionType.END, len(data) - len(DEVICE) - 13 - 18 - 5),
        FillRun(VGA, 0, len(data) - len(DEVICE) - 13 - 1, 1),
        SectionEnd(len(data) - len(DEVICE)),
        DeviceState(len(data) - len(DEVICE)),
    ]
    assert end == len(data)
    assert scanner.layout == LAYOUT
    assert scanner.last_block == "vga.vram"
    assert scanner.device_state_offset == len(data) - len(DEVICE)
    assert (scanner.pages, scanner.fills) == (2, 1)


def test_everything_after_the_device_state_began_is_consumed_unseen() -> None:
    scanner = Scanner.for_pass()
    scan(scanner, BEGIN + END + TAIL + DEVICE)
    assert scan(scanner, b"\x00\x06anything\x01\x02") == ([], 12)


def test_the_device_state_of_a_background_snapshot_follows_a_part_of_ram() -> None:
    events, _ = scan(Scanner.for_pass(), BEGIN + PART + page(0, RAM) + TAIL + DEVICE)
    assert isinstance(events[-1], DeviceState)


def test_a_machine_without_device_state_ends_after_ram() -> None:
    events, _ = scan(Scanner.for_pass(), BEGIN + END + TAIL + b"\x00")
    assert events[-1] == DeviceState(len(BEGIN + END + TAIL))


def test_a_stream_may_lack_a_configuration() -> None:
    events, end = scan(Scanner.for_pass(), MAGIC + START + table(RAM) + TAIL)
    assert events[1] == BlockTable((RAM,))
    assert end == 8 + len(START + table(RAM) + TAIL)


def test_a_checkpoint_ends_with_its_zero_byte() -> None:
    scanner = Scanner.for_checkpoint(LAYOUT, None)
    data = b"\x08\x00\x0b\x00\x00" + END + page(0x1000, RAM) + TAIL + b"\x00"
    events, end = scan(scanner, data + b"\x00\x00\x00\x04 and what QEMU sends next")
    assert end == len(data)
    assert events[0] == Command(11, b"")
    assert events[-1] == EndOfVmState(len(data))
    assert scanner.done
    assert scan(scanner, b"\x00\x00\x00\x04") == ([], 0)


@pytest.mark.parametrize("kind", [b"\x02", b"\x03"])
def test_a_checkpoint_has_ram_sections_by_id(kind: bytes) -> None:
    events = checkpoint(kind + END[1:] + fill(0, RAM) + TAIL + b"\x00")
    assert events[0] == SectionStart(SectionType(kind[0]), 0)


def test_a_checkpoint_may_name_the_section_and_repeat_the_block_list() -> None:
    events = checkpoint(START + table(RAM, VGA) + TAIL + b"\x04" + START[1:] + TAIL + b"\x00")
    assert BlockTable((RAM, VGA)) in events


def test_the_same_block_as_before_goes_back_to_the_checkpoint_before() -> None:
    first = Scanner.for_checkpoint(LAYOUT, None)
    scan(first, END + page(0, VGA) + TAIL + b"\x00")
    second = Scanner.for_checkpoint(LAYOUT, first.last_block)
    events, _ = scan(second, END + page(0x2000) + TAIL + b"\x00")
    assert events[1] == PageRun(VGA, 0x2000, 5 + 8, 1)


def test_the_same_block_as_before_needs_one_before() -> None:
    error = problem_of(Scanner.for_checkpoint(LAYOUT, None), END + page(0))
    assert error.offset == 5


def test_an_unfinished_page_is_not_consumed_and_changes_no_block() -> None:
    scanner = Scanner.for_checkpoint(LAYOUT, None)
    data = END + page(0x1000, RAM) + page(0, VGA)[:-1]
    assert scan(scanner, data)[1] == len(END + page(0x1000, RAM))
    assert scanner.last_block == "pc.ram"


def test_a_block_name_may_be_missing_to_its_very_length() -> None:
    for header in (page(0, VGA), fill(0, VGA)):
        for size in range(8, 8 + 9):
            assert scan(Scanner.for_checkpoint(LAYOUT, None), END + header[:size])[1] == len(END)


def test_a_multifd_flush_is_passed_over() -> None:
    flush = struct.pack(">Q", 0x200)
    data = END + flush + page(0, RAM) + flush + TAIL + b"\x00"
    assert [type(event) for event in checkpoint(data)] == [SectionStart, PageRun, SectionEnd, EndOfVmState]


def test_addresses_and_fill_bytes_of_runs_are_read_in_their_order() -> None:
    addresses = [0x5000, 0x1000, 0xFF000, 0x2000]
    pages = page(addresses[0], RAM) + b"".join(page(address) for address in addresses[1:])
    fills = b"".join(fill(address, byte=address >> 12 & 0xFF) for address in addresses)
    data = END + pages + fills + TAIL + b"\x00"
    events = checkpoint(data)
    buf = memoryview(data)
    page_run, fill_run = events[1], events[2]
    assert isinstance(page_run, PageRun)
    assert isinstance(fill_run, FillRun)
    assert list(page_addresses(buf, page_run)) == addresses
    assert list(page_addresses(buf, fill_run)) == addresses
    assert fill_bytes(buf, fill_run) == bytes((5, 1, 0xFF, 2))
    for k, address in enumerate(addresses):
        at = page_run.data + k * PAGE_STRIDE
        assert data[at : at + 4096] == page(address)[8:]


def test_addresses_of_more_than_32_bits_are_read_whole() -> None:
    big = 0x0123_4567_89AB_C000
    data = END + page(0) + page(big) + fill(0) + fill(big) + TAIL + b"\x00"
    events = checkpoint(data, "pc.ram")
    for run in events[1:3]:
        assert isinstance(run, PageRun | FillRun)
        assert list(page_addresses(memoryview(data), run)) == [0, big]


def test_pages_are_counted_where_runs_are_not_wanted() -> None:
    scanner = Scanner.for_checkpoint(LAYOUT, None, report_runs=False)
    events, _ = scan(scanner, END + page(0, RAM) + page(0x1000) * 3 + fill(0) * 5 + TAIL + b"\x00")
    assert [type(event) for event in events] == [SectionStart, SectionEnd, EndOfVmState]
    assert (scanner.pages, scanner.fills) == (4, 5)


def test_pages_outside_their_block_are_refused_where_asked_for() -> None:
    outside = END + page(0, VGA) + page(0xF000) + page(0x10000) + TAIL + b"\x00"
    checkpoint(outside)
    error = problem_of(Scanner.for_checkpoint(LAYOUT, None, check_addresses=True), outside)
    assert error.offset == len(END + page(0, VGA) + page(0xF000))
    assert "0x10000" in error.problem
    assert "vga.vram" in error.problem
    fills = END + fill(0, VGA) + fill(0xFFFF_F000)
    error = problem_of(Scanner.for_checkpoint(LAYOUT, None, check_addresses=True), fills)
    assert error.offset == len(END + fill(0, VGA))


def test_a_scanner_that_failed_keeps_failing() -> None:
    scanner = Scanner.for_checkpoint(LAYOUT, None)
    first = problem_of(scanner, b"\xff")
    again = problem_of(scanner, b"\x00")
    assert (first.offset, first.problem) == (again.offset, again.problem)


def test_the_offset_of_an_error_counts_from_the_first_byte_given() -> None:
    scanner = Scanner.for_checkpoint(LAYOUT, None)
    scan(scanner, END + page(0, RAM))
    assert problem_of(scanner, page(0) + b"\xff" * 8).offset == len(END + page(0, RAM) + page(0))


SUBSECTION = b"\x05" + name("configuration/uuid") + struct.pack(">I", 1) + bytes(16)


MANY_CAPABILITIES = (
    b"\x05" + name("configuration/capabilities") + struct.pack(">II", 1, 1 << 31) + name("multifd") * 2000
)


def test_known_subsections_belong_to_the_configuration() -> None:
    bits = b"\x05" + name("configuration/target-page-bits") + struct.pack(">II", 1, 12)
    capabilities = b"\x05" + name("configuration/capabilities") + struct.pack(">II", 1, 1) + name("multifd")
    section = CONFIGURATION + bits + capabilities + SUBSECTION
    events, _ = scan(Scanner.for_pass(), MAGIC + section + START)
    assert events[0] == Configuration(section, "q35x")


PASS: Callable[[], Scanner] = Scanner.for_pass


def _checkpoint() -> Scanner:
    return Scanner.for_checkpoint(LAYOUT, "pc.ram")


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (PASS, b"Q", None),
        (PASS, b"QX", "no migration stream"),
        (PASS, b"QEVM\0\0\0\2", "version 2"),
        (PASS, MAGIC + b"\x07" + struct.pack(">I", 5000), "5000 bytes"),
        (PASS, MAGIC + CONFIGURATION + b"\x05" + name("new/thing") + bytes(4), "new/thing"),
        (
            PASS,
            MAGIC
            + CONFIGURATION
            + b"\x05"
            + name("configuration/capabilities")
            + struct.pack(">II", 1, 1)
            + name("x-ignore-shared"),
            "x-ignore-shared",
        ),
        (
            PASS,
            MAGIC
            + CONFIGURATION
            + b"\x05"
            + name("configuration/target-page-bits")
            + struct.pack(">II", 1, 16),
            "16 bits",
        ),
        (PASS, MAGIC + CONFIGURATION + CONFIGURATION, "0x07"),
        (PASS, MAGIC + CONFIGURATION + SUBSECTION * 120 + START, "more than 4096"),
        (PASS, MAGIC + CONFIGURATION + MANY_CAPABILITIES, "more than 4096"),
        (PASS, MAGIC + b"\x01" + START[1:5] + b"\x05block" + bytes(8), "device block sends"),
        (PASS, BEGIN + DEVICE, "device timer sends"),
        (PASS, BEGIN + PART + TAIL + b"\x01" + DEVICE[1:], "device timer sends"),
        (PASS, BEGIN + b"\x02" + struct.pack(">I", 5), "section 5"),
        (PASS, BEGIN + b"\x00", "0x00"),
        (PASS, BEGIN + START, "second time"),
        (PASS, BEGIN + END + TAIL + PART, "after its end"),
        (PASS, BEGIN + b"\x08\x00\x07\x00\x04\x00\x00\x10\x00", "package"),
        (PASS, BEGIN + b"\x08\x00\x09\xff\xff", "65535 bytes"),
        (PASS, MAGIC + START[:-1] + b"\x03", "version 3"),
        (PASS, MAGIC + START + table(RAM, RAM), "same name"),
        (PASS, MAGIC + START + table(RAM, VGA, total=0x101000), "larger than what is left"),
        (PASS, MAGIC + START + struct.pack(">Q", 0x1004) + b"\x00", "not a name"),
        (PASS, MAGIC + START + struct.pack(">Q", 0x1004) + b"\x02\xff\xfe", "not a name"),
        (PASS, MAGIC + START + page(0, RAM), "not in the block list"),
        (PASS, MAGIC + DEVICE[:5] + b"\x00", "not a name"),
        (PASS, MAGIC + DEVICE[:5] + b"\x03a\nb", "not a name"),
        (_checkpoint, START + table(VGA, RAM) + TAIL, "not those of the first pass"),
        (_checkpoint, DEVICE, "device timer sends"),
        (_checkpoint, END + page(0, Block("other", 1)), "'other'"),
        (_checkpoint, END + page(0, flags=0x40), "xbzrle"),
        (_checkpoint, END + page(0, flags=0x100), "compress"),
        (_checkpoint, END + page(0, flags=0x80), "RDMA"),
        (_checkpoint, END + page(0, flags=0x208), "flags 0x228"),
        (_checkpoint, END + page(0) + page(0) + page(0, flags=0x808), "flags 0x828"),
        (_checkpoint, END + struct.pack(">Q", 0x1010), "flags 0x10 and address 0x1000"),
        (_checkpoint, END + struct.pack(">Q", 0x1200), "flags 0x200 and address 0x1000"),
        (_checkpoint, END + struct.pack(">Q", 0x30), "flags 0x30"),
        (_checkpoint, b"\x04" + START[1:] + TAIL + PART, "after its end"),
        (_checkpoint, END + TAIL[:8] + b"\x7e" + struct.pack(">I", 3), "footer"),
        (_checkpoint, END + TAIL[:8] + b"\x00" * 5, "footer"),
        (_checkpoint, b"\x06", "0x06"),
    ],
)
def test_what_breaks_the_format_is_refused_by_name(
    make: Callable[[], Scanner], data: bytes, words: str | None
) -> None:
    scanner = make()
    if words is None:
        scan(scanner, data)
        return
    assert words in problem_of(scanner, data).problem


def test_there_may_not_be_more_blocks_than_the_limit() -> None:
    blocks = [Block(f"block{index}", 4096) for index in range(MAX_BLOCKS + 1)]
    scanner = Scanner.for_pass()
    scan(scanner, MAGIC + START + table(*blocks[:-1]))
    assert scanner.layout is not None
    assert "RAM blocks" in problem_of(Scanner.for_pass(), MAGIC + START + table(*blocks)).problem


def test_blocks_without_a_size_end_at_the_limit_too() -> None:
    data = MAGIC + START + struct.pack(">Q", 0x1004)
    data += b"".join(name(f"block{index}") + bytes(8) for index in range(MAX_BLOCKS + 1))
    assert "RAM blocks" in problem_of(Scanner.for_pass(), data).problem


def test_the_scanner_holds_no_part_of_the_buffer_after_a_call() -> None:
    data = bytearray(END + page(0, RAM) + page(0x1000) * 9 + fill(0) * 9 + TAIL)
    scanner = Scanner.for_checkpoint(LAYOUT, None, check_addresses=True)
    with memoryview(data) as buf:
        scanner.scan(buf, 0, len(data))
    data.clear()  # BufferError while anything still points into it


@pytest.mark.parametrize(
    "unit",
    [
        page(0),
        page(0) * 2 + fill(0),
        page(0) * 2 + fill(0) * 2,
        page(0) * 2 + fill(0) + page(0) * 15 + fill(0),
        page(0) * 40 + fill(0),
        fill(0),
    ],
    ids=["pages", "pairs-and-fills", "pairs", "pairs-and-fifteens", "forties", "fills"],
)
@pytest.mark.parametrize("piece", [None, 20_000])
def test_looking_ahead_costs_in_proportion_to_what_there_is(
    unit: bytes, piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0
    headers = ram._headers

    def counting(buf: memoryview, pos: int, count: int, stride: int) -> bytearray:
        nonlocal looked
        looked += count
        return headers(buf, pos, count, stride)

    monkeypatch.setattr(ram, "_headers", counting)
    data = END + unit * (4_000_000 // len(unit)) + TAIL + b"\x00"
    scanner = Scanner.for_checkpoint(LAYOUT, "pc.ram")
    pos = 0
    for end in [*range(piece or len(data), len(data), piece or 1), len(data)]:
        pos = scanner.scan(memoryview(data), pos, end)
    assert scanner.done
    assert looked <= 12 * (scanner.pages + scanner.fills)
