"""A QMP connection on Trio, able to hand file descriptors to QEMU.

`open_qmp` connects, greets and negotiates (out-of-band execution where QEMU offers it) and keeps a
reader running until the block is left. Any number of tasks may `execute` at once. Events go to every
open `EventStream`; a stream queues what its reader has not taken yet, so that a slow reader delays
nobody and misses nothing that came after it subscribed.
"""

from __future__ import annotations

import array
import itertools
import math
import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import trio
from attrs import frozen

from curling_fd.errors import (
    QmpBusy,
    QmpCommandFailed,
    QmpDisconnected,
    QmpNotQmp,
    QmpTimeout,
    QmpUnreachable,
)
from curling_fd.qmp.protocol import (
    Decoder,
    Error,
    Event,
    Greeting,
    QmpProtocolError,
    Return,
    encode_command,
)
from curling_fd.system.nursery import open_nursery

#: A monitor that is free greets at once; one that another client holds never does.
GREETING_TIMEOUT = 2.0

#: QEMU answers the commands we use within milliseconds; its main loop can be busy for longer.
COMMAND_TIMEOUT = 20.0


@frozen
class MonitorLeft:
    """An open monitor between two processes that use it in turn.

    Attributes:
        next_id: first id of a command that was not used yet.
        unread: the beginning of a message that had not come whole.
    """

    greeting: Greeting
    pid: int
    next_id: int
    unread: bytes


EventStream: TypeAlias = trio.MemoryReceiveChannel[Event]


