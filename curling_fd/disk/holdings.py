"""What a disk log holds: closed, left to another process, counted."""

from __future__ import annotations

from attrs import frozen

from curling_fd.system.buffers import Buffer


@frozen
class ClosedLog:
    """The log of an epoch that is over: `buffer.view[:length]`, until it is released.

    `buffer` is None when nothing was written.
    """

    buffer: Buffer | None
    length: int


@frozen
class DiskLogLeft:
    """A log between two processes that keep it in turn; its memfds go beside it.

    Attributes:
        sizes: of the disks, in bytes.
        basis: see `DiskLog`.
        logging: the epoch's log is the last memfd, and has `length` bytes.
    """

    sizes: tuple[int, ...]
    basis: str
    soft: int
    count: int
    logging: bool
    length: int


@frozen
class DiskLogStatistics:
    """What the log holds. Bytes; `limit` is what `allocated` can never exceed.

    Attributes:
        running: in the epoch's log.
        held: in closed logs that are not released.
        records: written since the start, by the guest and by who copies.
        logged: bytes of these with their headers.
        waited: seconds that replies to writes waited for a checkpoint.
    """

    logging: bool
    running: int
    held: int
    allocated: int
    limit: int
    records: int
    logged: int
    waited: float
