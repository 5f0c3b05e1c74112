"""One checkpoint of QEMU's COLO loop, from the socket into a buffer: the code the guest stands still for.

Everything from CHECKPOINT_REPLY to VMSTATE_LOADED happens in one blocking call, meant for a worker thread:
no event loop turns, no task switch and no allocation stands between QEMU and its answer. What costs time
here costs the guest.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import TypeAlias

from attrs import frozen

from curling_fd.capture import colo
from curling_fd.capture.colo import Message
from curling_fd.errors import CheckpointTimeout, CheckpointTooLarge, EngineFailed
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import RamLayout
from curling_fd.vmstate.scanner import Scanner

#: Bytes QEMU may write before we read; what the socket holds need not wait for our scheduling.
SOCKET_BUFFER = 4 << 20

_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


OnBoundary: TypeAlias = Callable[[], Callable[[], None] | None]
"""See `CheckpointReader.take`."""


@frozen
class Captured:
    """A whole checkpoint in `buffer`: `ram` bytes of RAM sections, then `device` bytes of device state.

    Attributes:
        pages: page records among the RAM sections, fill pages included.
        boundary_us: wall clock at the boundary, microseconds since the Unix epoch.
        seconds: from our REPLY to our LOADED.
        released_us: wall clock when QEMU was told to let the guest go on; 0 if it goes on by itself.
    """

    buffer: Buffer
    ram: int
    device: int
    pages: int
    boundary_us: int
    seconds: float
    released_us: int = 0


def migration_socketpair() -> tuple[socket.socket, socket.socket]:
    """A connected pair: our end and the one for QEMU. Both belong to the caller."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        for forced, plain in (
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        ):
            try:
                end.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
            except PermissionError:  # without CAP_NET_ADMIN: as much as net.core allows
                end.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
    return ours, theirs


def set_receive_timeout(sock: socket.socket, seconds: float) -> None:
    """Let a blocking recv on `sock` fail with BlockingIOError after `seconds`; 0 is never."""
    whole = int(seconds)
    value = struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


class CheckpointReader:
    """Takes checkpoints from `sock` (borrowed, in blocking mode) after its first pass.

    Args:
        layout: the RAM blocks as the first pass named them.
        last_block: the block of its last page: the next page may be `of the same block`.
        stop_limit: seconds the guest may stand still for one checkpoint before it is given up.
    """

    def __init__(
        self, sock: socket.socket, layout: RamLayout, last_block: str | None, stop_limit: float
    ) -> None:
        self._socket = sock
        self._layout = layout
        self._last_block = last_block
        self._stop_limit = stop_limit
        set_receive_timeout(sock, stop_limit)

    @property
    def layout(self) -> RamLayout:
        return self._layout

    @property
    def last_block(self) -> str | None:
        """The block of the newest page."""
        return self._last_block

    def take(self, buffer: Buffer, on_boundary: OnBoundary | None = None, *, resume: bool = True) -> Captured:
        """Answer the REQUEST that was read, take the checkpoint and let the guest go.

        Args:
            buffer: filled from its start; borrowed.
            on_boundary: called while the guest stands still at the end of the epoch; what it returns is
                called when the checkpoint is whole, before the guest is let go.
            resume: False leaves the guest standing; `release` lets it go.

        Raises:
            CheckpointTooLarge: it does not fit the buffer.
            CheckpointTimeout: QEMU did not finish within the stop limit.
            EngineFailed: QEMU closed the connection.
            StreamError, ColoError: QEMU said what it should not.
        """
        view, limit = buffer.view, buffer.capacity
        scanner = Scanner.for_checkpoint(self._layout, self._last_block, report_runs=False)
        started = time.perf_counter()
        deadline = started + self._stop_limit
        self._say(Message.CHECKPOINT_REPLY)

        have = self._fill(view, 0, colo.MESSAGE_SIZE, deadline, exact=True)
        colo.expect(view[: colo.MESSAGE_SIZE], Message.VMSTATE_SEND)
        boundary_us = time.time_ns() // 1000
        finish = on_boundary() if on_boundary is not None else None

        # The message's bytes are overwritten: a checkpoint starts at the start of its buffer.
        have = position = 0
        while not scanner.done:
            have = self._fill(view, have, limit, deadline)
            position = scanner.scan(view, position, have)
        ram = position

        while have < ram + colo.SIZE_MESSAGE_SIZE:
            have = self._fill(view, have, limit, deadline)
        device = colo.device_state_size(view[ram : ram + colo.SIZE_MESSAGE_SIZE])
        end = ram + colo.SIZE_MESSAGE_SIZE + device
        if end > limit:
            raise CheckpointTooLarge(limit)
        while have < end:
            have = self._fill(view, have, limit, deadline)
        if finish is not None:
            finish()
        released_us = time.time_ns() // 1000
        if resume:
            self.release()
        seconds = time.perf_counter() - started

        if have > end:
            raise EngineFailed("incremental", "QEMU sent more than the checkpoint it announced")
        # The announcement goes out of the way, so that RAM and device state are one piece.
        view[ram : ram + device] = view[ram + colo.SIZE_MESSAGE_SIZE : end]
        self._last_block = scanner.last_block
        return Captured(buffer, ram, device, scanner.pages + scanner.fills, boundary_us, seconds, released_us)

    def release(self) -> None:
        """Let the guest go on after its checkpoint."""
        self._say(Message.VMSTATE_RECEIVED, Message.VMSTATE_LOADED)

    def _say(self, *messages: Message) -> None:
        try:
            self._socket.send(colo.encode(*messages))
        except OSError:
            raise EngineFailed("incremental", "QEMU closed the migration before our answer") from None

    def _fill(self, view: memoryview, have: int, limit: int, deadline: float, *, exact: bool = False) -> int:
        """Read once (or, `exact`, until `limit`) into `view[have:limit]`; returns the new fill."""
        while True:
            if have >= limit:
                raise CheckpointTooLarge(limit)
            try:
                count = self._socket.recv_into(view[have:limit])
            except (BlockingIOError, TimeoutError):
                count = -1
            except OSError:  # reset: it went before it had read what we said
                count = 0
            if count == 0:
                raise EngineFailed("incremental", "QEMU closed the migration in the middle of a checkpoint")
            if count < 0 or time.perf_counter() > deadline:
                raise CheckpointTimeout(self._stop_limit, "the checkpoint's data from QEMU")
            have += count
            if not exact or have >= limit:
                return have
