"""A QMP server for tests, on a UNIX socket: it notes what it is told and answers as the test says."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

Answer = Callable[["FakeQmp", dict[str, Any]], Awaitable[None]]

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": "Fake"},
        "capabilities": ["oob"],
    }
}


async def answer_at_once(server: FakeQmp, command: dict[str, Any]) -> None:
    """Every command is answered with its own name."""
    await server.returns(command, server.name_of(command))


class FakeQmp:
    """One monitor for one client.

    Attributes:
        commands: what came, oldest first.
        fds: descriptors that came along; closed with the server.
        answer: called with each command but `qmp_capabilities`.
    """

    def __init__(
        self, path: Path, answer: Answer = answer_at_once, *, greeting: bytes | dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.answer = answer
        self.commands: list[dict[str, Any]] = []
        self.fds: list[int] = []
        self._greeting = GREETING if greeting is None else greeting
        self._listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection: trio.socket.SocketType | None = None

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Serve one client until it goes; to be run with `nursery.start`."""
        try:
            await self._listener.bind(str(self.path))
            self._listener.listen(1)
            task_status.started()
            self._connection, _ = await self._listener.accept()
            if isinstance(self._greeting, bytes):
                await self._connection.send(self._greeting)
            else:
                await self.say(self._greeting)
            await self._take_commands(self._connection)
        except* (OSError, trio.ClosedResourceError):
            pass  # the client has gone, or the test hung up
        finally:
            self.hang_up()
            self._listener.close()
            for fd in self.fds:
                os.close(fd)

    async def say(self, message: dict[str, Any]) -> None:
        assert self._connection is not None
        data = json.dumps(message).encode() + b"\r\n"
        while data:
            data = data[await self._connection.send(data) :]

    async def say_raw(self, data: bytes) -> None:
        assert self._connection is not None
        await self._connection.send(data)

    async def returns(self, command: dict[str, Any], value: Any) -> None:
        await self.say({"return": value, "id": command["id"]})

    async def event(self, name: str, **data: Any) -> None:
        await self.say({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})

    def hang_up(self) -> None:
        """QEMU dies."""
        if self._connection is not None:
            self._connection.close()

    @staticmethod
    def name_of(command: dict[str, Any]) -> str:
        return str(command.get("execute") or command.get("exec-oob"))

    async def _take_commands(self, connection: trio.socket.SocketType) -> None:
        buffer = b""
        async with trio.open_nursery() as nursery:
            while True:
                data, ancillary, _, _ = await connection.recvmsg(65536, socket.CMSG_SPACE(64))
                for _, kind, content in ancillary:
                    assert kind == socket.SCM_RIGHTS
                    self.fds += memoryview(content).cast("i")
                if not data:
                    return
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    command = json.loads(line)
                    self.commands.append(command)
                    if self.name_of(command) == "qmp_capabilities":
                        await self.returns(command, {})
                    else:
                        nursery.start_soon(self.answer, self, command)
