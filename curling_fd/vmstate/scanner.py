"""An incremental scanner for QEMU's migration stream: it finds what is where, and copies no page.

The caller owns the bytes. It reads into a buffer of its own and calls `scan` with what is there; the
scanner consumes whole records and says where the first unconsumed byte is. Before the next call the
caller may move the rest to the start of another buffer. Events hold offsets, not bytes (except for the
few small records), so they are of use only while the buffer is as it was.

Two kinds of stream are scanned:

    a pass          a migration from its magic on: the first pass of COLO, a background snapshot,
                    a plain migration. RAM sections are understood. Device state, which has no
                    length, begins with the first section of another device after RAM has been sent,
                    and reaches to the end of the stream.
    a checkpoint    what follows VMSTATE_SEND in QEMU's COLO loop: commands, RAM sections, one byte 00.

States, and the byte that leads from one to the next:

    MAGIC --"QEVM" 3--> FIRST --07--> SECTIONS          (a pass; 07 may be missing)
    SECTIONS --08--> SECTIONS
    SECTIONS --01 02 03 04, of ram--> BODY --end mark--> FOOTER --7e--> SECTIONS
    SECTIONS --other device, or 00--> OPAQUE            (a pass, RAM sent)
    SECTIONS --00--> DONE                               (a checkpoint)

Every input is either consumed or ends in `StreamError`, and memory stays bounded whatever comes: at
most `MAX_BLOCKS` names are kept, and no record but a page (which needs its 4 KiB in the caller's
buffer) is longer than `MAX_CONFIGURATION` plus a few bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from curling_fd.errors import StreamError
from curling_fd.vmstate.configuration import read_configuration
from curling_fd.vmstate.cursor import Cursor, Incomplete, Malformed
from curling_fd.vmstate.ram import RamBody
from curling_fd.vmstate.records import (
    MAGIC,
    MAX_COMMAND,
    RAM_IDSTR,
    RAM_VERSION,
    STREAM_VERSION,
    Command,
    CommandId,
    DeviceState,
    EndOfVmState,
    Event,
    RamLayout,
    SectionEnd,
    SectionStart,
    SectionType,
)

_Step = Callable[[memoryview, int, int], int]


class Scanner:
    """One scan of one stream. Make it with `for_pass` or `for_checkpoint`.

    Attributes:
        events: what was found, oldest first; the caller takes it from here (`drain`).
        offset: bytes consumed since the scanner was made.
        done: the end of a checkpoint has been consumed; nothing more will be.
        device_state_offset: where in the stream the device state of a pass begins, once known.
    """

    def __init__(self, body: RamBody, layout: RamLayout | None) -> None:
        self.events: list[Event] = []
        self.offset = 0
        self.done = False
        self.device_state_offset: int | None = None
        self._origin = 0
        self._body = body
        self._whole = layout is None
        self._ids = None if layout is None else (layout.section_id, layout.instance_id)
        self._ram_sent = False
        self._ram_ended = False
        self._kind = SectionType.START
        self._failed: tuple[int, str] | None = None
        self._step: _Step = self._magic if layout is None else self._section

    @classmethod
    def for_pass(cls, *, check_addresses: bool = False, report_runs: bool = True) -> Scanner:
        """A scanner for a migration from its magic on.

        Args:
            check_addresses: refuse pages outside their block.
            report_runs: make `PageRun` and `FillRun` events. Without them pages are only counted.
        """
        return cls(RamBody(check_addresses=check_addresses, report_runs=report_runs), None)

    @classmethod
    def for_checkpoint(
        cls,
        layout: RamLayout,
        last_block: str | None,
        *,
        check_addresses: bool = False,
        report_runs: bool = True,
    ) -> Scanner:
        """A scanner for one checkpoint of a COLO session.

        Args:
            layout: `layout` of the scanner of the first pass.
            last_block: `last_block` of the scanner before this one, of the first pass or of the
                checkpoint before: QEMU's "same block as before" goes back that far. None for a
                stream that names its first block.
            check_addresses: refuse pages outside their block.
            report_runs: make `PageRun` and `FillRun` events. Without them pages are only counted.
        """
        body = RamBody(layout.blocks, last_block, check_addresses=check_addresses, report_runs=report_runs)
        return cls(body, layout)

    @property
    def layout(self) -> RamLayout | None:
        """The RAM blocks and how the stream names their section, once it has said so."""
        if self._ids is None or self._body.blocks is None:
            return None
        return RamLayout(self._body.blocks, *self._ids)

    @property
    def last_block(self) -> str | None:
        """The block of the last page, for the scanner of the next checkpoint."""
        block = self._body.last_block
        return None if block is None else block.name

    @property
    def pages(self) -> int:
        """Pages seen, fill records not among them."""
        return self._body.pages

    @property
    def fills(self) -> int:
        """Fill records seen."""
        return self._body.fills

    def drain(self) -> list[Event]:
        """Takes the events reported since the last time."""
        events = self.events
        self.events = []
        return events

    def scan(self, buf: memoryview, start: int, end: int) -> int:
        """Consumes the whole records in `buf[start:end]` and returns the offset of what is left.

        `buf` is borrowed for the call: a contiguous memoryview of bytes. The bytes left over must
        come again, at the start of the next call.

        Raises:
            StreamError: this is not the stream it should be; `offset` counts from the first byte this
                scanner was given. The scanner is of no further use.
        """
        if self._failed is not None:
            raise StreamError(*self._failed)
        pos = start
        self._origin = self.offset - start
        try:
            while pos < end:
                before = pos
                pos = self._step(buf, pos, end)
                if pos == before or self._body.midway:
                    break
        except Incomplete:
            pass
        except Malformed as malformed:
            self._failed = (self._origin + malformed.at, malformed.problem)
            raise StreamError(*self._failed) from None
        self.offset += pos - start
        return pos

    # Each step consumes one thing at `pos`, or returns `pos` or raises Incomplete if it is not all there.

    def _magic(self, buf: memoryview, pos: int, end: int) -> int:
        cursor = Cursor(buf, pos, end)
        # Compared as far as it has come: what is no migration at all is known by its first byte.
        size = min(len(MAGIC), end - pos)
        magic = cursor.bytes(size)
        if magic != MAGIC[:size]:
            raise Malformed(pos, f"no migration stream: it begins with {magic!r}")
        version = cursor.be32()
        if version != STREAM_VERSION:
            raise Malformed(pos, f"version {version} of the migration stream, not {STREAM_VERSION}")
        self._step = self._first
        return cursor.at

    def _first(self, buf: memoryview, pos: int, end: int) -> int:
        if buf[pos] == SectionType.CONFIGURATION:
            configuration = read_configuration(Cursor(buf, pos, end))
            self.events.append(configuration)
            self._step = self._section
            return pos + len(configuration.section)
        self._step = self._section
        return self._section(buf, pos, end)

    def _section(self, buf: memoryview, pos: int, end: int) -> int:
        cursor = Cursor(buf, pos, end)
        match cursor.u8():
            case SectionType.COMMAND:
                self._command(cursor)
            case SectionType.START | SectionType.FULL as kind:
                self._named_section(cursor, SectionType(kind))
            case SectionType.PART | SectionType.END as kind:
                section_id = cursor.be32()
                if self._ids is None or section_id != self._ids[0]:
                    raise Malformed(pos, f"a part of section {section_id}, which is not RAM")
                self._open(pos, SectionType(kind))
            case SectionType.END_OF_VM_STATE if not self._whole:
                self.events.append(EndOfVmState(cursor.at))
                self.done = True
                self._step = self._finished
            case SectionType.END_OF_VM_STATE if self._ram_sent:
                self._begin_opaque(pos)
            case kind:
                raise Malformed(pos, f"a section of type {kind:#04x} does not belong here")
        return cursor.at

    def _command(self, cursor: Cursor) -> None:
        start = cursor.at - 1
        command = cursor.be16()
        length = cursor.be16()
        if length > MAX_COMMAND:
            raise Malformed(start, f"command {command} with {length} bytes")
        if command == CommandId.PACKAGED:
            raise Malformed(start, "a package, as postcopy sends it")
        self.events.append(Command(command, cursor.bytes(length)))

    def _named_section(self, cursor: Cursor, kind: SectionType) -> None:
        start = cursor.at - 1
        section_id = cursor.be32()
        idstr = cursor.name("a device")
        instance_id = cursor.be32()
        version = cursor.be32()
        if idstr != RAM_IDSTR:
            # After RAM's END nothing iterates any more. A background snapshot has no END, and sends
            # device state only in FULL sections.
            if self._whole and (self._ram_ended or (self._ram_sent and kind == SectionType.FULL)):
                self._begin_opaque(start)
                return
            raise Malformed(start, f"device {idstr} sends state before RAM is complete")
        if version != RAM_VERSION:
            raise Malformed(start, f"RAM in version {version} of its format, not {RAM_VERSION}")
        if self._ids is None:
            self._ids = (section_id, instance_id)
        elif self._whole or self._ids != (section_id, instance_id):
            raise Malformed(start, f"RAM begins a second time, as section {section_id}")
        self._open(start, kind)

    def _open(self, start: int, kind: SectionType) -> None:
        if self._ram_ended:
            raise Malformed(start, "RAM goes on after its end")
        self._kind = kind
        self.events.append(SectionStart(kind, start))
        self._step = self._ram

    def _ram(self, buf: memoryview, pos: int, end: int) -> int:
        pos = self._body.scan(buf, pos, end, self.events)
        if not self._body.midway:
            self._step = self._footer
        return pos

    def _footer(self, buf: memoryview, pos: int, end: int) -> int:
        cursor = Cursor(buf, pos, end)
        assert self._ids is not None
        if cursor.u8() != SectionType.FOOTER or cursor.be32() != self._ids[0]:
            raise Malformed(pos, "the footer of the RAM section is missing")
        self._ram_sent = self._ram_sent or self._kind != SectionType.START
        self._ram_ended = self._kind in (SectionType.END, SectionType.FULL)
        self.events.append(SectionEnd(cursor.at))
        self._step = self._section
        return cursor.at

    def _begin_opaque(self, start: int) -> None:
        self.device_state_offset = self._origin + start
        self.events.append(DeviceState(start))
        self._step = self._opaque

    def _opaque(self, buf: memoryview, pos: int, end: int) -> int:
        return end

    def _finished(self, buf: memoryview, pos: int, end: int) -> int:
        return pos
