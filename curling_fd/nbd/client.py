"""The client's side of NBD: the negotiation, and replies held against the requests they answer. No I/O.

A server that answers what was not asked, twice, or not whole, is refused with NbdError: a reply that is
believed is one that was checked.
"""

from __future__ import annotations

from typing import TypeAlias

from attrs import define, field, frozen

from curling_fd.errors import NbdError
from curling_fd.nbd import protocol as p
from curling_fd.nbd.protocol import (
    ALLOCATION,
    BlockSizes,
    ChunkKind,
    Command,
    Cursor,
    Extent,
    Flag,
    Handshake,
    Info,
    Option,
    Rep,
    Request,
    Steps,
)

#: Replies to one option.
_MOST_REPLIES = 1024

#: Holes that the chunks of a READ may leave between them until it is whole.
_MOST_GAPS = 1024

#: Bytes of one BLOCK_STATUS chunk; QEMU sends at most half of it.
_LONGEST_STATUS = 2 << 20


@frozen
class Remote:
    """An export as its server described it.

    Attributes:
        size: bytes.
        structured: replies to reads are structured.
        allocation: the id of the context `base:allocation`; None when there is no block status.
    """

    size: int
    flags: Flag
    blocks: BlockSizes = field(factory=BlockSizes)
    structured: bool = False
    allocation: int | None = None


def negotiate(name: str, *, allocation: bool = True) -> Steps[Remote]:
    """Choose the export `name`.

    Args:
        allocation: ask for block status, if the server has it.

    Raises:
        NbdError: the server broke the rules, or does not give the export; `problem` has its words.
    """
    magic, options, flags = p.GREETING.unpack((yield p.GREETING.size))
    if magic != p.NBD_MAGIC or options != p.OPTION_MAGIC:
        raise NbdError("the server does not begin like one of NBD's newstyle")
    if not flags & Handshake.FIXED_NEWSTYLE:
        raise NbdError("the server cannot do the fixed newstyle negotiation")
    yield p.CLIENT_FLAGS.pack(flags & (Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES))

    structured = not (yield from _ask(Option.STRUCTURED_REPLY)).refused
    context = None
    if structured and allocation:
        query = p.prefixed(name) + p.UINT32.pack(1) + p.prefixed(ALLOCATION)
        context = _context((yield from _ask(Option.SET_META_CONTEXT, query)))
    choice = p.prefixed(name) + p.UINT16.pack(1) + p.UINT16.pack(Info.BLOCK_SIZE)
    answer = yield from _ask(Option.GO, choice)
    if answer.refused:
        yield p.option(Option.ABORT)
        raise NbdError(f"the server does not give the export {name!r}: {answer.words}")
    return _described(answer, structured, context)


@define
class _Answer:
    """All replies to an option: what it told, and with what it ended."""

    told: list[tuple[int, bytes]]
    final: int = Rep.ACK
    words: str = ""

    @property
    def refused(self) -> bool:
        return self.final != Rep.ACK


def _ask(option: Option, data: bytes = b"") -> Steps[_Answer]:
    yield p.option(option, data)
    answer = _Answer([])
    while len(answer.told) < _MOST_REPLIES:
        magic, kind, reply, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC or kind != option:
            raise NbdError(f"what should answer {option.name} does not")
        if length > p.LONGEST_MESSAGE:
            raise NbdError(f"an answer of {length} bytes to {option.name}")
        payload = (yield length) if length else b""
        if reply == Rep.ACK:
            return answer
        if reply & p.REP_ERROR:
            answer.final = reply
            name = Rep(reply).name if reply in Rep.__members__.values() else f"error {reply:#x}"
            answer.words = payload[: p.LONGEST_STRING].decode(errors="replace") or name
            return answer
        answer.told.append((reply, payload))
    raise NbdError(f"no end of answers to {option.name}")


