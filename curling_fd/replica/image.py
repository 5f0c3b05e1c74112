"""The backup's copy of a VM: RAM images, device state, and the one checkpoint they are (I1).

A checkpoint is first `stage`d: scanned to its end and every address checked, the images untouched. Only
then may it be acknowledged, and `commit` copies its pages, which cannot fail. Between the two the staged
bytes are the redo log: whoever wants to use the replica lets the commit finish first.

The images of the large RAM blocks are memfds that the waiting standby QEMU maps as its own memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from attrs import frozen

from curling_fd.errors import FrameError
from curling_fd.link.frames import HEAD_SIZE, CheckpointHead
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.image import RamImage
from curling_fd.vmstate.records import (
    PAGE_SIZE,
    Block,
    BlockTable,
    Configuration,
    Event,
    FillRun,
    PageRun,
    RamLayout,
)
from curling_fd.vmstate.restore import restore_stream
from curling_fd.vmstate.scanner import Scanner

#: Bytes that RAM blocks other than the mapped ones may have together: ROMs, video memory.
SMALL_BLOCKS_LIMIT = 1 << 30


@frozen
class Staged:
    """A whole and valid checkpoint that is not committed yet. Borrows the buffer it lies in.

    `disk` says where in `view` its disk log starts and ends; that is checked by who has the disks.
    """

    sequence: int
    view: memoryview
    runs: tuple[PageRun | FillRun, ...]
    device: bytes
    last_block: str | None
    disk: tuple[int, int]


@frozen
class ReplicaLeft:
    """A replica between two processes that keep it in turn; its images go beside it, as memfds.

    Attributes:
        sequence: of the checkpoint it is.
        small: the RAM blocks that no standby maps, in the order of their images.
    """

    sequence: int
    configuration: Configuration | None
    layout: RamLayout
    last_block: str | None
    small: tuple[Block, ...]


class Replica:
    """Images of a VM's RAM and the state of its devices.

    Args:
        mapped: RAM blocks whose images the standby maps; made by the caller, borrowed.

    Attributes:
        committed: the sequence number of the checkpoint the replica is; 0 before the first.
    """

    def __init__(self, mapped: Sequence[tuple[Block, Buffer]]) -> None:
        self._mapped = tuple(block for block, _ in mapped)
        self._small: list[tuple[Block, Buffer]] = []
        # A QEMU that starts may have written something into its memory already.
        self._images = {
            block.name: RamImage(buffer.view, fresh=not buffer.allocated()) for block, buffer in mapped
        }
        self._pass = Scanner.for_pass(check_addresses=True)
        self._configuration: Configuration | None = None
        self._layout: RamLayout | None = None
        self._last_block: str | None = None
        self._device = b""
        self.committed = 0

    @classmethod
    def inherit(
        cls, mapped: Sequence[tuple[Block, Buffer]], left: ReplicaLeft, small: Sequence[int], device: bytes
    ) -> Replica:
        """The replica that another process has `left`.

        Args:
            mapped: see above; with their content.
            small: memfds of the small blocks; owned from here on.
            device: the device state.
        """
        replica = cls(mapped)
        for block, fd in zip(left.small, small, strict=True):
            replica._add_small(block, fd)
        replica._configuration = left.configuration
        replica._layout = left.layout
        replica._last_block = left.last_block
        replica._device = device
        replica.committed = left.sequence
        return replica

    def leave(self) -> tuple[ReplicaLeft, tuple[int, ...], bytes]:
        """What `inherit` needs but the mapped blocks; the descriptors are borrowed."""
        assert self._layout is not None, "nothing committed"
        left = ReplicaLeft(
            self.committed,
            self._configuration,
            self._layout,
            self._last_block,
            tuple(block for block, _ in self._small),
        )
        return left, tuple(buffer.fd for _, buffer in self._small), self._device

    def bulk(self, view: memoryview, length: int) -> None:
        """Take a piece of the first pass, whole records in `view[:length]`.

        Raises:
            StreamError: it is not the stream it should be.
            FrameError: its RAM blocks are not those the standby has, or a record is torn.
        """
        if self._layout is not None:
            raise FrameError("a piece of a first pass after its end")
        if self._pass.scan(view, 0, length) != length:
            raise FrameError("a piece of a first pass ends inside a record")
        runs: list[PageRun | FillRun] = []
        for event in self._pass.drain():
            if isinstance(event, Configuration):
                self._configuration = event
            elif isinstance(event, BlockTable):
                self._define(event.blocks)
            elif isinstance(event, PageRun | FillRun):
                runs.append(event)
        self._apply(view, runs)

    def stage(self, sequence: int, view: memoryview, length: int) -> Staged:
        """Check the checkpoint `sequence` in `view[:length]` to its last byte; changes nothing.

        Raises:
            StreamError, FrameError: it is not a whole checkpoint of this VM.
        """
        layout, last_block = self._layout, self._last_block
        if layout is None:
            layout, last_block = self._pass.layout, self._pass.last_block
            if layout is None:
                raise FrameError("a checkpoint before a first pass")
        head = CheckpointHead.decode(view, length)
        end = HEAD_SIZE + head.ram
        scanner = Scanner.for_checkpoint(layout, last_block, check_addresses=True)
        if scanner.scan(view, HEAD_SIZE, end) != end or not scanner.done:
            raise FrameError("a checkpoint whose memory part is not whole")
        if not head.device:
            raise FrameError("a checkpoint without device state")
        log = end + head.device
        device = bytes(view[end:log])
        runs = tuple(_runs(scanner.drain()))
        return Staged(sequence, view, runs, device, scanner.last_block, (log, log + head.disk))

    def commit(self, staged: Staged) -> None:
        """Make the replica the checkpoint `staged`. Done twice it is the same as done once."""
        self._apply(staged.view, staged.runs)
        if self._layout is None:
            self._layout = self._pass.layout
        self._last_block = staged.last_block
        self._device = staged.device
        self.committed = staged.sequence

    def restore(self) -> Iterator[bytes | bytearray | memoryview]:
        """The stream that makes a standby, which maps the images, continue from the replica."""
        assert self._layout is not None, "nothing committed"
        sizes = {block.name: block.size for block in self._layout.blocks}
        mapped = {block.name for block in self._mapped}
        small = {
            name: image.view[: sizes[name]] for name, image in self._images.items() if name not in mapped
        }
        # Machine types before 2.4 send no configuration.
        configuration = self._configuration.section if self._configuration else b""
        return restore_stream(configuration, self._layout, small, self._device)

    def blocks(self) -> tuple[Block, ...]:
        """Every RAM block, in QEMU's order; empty before the first pass named them."""
        layout = self._layout or self._pass.layout
        return layout.blocks if layout else ()

    def image(self, name: str) -> memoryview:
        """The image of the RAM block `name`, borrowed."""
        return self._images[name].view

    def close(self) -> None:
        """Free the images of the small blocks; the mapped ones are the caller's."""
        self._images.clear()
        for _, buffer in self._small:
            buffer.close()
        self._small.clear()

    def _define(self, blocks: Sequence[Block]) -> None:
        by_name = {block.name: block for block in blocks}
        for mapped in self._mapped:
            if by_name.pop(mapped.name, None) != mapped:
                raise FrameError(f"the primary has no RAM block `{mapped.name}` of {mapped.size} bytes")
        small = by_name.values()
        if sum(block.size for block in small) > SMALL_BLOCKS_LIMIT:
            raise FrameError("the VM's smaller RAM blocks are larger than all a VM has")
        for block in small:
            if block.name not in self._images:  # else the list was sent again
                self._add_small(block)

    def _add_small(self, block: Block, fd: int | None = None) -> None:
        # Touched now: all of it is read at a failover, and first use would take most of that time.
        size = max(_whole_pages(block.size), PAGE_SIZE)
        buffer = Buffer(f"curling-{block.name}", size, prefault=size, fd=fd)
        self._small.append((block, buffer))
        self._images[block.name] = RamImage(buffer.view, fresh=fd is None)

    def _apply(self, view: memoryview, runs: Iterable[PageRun | FillRun]) -> None:
        for run in runs:
            self._images[run.block.name].apply(view, run)


def _whole_pages(size: int) -> int:
    """QEMU rounds the memory behind a block up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def _runs(events: Iterable[Event]) -> Iterator[PageRun | FillRun]:
    return (event for event in events if isinstance(event, PageRun | FillRun))
