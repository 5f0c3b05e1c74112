"""A second, slow reader of the migration stream, and what must hold for every input of the real one.

`reference` reads one field after the other and one page at a time, straight from the format at the top of
`curling_fd.vmstate.records`. `check` gives the same bytes to the scanner whole, in pieces, with the rest
moved to a new buffer each time, and compares. The unit tests and the fuzz target both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import define, field

from curling_fd.errors import StreamError
from curling_fd.vmstate.ram import fill_bytes, page_addresses
from curling_fd.vmstate.records import (
    FILL_STRIDE,
    PAGE_STRIDE,
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
)
from curling_fd.vmstate.scanner import Scanner

Item = tuple[object, ...]


class Bad(Exception):
    """The stream breaks the format."""


class Short(Exception):
    """The stream ends inside a record."""


@define
class Outcome:
    """What a reader found: items with offsets counted from the start of the stream."""

    items: list[Item] = field(factory=list)
    consumed: int = 0
    bad: bool = False
    last_block: str | None = None
    error: StreamError | None = field(default=None, eq=False)


@define
class _Reader:
    data: bytes
    at: int = 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise Short
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def name(self) -> str:
        try:
            name = self.take(self.number(1)).decode()
        except UnicodeDecodeError:
            raise Bad from None
        if not name or not name.isprintable():
            raise Bad
        return name


def reference(data: bytes, layout: RamLayout | None, last_block: str | None, check: bool) -> Outcome:
    """Reads `data` as a pass, or with a `layout` as a checkpoint."""
    out = Outcome(last_block=last_block)
    try:
        _read(_Reader(data), layout, check, out)
    except Short:
        pass
    except Bad:
        out.bad = True
    return out


def _read(r: _Reader, layout: RamLayout | None, check: bool, out: Outcome) -> None:
    whole = layout is None
    blocks = None if layout is None else {b.name: b.size for b in layout.blocks}
    ids = None if layout is None else (layout.section_id, layout.instance_id)
    if whole:
        for index, byte in enumerate(b"QEVM"):
            if r.take(1)[0] != byte:
                raise Bad(index)
        if r.number(4) != 3:
            raise Bad
        out.consumed = r.at
        if r.data[r.at : r.at + 1] == b"\x07":
            start = r.at
            limited = _Reader(r.data[: start + 4097], start)
            try:
                _configuration(limited)
            except Short:
                if len(limited.data) == start + 4097:
                    raise Bad from None
                raise
            r.at = limited.at
            out.items.append(("configuration", r.data[start : r.at]))
            out.consumed = r.at
    sent = ended = False
    while r.at < len(r.data):
        start = r.at
        kind = r.number(1)
        if kind == 8:
            command, length = r.number(2), r.number(2)
            if command == 7 or length > 4096:
                raise Bad
            out.items.append(("command", command, r.take(length)))
            out.consumed = r.at
            continue
        if kind == 0 and not whole:
            out.items.append(("eof", r.at))
            out.consumed = r.at
            return
        if kind == 0 and sent:
            out.items.append(("device", start))
            out.consumed = len(r.data)
            return
        if kind not in (1, 2, 3, 4):
            raise Bad
        if kind in (1, 4):
            section, idstr, instance, version = r.number(4), r.name(), r.number(4), r.number(4)
            if idstr != "ram":
                if not whole or not (ended or (sent and kind == 4)):
                    raise Bad
                out.items.append(("device", start))
                out.consumed = len(r.data)
                return
            if version != 4 or (ids is not None and (whole or ids != (section, instance))):
                raise Bad
            ids = (section, instance)
        else:
            section = r.number(4)
            if ids is None or section != ids[0]:
                raise Bad
        if ended:
            raise Bad
        out.items.append(("start", kind, start))
        out.consumed = r.at
        blocks = _body(r, blocks, check, out)
        if r.number(1) != 0x7E or r.number(4) != ids[0]:
            raise Bad
        out.items.append(("end", r.at))
        out.consumed = r.at
        sent = sent or kind != 1
        ended = kind in (3, 4)


def _configuration(r: _Reader) -> None:
    r.number(1)
    length = r.number(4)
    if not 0 < length <= 4096:
        raise Bad
    try:
        r.take(length).decode()
    except UnicodeDecodeError:
        raise Bad from None
    while r.take(1) == b"\x05":
        name = r.name()
        r.number(4)
        if name == "configuration/target-page-bits":
            if r.number(4) != 12:
                raise Bad
        elif name == "configuration/capabilities":
            for _ in range(r.number(4)):
                if r.name() in ("x-ignore-shared", "mapped-ram"):
                    raise Bad
        elif name == "configuration/uuid":
            r.take(16)
        else:
            raise Bad
    r.at -= 1


def _body(r: _Reader, blocks: dict[str, int] | None, check: bool, out: Outcome) -> dict[str, int] | None:
    while True:
        header = r.number(8)
        flags, address = header & 0xFFF, header & ~0xFFF
        if header in (0x10, 0x200):
            out.consumed = r.at
            if header == 0x10:
                return blocks
        elif flags == 4:
            out.consumed = r.at
            blocks = _block_list(r, address, blocks, out)
        elif flags in (0x08, 0x28, 0x02, 0x22):
            block = out.last_block
            if flags < 0x20:
                raw = r.take(r.number(1))
                if blocks is None or raw not in {name.encode() for name in blocks}:
                    raise Bad
                block = raw.decode()
            elif block is None:
                raise Bad
            data = r.at
            r.take(4096 if flags & 8 else 1)
            assert blocks is not None
            assert block is not None
            if check and address >= blocks[block]:
                raise Bad
            out.items.append(
                ("page", block, address, data) if flags & 8 else ("fill", block, address, r.data[data])
            )
            out.last_block = block
            out.consumed = r.at
        else:
            raise Bad


def _block_list(r: _Reader, left: int, known: dict[str, int] | None, out: Outcome) -> dict[str, int]:
    table: list[tuple[str, int]] = []
    while left:
        name, size = r.name(), r.number(8)
        if size > left or len(table) == 1024:
            raise Bad
        left -= size
        table.append((name, size))
        if left:
            out.consumed = r.at
    blocks = dict(table)
    if len(blocks) != len(table) or (known is not None and list(known.items()) != table):
        raise Bad
    out.items.append(("table", *table))
    out.consumed = r.at
    return blocks


def flatten(events: Iterable[Event], buf: memoryview, base: int) -> list[Item]:
    """The items of `events`, page by page; `base` is the offset in the stream of the start of `buf`."""
    items: list[Item] = []
    for event in events:
        match event:
            case Configuration(section=section):
                items.append(("configuration", section))
            case Command(id=command, payload=payload):
                items.append(("command", command, payload))
            case SectionStart(kind=kind, offset=offset):
                items.append(("start", int(kind), base + offset))
            case SectionEnd(offset=offset):
                items.append(("end", base + offset))
            case BlockTable(blocks=blocks):
                items.append(("table", *((block.name, block.size) for block in blocks)))
            case PageRun() as run:
                assert run.data + (run.count - 1) * PAGE_STRIDE + 4096 <= len(buf)
                for k, address in enumerate(page_addresses(buf, run)):
                    items.append(("page", run.block.name, address, base + run.data + k * PAGE_STRIDE))
            case FillRun() as run:
                assert run.data + (run.count - 1) * FILL_STRIDE < len(buf)
                for address, byte in zip(page_addresses(buf, run), fill_bytes(buf, run), strict=True):
                    items.append(("fill", run.block.name, address, byte))
            case EndOfVmState(offset=offset):
                items.append(("eof", base + offset))
            case DeviceState(offset=offset):
                items.append(("device", base + offset))
    return items


def scan_growing(scanner: Scanner, data: bytes, cuts: Iterable[int]) -> Outcome:
    """Scans one buffer that is filled up to each of `cuts`, then to its end."""
    out = Outcome()
    buf = memoryview(data)
    pos = 0
    for end in [*cuts, len(data)]:
        try:
            pos = _scan(scanner, buf, pos, end)
        except StreamError as error:
            out.bad, out.error = True, error
        out.items += flatten(scanner.drain(), buf, 0)
        if out.bad:
            break
    out.consumed = scanner.offset
    out.last_block = scanner.last_block
    return out


def scan_moving(scanner: Scanner, data: bytes, cuts: Iterable[int]) -> Outcome:
    """Scans pieces of `data`, each in a new buffer behind what the scan before left over."""
    out = Outcome()
    rest, fed = b"", 0
    for end in [*cuts, len(data)]:
        base = fed - len(rest)
        # Something before and after, which is none of the scanner's business.
        buf = memoryview(b"\xff" * 3 + rest + data[fed:end] + b"\xff" * 3)
        try:
            pos = _scan(scanner, buf, 3, len(buf) - 3)
        except StreamError as error:
            out.bad, out.error = True, error
        out.items += flatten(scanner.drain(), buf, base - 3)
        if out.bad:
            break
        rest, fed = bytes(buf[pos : len(buf) - 3]), end
    out.consumed = scanner.offset
    out.last_block = scanner.last_block
    return out


def _scan(scanner: Scanner, buf: memoryview, start: int, end: int) -> int:
    before = scanner.offset
    pos = scanner.scan(buf, start, end)
    assert start <= pos <= end
    assert scanner.offset - before == pos - start
    # An unfinished record is a page or a configuration at most, and every event has a record.
    assert scanner.done or end - pos < 3 * 4096
    assert len(scanner.events) <= end - start
    return pos


def check(
    data: bytes,
    layout: RamLayout | None,
    last_block: str | None,
    *,
    cuts: Iterable[int] = (),
    check_addresses: bool = False,
    bytewise: bool = False,
) -> Outcome:
    """Asserts that however `data` comes, the scanner finds what `reference` finds, and returns that."""
    expected = reference(data, layout, last_block, check_addresses)

    def make() -> Scanner:
        if layout is None:
            return Scanner.for_pass(check_addresses=check_addresses)
        return Scanner.for_checkpoint(layout, last_block, check_addresses=check_addresses)

    ways: list[tuple[Callable[[Scanner, bytes, Iterable[int]], Outcome], Iterable[int]]] = [
        (scan_growing, ()),
        (scan_growing, cuts := sorted(cuts)),
        (scan_moving, cuts),
    ]
    if bytewise:
        ways += [(scan_growing, range(len(data))), (scan_moving, range(len(data)))]
    offset = None
    for way, places in ways:
        found = way(make(), data, places)
        assert found.bad == expected.bad, (way.__name__, found, expected)
        if found.error is not None:
            assert 0 <= found.error.offset <= len(data)
            assert offset in (None, found.error.offset), "the error's place depends on how the bytes came"
            offset = found.error.offset
            # How much of a run came through before its bad page depends on how it came.
            assert found.items == expected.items[: len(found.items)]
            assert check_addresses or len(found.items) == len(expected.items)
        else:
            assert found == expected, way.__name__
    return expected
