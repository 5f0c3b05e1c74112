"""A first pass from QEMU's socket into pieces of whole records, while the guest runs."""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio

from curling_fd.capture.engine import Description, PassSink
from curling_fd.errors import EngineFailed
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import DeviceState, Event
from curling_fd.vmstate.scanner import Scanner

#: Bytes of a piece. Larger ones save frames, smaller ones keep acknowledgements and progress coming.
PIECE = 4 << 20

#: Room a piece must have left to be read into again; a record begun there fits, for none is longer than
#: a page or a configuration section.
_ROOM = 256 << 10


class PassIntake:
    """Reads one pass from `sock` (borrowed) and ships it as it comes.

    A piece holds whole records; the bytes of a record that is not whole yet begin the next piece. Device
    state at the end of the pass is left out: each checkpoint brings its own.

    Args:
        engine: whose pass it is, for errors.
        ends_with_socket: QEMU closes its end after the pass, and that is its end; else `end` says so.
        observe: called, in a thread, with the buffer and the runs of pages in it, before they are shipped.
    """

    def __init__(
        self,
        engine: str,
        sock: socket.socket,
        sink: PassSink,
        *,
        ends_with_socket: bool = False,
        observe: Callable[[memoryview, list[Event]], None] | None = None,
    ) -> None:
        self._engine = engine
        self._socket = sock
        self._sink = sink
        self._ends_with_socket = ends_with_socket
        self._observe = observe
        self._scanner = Scanner.for_pass(check_addresses=observe is not None, report_runs=observe is not None)
        self._buffer: Buffer | None = None
        self._rest = b""
        self._have = 0
        self._scanned = 0
        self._shipped_pages = 0
        self._ram_complete = False
        self._ending = False
        self._waiting = trio.CancelScope()

    def end(self) -> None:
        """QEMU has written all of the pass: `run` takes what is in the socket, and returns."""
        self._ending = True
        self._waiting.cancel()

    async def run(self) -> Description:
        """Take what QEMU sends, until `end`.

        Raises:
            EngineFailed: QEMU closed the migration, or it ended too early.
            StreamError: the stream is not one.
        """
        try:
            while True:
                await trio.lowlevel.checkpoint()
                if await self._read():
                    continue
                if self._ending:
                    break
                with trio.CancelScope() as self._waiting:
                    await trio.lowlevel.wait_readable(self._socket)
            await self._ship(self._scanned)
        finally:
            if self._buffer is not None:
                self._sink.give_back(self._buffer)
        layout = self._scanner.layout
        if layout is None or not self._ram_complete:
            raise EngineFailed(self._engine, "the first pass ended before the guest's memory was complete")
        return Description(layout, self._scanner.last_block)

    async def _read(self) -> bool:
        """Read once, if there is something, and scan it."""
        if self._buffer is None:
            self._buffer = await self._sink.acquire()
            self._have, self._scanned = len(self._rest), 0
            self._buffer.view[: self._have] = self._rest
        view = self._buffer.view
        try:
            count = self._socket.recv_into(view[self._have : PIECE], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if count == 0 and self._ends_with_socket:
            self._ending = True
            return False
        if count == 0:
            raise EngineFailed(self._engine, "QEMU closed the migration during the first pass")
        if self._ram_complete:
            return True  # device state of no use; the next read overwrites it
        self._have += count
        self._scanned = self._scanner.scan(view, self._scanned, self._have)
        events = self._scanner.drain()
        if self._observe is not None and events:
            await trio.to_thread.run_sync(self._observe, view, events)
        for event in events:
            if isinstance(event, DeviceState):
                self._ram_complete = True
                await self._ship(event.offset)
                return True
        if self._have > PIECE - _ROOM:
            await self._ship(self._scanned)
        return True

    async def _ship(self, length: int) -> None:
        """Hand over the first `length` bytes, whole records; keep what follows for the next piece."""
        buffer = self._buffer
        if buffer is None or length == 0:
            return
        self._rest = b"" if self._ram_complete else bytes(buffer.view[length : self._have])
        self._buffer = None
        pages = self._scanner.pages + self._scanner.fills
        await self._sink.ship(buffer, length, pages - self._shipped_pages)
        self._shipped_pages = pages
