"""A Varlink client on Trio, for curlingctl and the tests.

    async with await Client.connect("/run/curling/control.sock") as client:
        vms = (await client.call("List"))["vms"]
        async for reply in await client.call_more("Watch", {"interval_ms": 500}):
            ...

An error reply is raised as the exception the daemon raised, or as `ErrorReply`.
"""

from __future__ import annotations

import contextlib
import grp
import os
from collections.abc import Mapping
from typing import Any, Self

import trio

from curling_fd.errors import DaemonUnreachable, NotPermitted, VarlinkError
from curling_fd.varlink import protocol
from curling_fd.varlink.failures import CONTROL, error_from
from curling_fd.varlink.protocol import Call, Reply

_RECEIVE_SIZE = 65536


class Client:
    """One connection. One call at a time; leaving a `call_more` before its end leaves only closing."""

    def __init__(self, stream: trio.SocketStream, path: str, interface: str = CONTROL) -> None:
        """Take ownership of `stream`; `path` is named in errors."""
        self._stream = stream
        self._path = path
        self._interface = interface
        self._reader = protocol.MessageReader()
        self._busy = False

    @classmethod
    async def connect(cls, path: str, interface: str = CONTROL) -> Self:
        """Connect to the service at the UNIX socket `path`.

        Raises:
            DaemonUnreachable: nobody listens there.
            NotPermitted: the socket's permissions keep us out.
        """
        try:
            stream = await trio.open_unix_socket(path)
        except PermissionError:
            raise NotPermitted("connect", _group_of(path), os.getuid()) from None
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            raise DaemonUnreachable(path, problem) from None
        return cls(stream, path, interface)

    async def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call `method` and return the parameters of its one reply.

        Args:
            method: its own name, or with an interface in front.
            parameters: of the call.

        Raises:
            CurlingError: what the service answered.
            DaemonUnreachable: it went away first.
            VarlinkError: it does not speak Varlink.
        """
        await self._send(method, parameters, more=False)
        reply = await self._receive()
        if reply.continues:
            raise VarlinkError("a reply that continues where one was asked for")
        return dict(reply.parameters)

    async def call_more(self, method: str, parameters: Mapping[str, Any] | None = None) -> Replies:
        """Call `method` with `more` and return an iterator over the parameters of its replies."""
        await self._send(method, parameters, more=True)
        return Replies(self)

    async def aclose(self) -> None:
        """Close the connection; the service then cancels a `more` call that is under way."""
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.aclose()

    async def _send(self, method: str, parameters: Mapping[str, Any] | None, more: bool) -> None:
        if self._busy:
            raise RuntimeError("the connection still waits for the last reply of an earlier call")
        self._busy = True
        name = method if "." in method else f"{self._interface}.{method}"
        # A service that closed on us may have said why: an error shows when its answer is read.
        with contextlib.suppress(trio.BrokenResourceError):
            await self._stream.send_all(protocol.encode_call(Call(name, parameters or {}, more=more)))

    async def _receive(self) -> Reply:
        # May be cancelled at any await without losing a byte.
        while (message := self._reader.next_message()) is None:
            try:
                data = await self._stream.receive_some(_RECEIVE_SIZE)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise DaemonUnreachable(self._path, "it closed the connection before it had answered")
            self._reader.feed(data)
        reply = protocol.parse_reply(message)
        self._busy = reply.continues
        if reply.error is not None:
            raise error_from(reply)
        return reply


class Replies:
    """The replies of one call with `more`, as an asynchronous iterator that ends after the last one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """Wait for the next reply. May be cancelled and called again.

        Raises: as `Client.call`.
        """
        if self._ended:
            raise StopAsyncIteration
        reply = await self._client._receive()
        self._ended = not reply.continues
        return dict(reply.parameters)


def _group_of(path: str) -> str:
    try:
        return grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        return "curling"