def _context(answer: _Answer) -> int | None:
    for reply, payload in answer.told:
        cursor = Cursor(payload)
        if reply == Rep.META_CONTEXT and not answer.refused:
            number = cursor.number()
            if cursor.rest() == ALLOCATION.encode():
                return number
    return None


def _described(answer: _Answer, structured: bool, context: int | None) -> Remote:
    size = flags = None
    blocks = BlockSizes()
    for reply, payload in answer.told:
        cursor = Cursor(payload)
        kind = cursor.number(p.UINT16) if reply == Rep.INFO else None
        if kind == Info.EXPORT:
            _, size, flags = Cursor(payload).numbers(p.INFO_EXPORT)
        elif kind == Info.BLOCK_SIZE:
            _, minimum, preferred, maximum = Cursor(payload).numbers(p.INFO_BLOCK_SIZE)
            blocks = BlockSizes(minimum, preferred, min(maximum, p.LARGEST_BLOCK))
            if not 0 < minimum <= min(1 << 16, maximum) or minimum & (minimum - 1):
                raise NbdError(f"block sizes of {minimum} to {maximum} bytes")
    if size is None or flags is None:
        raise NbdError("the server gives the export and does not say how large it is")
    return Remote(size, Flag(flags), blocks, structured, context)


@frozen
class Data:
    """`length` bytes of the request's data stand next in the stream, from the disk's `offset`.

    Whoever gets this reads them before anything else is read.
    """

    cookie: int
    offset: int
    length: int


@frozen
class Zeroes:
    """`length` bytes from the disk's `offset` on are zeroes."""

    cookie: int
    offset: int
    length: int


@frozen
class Status:
    """What is known of the disk from the request's offset on; not more than it asked for."""

    cookie: int
    extents: tuple[Extent, ...]


@frozen
class Finished:
    """The request is answered. `error` is an errno of this host, 0 for none; `words` are the server's."""

    cookie: int
    error: int
    words: str = ""


Event: TypeAlias = Data | Zeroes | Status | Finished


@define
class _Pending:
    request: Request
    gaps: list[tuple[int, int]]
    error: int = 0
    words: str = ""
    told: bool = False


