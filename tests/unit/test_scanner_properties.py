"""The scanner against a slow second reader, on made-up streams: whole, cut, byte by byte, broken."""

from __future__ import annotations

import struct

from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.vmstate.records import Block, RamLayout
from tests.unit.scanner_reference import Outcome, check

exhaustive = settings(max_examples=100, deadline=None, derandomize=True)
slow = settings(max_examples=15, deadline=None, derandomize=True)

LAYOUT = RamLayout(
    (
        Block("pc.ram", 0x40000),
        Block("0000:00:02.0/vga.vram", 0x10000),
        Block("/rom@etc/acpi/tables", 0x2F00),
        Block("dimm", (1 << 40) - 0x2F00),
    ),
    section_id=2,
    instance_id=1,
)
# What looks like the start of a record is the hardest content.
CONTENTS = (
    bytes(4096),
    bytes((*bytes(7), 0x28)) * 512,
    bytes((*bytes(7), 0x10, 0x7E, *struct.pack(">I", 2), 0, 0, 0)) * 256,
    b"\xff" * 4096,
    b"\x22\x28\x00" * 1365 + b"\x00",
)
ADDRESSES = (0, 0x1000, 0x2000, 0x3000, 0xF000, 0x10000, 0x3F000, 0xFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000)


@define
class Stream:
    """A stream being put together, and the places in it where a record begins."""

    data: bytearray = field(factory=bytearray)
    marks: list[int] = field(factory=list)
    last: Block | None = None

    def add(self, *parts: bytes) -> None:
        self.marks.append(len(self.data))
        for part in parts:
            self.data += part


def name(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


@st.composite
def runs(draw: st.DrawFn, stream: Stream, longest: int) -> None:
    """Adds pages or fills of one block to `stream`."""
    block = draw(st.sampled_from(LAYOUT.blocks))
    named = stream.last is not block or draw(st.booleans())
    is_page = draw(st.booleans())
    content = draw(st.sampled_from(CONTENTS))
    addresses = draw(st.lists(st.sampled_from(ADDRESSES), min_size=1, max_size=longest))
    for address in addresses:
        flags = (0x08 if is_page else 0x02) | (0 if named else 0x20)
        stream.add(
            struct.pack(">Q", address | flags),
            name(block.name) if named else b"",
            content if is_page else content[:1],
        )
        named = False
    stream.last = block


@st.composite
def section(draw: st.DrawFn, stream: Stream, kind: int, longest: int) -> None:
    """Adds a RAM section to `stream`."""
    stream.add(bytes((kind,)), struct.pack(">I", LAYOUT.section_id))
    if kind in (1, 4):
        stream.data += name("ram") + struct.pack(">II", LAYOUT.instance_id, 4)
        stream.add(struct.pack(">Q", sum(block.size for block in LAYOUT.blocks) | 0x04))
        for block in LAYOUT.blocks:
            stream.add(name(block.name), struct.pack(">Q", block.size))
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.integers(0, 9)) == 0:
            stream.add(struct.pack(">Q", 0x200))
        draw(runs(stream, longest))
    stream.add(struct.pack(">Q", 0x10))
    stream.add(b"\x7e", struct.pack(">I", LAYOUT.section_id))


@st.composite
def commands(draw: st.DrawFn, stream: Stream) -> None:
    """Adds command sections to `stream`."""
    for _ in range(draw(st.integers(0, 2))):
        payload = draw(st.binary(max_size=9))
        stream.add(b"\x08", struct.pack(">HH", draw(st.sampled_from((1, 2, 8, 11))), len(payload)), payload)


@st.composite
def passes(draw: st.DrawFn, longest: int = 60) -> Stream:
    """A whole migration."""
    stream = Stream()
    stream.add(b"QEVM", struct.pack(">I", 3))
    if draw(st.booleans()):
        machine = draw(st.sampled_from((b"pc-i440fx-7.2", b"q")))
        stream.add(b"\x07", struct.pack(">I", len(machine)), machine)
        if draw(st.booleans()):
            stream.add(b"\x05", name("configuration/uuid"), struct.pack(">I", 1), bytes(16))
    draw(commands(stream))
    draw(section(stream, 1, longest))
    for _ in range(draw(st.integers(0, 2))):
        draw(section(stream, 2, longest))
        draw(commands(stream))
    draw(section(stream, 3, longest))
    stream.add(b"\x04", struct.pack(">I", 7), name("timer"), struct.pack(">II", 0, 2), b"state \x7e\x00\x00")
    return stream