class QmpClient:
    """One open monitor. Made by `open_qmp`.

    Attributes:
        greeting: what QEMU said of itself.
        pid: the process that listens on the socket: QEMU, unless something else opened it for QEMU.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        greeting: Greeting,
        pid: int,
        decoder: Decoder | None = None,
        first_id: int = 1,
    ) -> None:
        self.greeting = greeting
        self.pid = pid
        self._socket = sock
        self._decoder = decoder or Decoder()
        self._out_of_band = "oob" in greeting.capabilities
        self._ids = itertools.count(first_id)
        self._waiting: dict[int, trio.MemorySendChannel[Return | Error]] = {}
        self._listeners: set[trio.MemorySendChannel[Event]] = set()
        self._send_lock = trio.Lock()
        self._closed = False
        self._reading = trio.Lock()  # held while the connection is waited for
        self._turn = trio.CancelScope()
        self._wanted = 0  # how many wait for it
        self._read_ahead = b""  # by a thread, and not looked at
        self.is_unread = False
        self.disconnected = trio.Event()

    def fileno(self) -> int:
        """The connection's fd, borrowed: it stays this object's."""
        return self._socket.fileno()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        out_of_band: bool = False,
        timeout: float = COMMAND_TIMEOUT,
    ) -> Any:
        """Run `command` and return what QEMU returns.

        Args:
            fds: sent along with SCM_RIGHTS; borrowed, QEMU gets duplicates.
            out_of_band: run it past the queue if QEMU can; else in order.
            timeout: seconds.

        Raises:
            QmpCommandFailed: QEMU refused.
            QmpDisconnected: QEMU went away before it answered.
            QmpTimeout: no answer. The command may still be carried out.
        """
        return (
            await self._execute([(command, arguments)], fds=fds, out_of_band=out_of_band, timeout=timeout)
        )[0]

    async def execute_all(
        self, commands: Sequence[tuple[str, Mapping[str, Any] | None]], *, timeout: float = COMMAND_TIMEOUT
    ) -> list[Any]:
        """Have QEMU run `commands` in that order, without waiting for one's answer before the next is sent.

        Raises:
            QmpError: as `execute`, for the first that failed; those after it were run all the same.
        """
        return await self._execute(commands, timeout=timeout)

    async def _execute(
        self,
        commands: Sequence[tuple[str, Mapping[str, Any] | None]],
        *,
        fds: Sequence[int] = (),
        out_of_band: bool = False,
        timeout: float,
    ) -> list[Any]:
        first = commands[0][0]
        if self._closed:
            raise QmpDisconnected(first)
        out_of_band = out_of_band and self._out_of_band
        data, waiting = b"", []
        try:
            for command, arguments in commands:
                id = next(self._ids)
                send, receive = trio.open_memory_channel[Return | Error](1)
                self._waiting[id] = send
                waiting.append((id, command, receive))
                data += encode_command(command, arguments, id, out_of_band=out_of_band)
            with trio.move_on_after(timeout):
                await self._send(first, data, fds)
                return [await _value(command, receive) for _, command, receive in waiting]
            raise QmpTimeout(first, timeout)
        finally:
            for id, _, _ in waiting:
                self._waiting.pop(id, None)

    async def hand_over(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of `fd` (borrowed) under `name`, for `fd:NAME` addresses."""
        await self.execute("getfd", {"fdname": name}, fds=[fd])

    async def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `colo`, `postmigrate`, ..."""
        return str((await self.execute("query-status"))["status"])

    @contextmanager
    def events(self) -> Iterator[EventStream]:
        """A stream of every event from now on. It ends when QEMU goes away."""
        send, receive = trio.open_memory_channel[Event](math.inf)
        self._listeners.add(send)
        if self._closed:
            send.close()
        try:
            yield receive
        finally:
            self._listeners.discard(send)
            send.close()

    @asynccontextmanager
    async def unread(self) -> AsyncIterator[None]:
        """Inside the block what QEMU says stays unread, and is read afterwards.

        A command that is executed inside gets its answer after the block, unless by `send_unread`.
        """
        await self._stop_reading()
        self.is_unread = True
        try:
            yield
        finally:
            self.is_unread = False
            self._reading.release()

    def send_unread(self, commands: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Callable[[], None]:
        """`execute_all` from a thread, inside of `unread`, without the event loop: for where the guest waits.

        Returns:
            What waits for the answers, and raises as `execute_all` does. To be called in the block, once.

        Raises:
            QmpDisconnected: QEMU went away.
        """
        first = commands[0][0]
        waiting = {next(self._ids): command for command, _ in commands}
        data = b"".join(encode_command(*command, id) for id, command in zip(waiting, commands, strict=True))
        try:
            with self._duplicate() as sock:
                sock.sendall(data)  # there is room: nothing else is on its way
        except OSError:
            raise QmpDisconnected(first) from None

        def answered() -> None:
            decoder = Decoder()
            decoder.feed(self._decoder.rest)
            until = time.monotonic() + COMMAND_TIMEOUT
            refused: QmpCommandFailed | None = None
            try:
                with self._duplicate() as sock:
                    while waiting:
                        if not _readable(sock, until):
                            raise QmpTimeout(first, COMMAND_TIMEOUT)
                        got = sock.recv(65536)
                        if not got:
                            raise QmpDisconnected(first)
                        self._read_ahead += got
                        for message in decoder.feed(got):
                            command = waiting.pop(_id(message), None)
                            if command is not None and isinstance(message, Error):
                                refused = QmpCommandFailed(command, message.kind, message.description)
            except (OSError, QmpProtocolError):
                raise QmpDisconnected(first) from None
            if refused is not None:
                raise refused

        return answered

    def _duplicate(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._socket.fileno()))

    async def leave(self) -> MonitorLeft:
        """Read and execute nothing more: whoever has a duplicate of the connection can go on with it."""
        await self._stop_reading()
        self._closed = True
        self._read_ahead, data = b"", self._read_ahead
        for message in self._decoder.feed(data):
            self._route(message)
        return MonitorLeft(self.greeting, self.pid, next(self._ids), self._decoder.rest)

    def replay(self, events: Sequence[Event]) -> None:
        """Tell every open stream `events` that happened before."""
        for event in events:
            self._route(event)

    async def _stop_reading(self) -> None:
        self._wanted += 1
        self._turn.cancel()
        try:
            await self._reading.acquire()
        finally:
            self._wanted -= 1

    async def _receive(self) -> bytes:
        while True:
            async with self._reading:
                with trio.CancelScope() as self._turn:
                    if self._wanted:  # since before this turn began
                        self._turn.cancel()
                    if self._read_ahead:
                        await trio.lowlevel.checkpoint()
                        data, self._read_ahead = self._read_ahead, b""
                        return data
                    return await self._socket.recv(65536)

    async def _send(self, command: str, data: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            async with self._send_lock:
                sent = await self._socket.sendmsg([data], ancillary)
                try:
                    while sent < len(data):
                        sent += await self._socket.send(data[sent:])
                except trio.Cancelled:
                    # QEMU would take the next command for the rest of this one.
                    self._socket.shutdown(socket.SHUT_RDWR)
                    raise
        except OSError:
            raise QmpDisconnected(command) from None

    async def _read(self) -> None:
        """Route what arrives until QEMU closes; then fail every waiter and end every stream."""
        try:
            while data := await self._receive():
                for message in self._decoder.feed(data):
                    self._route(message)
        except (OSError, QmpProtocolError):
            pass  # a monitor that breaks off or talks nonsense is gone either way
        finally:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self.disconnected.set()
        for waiter in self._waiting.values():
            waiter.close()
        for listener in self._listeners:
            listener.close()

    def _route(self, message: object) -> None:
        if isinstance(message, Event):
            for listener in self._listeners:
                listener.send_nowait(message)
        elif isinstance(message, Return | Error):
            waiter = self._waiting.pop(message.id, None) if isinstance(message.id, int) else None
            if waiter is not None:  # else its caller gave up, or a guard wrote the command
                waiter.send_nowait(message)


def _id(message: object) -> int:
    """Of a command's answer; no command has -1."""
    found = message.id if isinstance(message, Return | Error) else None
    return found if isinstance(found, int) else -1