class Replies:
    """Reads replies, in whatever order they come.

    replies.expect(request)       # when it is sent
    event = run(replies.read())   # until Finished
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._pending: dict[int, _Pending] = {}
        self._finished: Finished | None = None

    def expect(self, request: Request) -> None:
        """`request` is on its way. Its cookie must be that of no other that is."""
        if request.cookie in self._pending:
            raise ValueError(f"two requests with the cookie {request.cookie}")
        gaps = [(request.offset, request.offset + request.length)] if request.length else []
        self._pending[request.cookie] = _Pending(request, gaps if request.kind == Command.READ else [])

    def read(self) -> Steps[Event]:
        """The next thing the server says.

        Raises:
            NbdError: it is not an answer to what was asked.
        """
        while True:
            if self._finished is not None:
                event, self._finished = self._finished, None
                return event
            magic = yield p.UINT32.size
            if magic == _SIMPLE:
                found = self._simple((yield p.SIMPLE_REPLY.size - p.UINT32.size))
            elif magic == _STRUCTURED and self._remote.structured:
                found = yield from self._chunk((yield p.CHUNK.size - p.UINT32.size))
            else:
                raise NbdError(f"what should be a reply begins with 0x{magic.hex()}")
            if found is not None:
                return found

    def _of(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise NbdError(f"an answer to request {cookie}, which was not sent")
        return pending

    def _simple(self, rest: bytes) -> Event | None:
        _, error, cookie = p.SIMPLE_REPLY.unpack(_SIMPLE + rest)
        pending = self._of(cookie)
        request = pending.request
        if request.kind == Command.BLOCK_STATUS or (request.kind == Command.READ and self._remote.structured):
            raise NbdError("a simple reply where a structured one is due")
        if pending.gaps and not error:
            pending.gaps = []
            self._finish(pending)
            return Data(cookie, request.offset, request.length)
        if error:
            pending.error = p.host_errno(error)
        self._finish(pending)
        return None

    def _finish(self, pending: _Pending) -> None:
        request = pending.request
        if not pending.error:
            if pending.gaps:
                raise NbdError("a read that ends before all of it is there")
            if request.kind == Command.BLOCK_STATUS and not pending.told:
                raise NbdError("block status without an extent")
        del self._pending[request.cookie]
        self._finished = Finished(request.cookie, pending.error, pending.words)

    def _chunk(self, rest: bytes) -> Steps[Event | None]:
        _, flags, kind, cookie, length = p.CHUNK.unpack(_STRUCTURED + rest)
        pending = self._of(cookie)
        event: Event | None = None
        if kind & p.CHUNK_ERROR:
            if length > p.LONGEST_MESSAGE:
                raise NbdError(f"an error of {length} bytes")
            self._error(pending, Cursor((yield length) if length else b""))
        elif kind == ChunkKind.NONE and not length and flags & p.CHUNK_DONE:
            pass
        elif kind == ChunkKind.OFFSET_DATA and length > p.OFFSET.size:
            (offset,) = p.OFFSET.unpack((yield p.OFFSET.size))
            event = Data(cookie, offset, length - p.OFFSET.size)
            self._fill(pending, offset, event.length)
        elif kind == ChunkKind.OFFSET_HOLE and length == p.HOLE.size:
            offset, size = p.HOLE.unpack((yield p.HOLE.size))
            event = Zeroes(cookie, offset, size)
            self._fill(pending, offset, size)
        elif kind == ChunkKind.BLOCK_STATUS and p.UINT32.size < length <= _LONGEST_STATUS:
            event = self._status(pending, (yield length))
        else:
            raise NbdError(f"a chunk of kind {kind} with {length} bytes")
        if flags & p.CHUNK_DONE:
            self._finish(pending)
        return event

    def _error(self, pending: _Pending, cursor: Cursor) -> None:
        error, length = cursor.numbers(p.ERROR)
        words = cursor.take(length)[: p.LONGEST_STRING].decode(errors="replace")
        if not error:
            raise NbdError("an error that is none")
        if not pending.error:
            pending.error, pending.words = p.host_errno(error), words

    def _fill(self, pending: _Pending, offset: int, length: int) -> None:
        """Take note of data: it must be some that was asked for, and has not come yet."""
        end = offset + length
        for index, (start, stop) in enumerate(pending.gaps):
            if start <= offset < end <= stop:
                pieces = ((start, offset), (end, stop))
                pending.gaps[index : index + 1] = [piece for piece in pieces if piece[0] < piece[1]]
                if len(pending.gaps) > _MOST_GAPS:
                    raise NbdError("a read in too many pieces")
                return
        raise NbdError(f"{length} bytes of data at {offset}, which were not asked for, or came twice")

    def _status(self, pending: _Pending, payload: bytes) -> Status:
        request = pending.request
        if request.kind != Command.BLOCK_STATUS or pending.told:
            raise NbdError("block status that was not asked for")
        cursor = Cursor(payload)
        if cursor.number() != self._remote.allocation or (len(payload) - p.UINT32.size) % p.EXTENT.size:
            raise NbdError("block status of a context that was not asked for")
        pending.told = True
        left = request.length
        extents = []
        for length, state in p.EXTENT.iter_unpack(cursor.rest()):
            if not length:
                raise NbdError("block status with an extent of nothing")
            if left:
                # The last one may reach further than was asked.
                taken = min(length, left)
                left -= taken
                extents.append(Extent(taken, bool(state & p.STATE_HOLE), bool(state & p.STATE_ZERO)))
        return Status(request.cookie, tuple(extents))


_SIMPLE = p.UINT32.pack(p.SIMPLE_REPLY_MAGIC)
_STRUCTURED = p.UINT32.pack(p.STRUCTURED_REPLY_MAGIC)
