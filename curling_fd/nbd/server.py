"""The server's side of NBD: the negotiation, requests and their checks, replies. No I/O.

    server                               client
    greeting                       ->
                                   <-    client flags
                                   <-    option       any number of times
    replies                        ->
                                   <-    GO or EXPORT_NAME
    replies                        ->
                                   <-    requests

There is one connection to an export and one client; nothing is encrypted, so the socket must be one that
only the client can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from attrs import evolve, field, frozen

from curling_fd.errors import NbdError
from curling_fd.nbd import protocol as p
from curling_fd.nbd.protocol import (
    ALLOCATION,
    BlockSizes,
    ChunkKind,
    Command,
    CommandFlag,
    Cursor,
    Errno,
    Extent,
    Flag,
    Handshake,
    Info,
    Option,
    Rep,
    Request,
    Steps,
)

#: Options of one negotiation; QEMU and libnbd need fewer than ten.
_MOST_OPTIONS = 64

_ALLOCATION_ID = 1

_FORBIDDEN: dict[int, int] = {
    kind: 0xFFFF & ~int(allowed | CommandFlag.FUA)
    for kind, allowed in {
        Command.READ: CommandFlag.DF,
        Command.WRITE: CommandFlag(0),
        Command.FLUSH: CommandFlag(0),
        Command.TRIM: CommandFlag(0),
        Command.WRITE_ZEROES: CommandFlag.NO_HOLE,
        Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
    }.items()
}
"""Flags that a request must not have; plain numbers, for every write is asked. FUA may be with any."""

_CHANGES = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})


@frozen
class Export:
    """A disk as its server shows it.

    Attributes:
        name: by which a client asks for it.
        size: bytes.
        blocks: the sizes of requests; every request is held to the minimum and the maximum.
        read_only: writes are refused.
        allocation: block status can be asked for.
    """

    name: str
    size: int
    blocks: BlockSizes = field(factory=BlockSizes)
    read_only: bool = False
    allocation: bool = False


@frozen
class Session:
    """What was negotiated: with the export, all there is to know about a connection between two requests.

    Attributes:
        export: the name of the export.
        structured: replies to reads and errors are structured.
        allocation: the client may ask for block status.
    """

    export: str
    structured: bool = False
    allocation: bool = False


def transmission_flags(export: Export, session: Session) -> Flag:
    """What the server says that `export` can do. Never CAN_MULTI_CONN: writes are logged in one order."""
    flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA
    flags |= Flag.READ_ONLY if export.read_only else Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES
    if session.structured:
        flags |= Flag.SEND_DF
    return flags


def negotiate(exports: Sequence[Export]) -> Steps[Session | None]:
    """Talk to a client until it has chosen one of `exports`; None when it went away in peace.

    Raises:
        NbdError: the client broke the rules, or asked for an export that is not there in the one way that
            leaves no other answer.
    """
    flags = int(Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES)
    yield p.GREETING.pack(p.NBD_MAGIC, p.OPTION_MAGIC, flags)
    (answer,) = p.CLIENT_FLAGS.unpack((yield p.CLIENT_FLAGS.size))
    if answer & ~flags:
        raise NbdError(f"client flags {answer:#x}, of which some were not offered")
    negotiation = _Negotiation(exports)
    for _ in range(_MOST_OPTIONS):
        magic, kind, length = p.OPTION.unpack((yield p.OPTION.size))
        if magic != p.OPTION_MAGIC:
            raise NbdError("what should be an option does not begin like one")
        if length > p.LONGEST_MESSAGE:
            raise NbdError(f"an option of {length} bytes")
        data = (yield length) if length else b""
        if kind == Option.EXPORT_NAME:
            session, reply = negotiation.export_name(data, zeroes=not answer & Handshake.NO_ZEROES)
            yield reply
            return session
        reply = negotiation.reply(kind, data)
        if kind == Option.ABORT:
            with suppress(NbdError):  # the client need not wait for it
                yield reply
            return None
        yield reply
        if negotiation.chosen is not None:
            return negotiation.chosen
    raise NbdError(f"{_MOST_OPTIONS} options, and no export chosen")


class _Refusal(Exception):
    """An option is answered with an error, and the negotiation goes on."""

    def __init__(self, reply: Rep, why: str) -> None:
        super().__init__(reply, why)
        self.reply = reply
        self.why = why


class _Negotiation:
    """What the options of one client have come to."""

    def __init__(self, exports: Sequence[Export]) -> None:
        self._exports = {export.name: export for export in exports}
        self._structured = False
        self._context_of: str | None = None
        self.chosen: Session | None = None

    def export_name(self, data: bytes, *, zeroes: bool) -> tuple[Session, bytes]:
        """The end of a negotiation by EXPORT_NAME."""
        export = self._exports.get(p.text(data))
        if export is None:
            raise NbdError(f"it asks for the export {p.text(data)!r}, which is not there")
        session = self._session(export)
        reply = p.EXPORT_NAME_REPLY.pack(export.size, transmission_flags(export, session))
        return session, reply + (bytes(124) if zeroes else b"")

    def reply(self, kind: int, data: bytes) -> bytes:
        """All replies to an option."""
        try:
            match kind:
                case Option.ABORT:
                    replies = []
                case Option.LIST:
                    self._no_data(data)
                    replies = [(Rep.SERVER, p.prefixed(name)) for name in self._exports]
                case Option.STRUCTURED_REPLY:
                    self._no_data(data)
                    self._structured = True
                    replies = []
                case Option.INFO | Option.GO:
                    replies = self._info(Cursor(data), go=kind == Option.GO)
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    replies = self._contexts(Cursor(data), select=kind == Option.SET_META_CONTEXT)
                case Option.STARTTLS:
                    raise _Refusal(Rep.ERR_POLICY, "this socket is not encrypted")
                case _:
                    raise _Refusal(Rep.ERR_UNSUP, "this option is not known")
        except _Refusal as refusal:
            return p.option_reply(kind, refusal.reply, refusal.why.encode())
        except NbdError as error:
            return p.option_reply(kind, Rep.ERR_INVALID, error.problem.encode())
        return b"".join(p.option_reply(kind, *reply) for reply in [*replies, (Rep.ACK, b"")])

    def _no_data(self, data: bytes) -> None:
        if data:
            raise NbdError("data with an option that has none")

    def _find(self, name: str) -> Export:
        export = self._exports.get(name)
        if export is None:
            raise _Refusal(Rep.ERR_UNKNOWN, f"there is no export {name!r}")
        return export

    def _session(self, export: Export) -> Session:
        selected = self._structured and self._context_of == export.name
        return Session(export.name, structured=self._structured, allocation=selected)

    def _info(self, cursor: Cursor, *, go: bool) -> list[tuple[Rep, bytes]]:
        name = cursor.text(cursor.number())
        wanted = {cursor.number(p.UINT16) for _ in range(cursor.number(p.UINT16))}
        cursor.end()
        export = self._find(name)
        blocks = export.blocks
        if go and blocks.minimum > 1 and Info.BLOCK_SIZE not in wanted:
            raise _Refusal(Rep.ERR_BLOCK_SIZE_REQD, f"requests must be multiples of {blocks.minimum} bytes")
        session = self._session(export)
        flags = transmission_flags(export, session)
        sizes = (blocks.minimum, blocks.preferred, blocks.maximum)
        replies = [
            (Rep.INFO, p.INFO_EXPORT.pack(Info.EXPORT, export.size, flags)),
            (Rep.INFO, p.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)),
        ]
        if Info.NAME in wanted:
            replies.append((Rep.INFO, p.UINT16.pack(Info.NAME) + name.encode()))
        if go:
            self.chosen = session
        return replies

    def _contexts(self, cursor: Cursor, *, select: bool) -> list[tuple[Rep, bytes]]:
        if not self._structured:
            raise NbdError("metadata contexts need structured replies first")
        name = cursor.text(cursor.number())
        queries = [cursor.text(cursor.number()) for _ in range(cursor.number())]
        cursor.end()
        if select:
            self._context_of = None
        export = self._find(name)
        if select:
            asked = ALLOCATION in queries
        else:
            asked = not queries or ALLOCATION in queries or "base:" in queries
        if not (asked and export.allocation):
            return []
        if select:
            self._context_of = name
        return [(Rep.META_CONTEXT, p.UINT32.pack(_ALLOCATION_ID if select else 0) + ALLOCATION.encode())]


def parse_request(header: bytes | bytearray | memoryview, at: int = 0) -> Request:
    """Read the request whose 28 bytes of header begin `at` bytes into `header`.

    Raises:
        NbdError: it does not begin like one. What follows cannot be read either.
    """
    magic, flags, kind, cookie, offset, length = p.REQUEST.unpack_from(header, at)
    if magic != p.REQUEST_MAGIC:
        raise NbdError(f"what should be a request begins with {magic:#010x}")
    return Request(kind, flags, cookie, offset, length)


def check_request(request: Request, export: Export, session: Session) -> Errno | None:
    """The error to answer `request` with; None when it can be done. DISC is for the caller.

    The data of a WRITE follows its header also when the answer is an error.

    Raises:
        NbdError: a WRITE with more data than was allowed: it is not read, so nothing after it can be.
    """
    kind, length = request.kind, request.length
    if kind == Command.WRITE and length > export.blocks.maximum:
        raise NbdError(f"a write of {length} bytes, where {export.blocks.maximum} are the most")
    if request.flags & _FORBIDDEN.get(kind, 0xFFFF) or kind not in _FORBIDDEN:
        return Errno.EINVAL
    if kind == Command.FLUSH:
        return None
    if export.read_only and kind in _CHANGES:
        return Errno.EPERM
    if request.offset + length > export.size:
        return Errno.ENOSPC if kind in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
    if export.blocks.minimum > 1 and (request.offset | length) % export.blocks.minimum:
        return Errno.EINVAL
    if kind == Command.READ and length > export.blocks.maximum:
        return Errno.EINVAL
    if kind == Command.READ and request.flags & CommandFlag.DF and not session.structured:
        return Errno.EINVAL
    if kind == Command.BLOCK_STATUS and not (session.allocation and length):
        return Errno.EINVAL
    return None


def done(cookie: int) -> bytes:
    """The reply to a request that was done and has no data: all but READ and BLOCK_STATUS."""
    return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie)


def failed(request: Request, session: Session, error: Errno, message: str = "") -> bytes:
    """The reply to a request that was not done. `message` reaches only a client with structured replies."""
    if not session.structured:
        return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, error, request.cookie)
    words = message.encode()[: p.LONGEST_STRING]
    return _chunk(request, ChunkKind.ERROR, p.ERROR.pack(error, len(words)) + words)


def data_head(request: Request, session: Session) -> bytes:
    """What stands before the data of a READ, which follows in one piece."""
    if not session.structured:
        return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, request.cookie)
    if not request.length:
        return _chunk(request, ChunkKind.NONE, b"")
    length = p.OFFSET.size + request.length
    head = (p.STRUCTURED_REPLY_MAGIC, p.CHUNK_DONE, ChunkKind.OFFSET_DATA, request.cookie, length)
    return p.CHUNK.pack(*head) + p.OFFSET.pack(request.offset)


def block_status(request: Request, extents: Sequence[Extent]) -> bytes:
    """The reply to BLOCK_STATUS: `extents`, from the request's offset on, cut to what it asks for.

    Raises:
        ValueError: there is no extent.
    """
    left = request.length
    parts = []
    for extent in extents:
        if not left:
            break
        part = evolve(extent, length=min(extent.length, left))
        left -= part.length
        parts.append(p.EXTENT.pack(part.length, part.state))
        if request.flags & CommandFlag.REQ_ONE:
            break
    if not parts:
        raise ValueError("block status without an extent")
    return _chunk(request, ChunkKind.BLOCK_STATUS, p.UINT32.pack(_ALLOCATION_ID) + b"".join(parts))


def _chunk(request: Request, kind: ChunkKind, payload: bytes) -> bytes:
    head = (p.STRUCTURED_REPLY_MAGIC, p.CHUNK_DONE, kind, request.cookie, len(payload))
    return p.CHUNK.pack(*head) + payload