def _readable(sock: socket.socket, until: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))


async def _value(command: str, answer: trio.MemoryReceiveChannel[Return | Error]) -> Any:
    try:
        said = await answer.receive()
    except trio.EndOfChannel:
        raise QmpDisconnected(command) from None
    if isinstance(said, Error):
        raise QmpCommandFailed(command, said.kind, said.description)
    return said.value


@asynccontextmanager
async def open_qmp(
    path: str | os.PathLike[str], *, patience: float = GREETING_TIMEOUT
) -> AsyncIterator[QmpClient]:
    """Connect to the monitor at the UNIX socket `path`.

    Args:
        patience: seconds until it must have greeted us. A QEMU that is just being started listens long before
            it answers: when its devices are there.

    Raises:
        QmpUnreachable: nothing listens there, or we may not connect.
        QmpBusy: another client holds the monitor.
        QmpNotQmp: something else answers.
        QmpDisconnected: QEMU went away during negotiation.
    """
    path = os.fspath(path)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            with trio.fail_after(patience):
                await sock.connect(path)
        except OSError as error:
            raise QmpUnreachable(path, error.strerror or str(error)) from None
        except trio.TooSlowError:
            raise QmpBusy(path) from None
        _check_connected(sock, path)
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        decoder = Decoder()
        client = QmpClient(sock, await _greeting(sock, path, decoder, patience), pid, decoder)
        async with _reading(client):
            oob = {"enable": ["oob"]} if client._out_of_band else None
            await client.execute("qmp_capabilities", oob)
            yield client
    finally:
        sock.close()


@asynccontextmanager
async def inherit_qmp(fd: int, left: MonitorLeft) -> AsyncIterator[QmpClient]:
    """Go on with the connection `fd` (owned from here on), which another process has `left`."""
    sock = trio.socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_STREAM)
    os.close(fd)
    try:
        decoder = Decoder()
        decoder.feed(left.unread)
        client = QmpClient(sock, left.greeting, left.pid, decoder, left.next_id)
        async with _reading(client):
            yield client
    finally:
        sock.close()


@asynccontextmanager
async def _reading(client: QmpClient) -> AsyncIterator[None]:
    async with open_nursery() as nursery:
        nursery.start_soon(client._read)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            client._close()


def _check_connected(sock: trio.socket.SocketType, path: str) -> None:
    """Trio's connect returns for a UNIX socket whose backlog is full as if it were connected."""
    try:
        sock.getpeername()
    except OSError:
        raise QmpBusy(path) from None


async def _greeting(sock: trio.socket.SocketType, path: str, decoder: Decoder, patience: float) -> Greeting:
    with trio.move_on_after(patience):
        while True:
            try:
                data = await sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise QmpDisconnected(None)
            try:
                messages = decoder.feed(data)
            except QmpProtocolError as error:
                raise QmpNotQmp(path, error.got) from None
            for message in messages:
                if isinstance(message, Greeting):
                    return message
                # Until it greets, QEMU treats us as the client before us, and may tell us an event.
                if not isinstance(message, Event):
                    raise QmpNotQmp(path, repr(message)[:80])
    raise QmpBusy(path)