@st.composite
def checkpoints(draw: st.DrawFn, longest: int = 60) -> Stream:
    """What follows VMSTATE_SEND, the block before being the first of the layout."""
    stream = Stream(last=LAYOUT.blocks[0])
    draw(commands(stream))
    for kind in draw(st.sampled_from(((3,), (2, 3), (4,), (1, 2, 3), (2, 2)))):
        draw(section(stream, kind, longest))
    stream.add(b"\x00")
    return stream


@st.composite
def breakage(draw: st.DrawFn, stream: Stream) -> bytes:
    """`stream` with bytes flipped, cut out, put in or cut off, mostly near the start of a record."""
    data = bytearray(stream.data)
    for _ in range(draw(st.integers(1, 3))):
        near = draw(st.sampled_from(stream.marks)) + draw(st.integers(0, 30))
        at = min(draw(st.one_of(st.just(near), st.integers(0, len(data)))), len(data))
        match draw(st.sampled_from(("flip", "flip", "drop", "insert", "cut"))):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "drop":
                del data[at : at + draw(st.integers(1, 20))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
            case "cut":
                del data[at:]
    return bytes(data)


def places(data: st.DataObject, stream: Stream) -> list[int]:
    """Where to cut: anywhere, and at the places where records begin and just beside them."""
    size = len(stream.data)
    near = st.sampled_from(stream.marks).flatmap(lambda mark: st.integers(mark - 1, mark + 9))
    cuts = data.draw(st.lists(st.one_of(near, st.integers(0, size)), max_size=12))
    return [min(max(cut, 0), size) for cut in cuts]


def fits(stream: Stream, outcome: Outcome) -> None:
    assert not outcome.bad
    assert outcome.consumed == len(stream.data)


@exhaustive
@given(passes(), st.data())
def test_a_pass_is_read_alike_whole_and_in_pieces(stream: Stream, data: st.DataObject) -> None:
    fits(stream, check(bytes(stream.data), None, None, cuts=places(data, stream)))


@exhaustive
@given(checkpoints(), st.data())
def test_a_checkpoint_is_read_alike_whole_and_in_pieces(stream: Stream, data: st.DataObject) -> None:
    fits(stream, check(bytes(stream.data), LAYOUT, "pc.ram", cuts=places(data, stream)))


@slow
@given(passes(longest=2))
def test_a_pass_is_read_alike_byte_by_byte(stream: Stream) -> None:
    fits(stream, check(bytes(stream.data), None, None, bytewise=True))


@slow
@given(checkpoints(longest=2))
def test_a_checkpoint_is_read_alike_byte_by_byte(stream: Stream) -> None:
    fits(stream, check(bytes(stream.data), LAYOUT, "pc.ram", bytewise=True))


@exhaustive
@given(passes(longest=12), st.data(), st.booleans())
def test_a_broken_pass_is_read_or_refused(stream: Stream, data: st.DataObject, addresses: bool) -> None:
    broken = data.draw(breakage(stream))
    cuts = [min(cut, len(broken)) for cut in places(data, stream)]
    check(broken, None, None, cuts=cuts, check_addresses=addresses)


@exhaustive
@given(checkpoints(longest=12), st.data(), st.booleans())
def test_a_broken_checkpoint_is_read_or_refused(stream: Stream, data: st.DataObject, addresses: bool) -> None:
    broken = data.draw(breakage(stream))
    cuts = [min(cut, len(broken)) for cut in places(data, stream)]
    check(broken, LAYOUT, "pc.ram", cuts=cuts, check_addresses=addresses)


@slow
@given(checkpoints(longest=2), st.data(), st.booleans())
def test_what_is_broken_is_refused_alike_byte_by_byte(
    stream: Stream, data: st.DataObject, addresses: bool
) -> None:
    broken = data.draw(breakage(stream))
    check(broken, LAYOUT, "pc.ram", check_addresses=addresses, bytewise=True)


@exhaustive
@given(st.binary(max_size=300), st.sampled_from((b"", b"QEVM\0\0\0\3", b"\x03\0\0\0\2", b"\x02\0\0\0\2")))
def test_garbage_is_read_or_refused(garbage: bytes, start: bytes) -> None:
    check(start + garbage, None, None, bytewise=True)
    check(start + garbage, LAYOUT, None, bytewise=True, check_addresses=True)
