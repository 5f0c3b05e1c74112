"""The test process's end of the line to a lab host's agent: run commands there, follow them, move files."""

from __future__ import annotations

import base64
import itertools
import json
import math
import shlex
import signal
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from attrs import define, field, frozen

_CHUNK = 1 << 16
#: Seconds for an agent to answer: one that has just been started, on an emulated CPU that boots.
_GREETING_PATIENCE = 1.0


class CommandFailed(AssertionError):
    """A command in a host ended otherwise than it should."""


class HostLost(Exception):
    """The line to the host broke: it lost its power, or was switched off."""


@frozen
class Done:
    """A command that ended. `status` is negative when a signal ended it."""

    status: int
    stdout: str
    stderr: str


@frozen
class Greeting:
    """What an agent said of itself. The host's clocks in ns, and ours (monotonic, in s) halfway through."""

    boot: str
    monotonic: int
    realtime: int
    asked_at: float


@define(eq=False)
class Running:
    """A command that runs in a host, with what it prints as it comes."""

    number: int
    _agent: Agent
    _sink: trio.MemorySendChannel[dict[str, Any]]
    _source: trio.MemoryReceiveChannel[dict[str, Any]]
    status: int | None = None

    async def output(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """("out" or "err", bytes) until it ends; `status` is there then.

        Raises:
            HostLost: the line broke.
        """
        async for message in self._source:
            if "exit" in message:
                self.status = message["exit"]
                return
            for name in ("out", "err"):
                if name in message:
                    yield name, base64.b64decode(message[name])
        raise HostLost

    async def lines(self) -> AsyncGenerator[str, None]:
        """The lines of its standard output as they come."""
        pending = b""
        async with aclosing(self.output()) as output:
            async for name, data in output:
                if name == "out":
                    *whole, pending = (pending + data).split(b"\n")
                    for line in whole:
                        yield line.decode(errors="replace")

    async def input(self, data: bytes | None) -> None:
        """Give it standard input; None closes that."""
        for start in range(0, len(data) if data else 0, _CHUNK):
            assert data is not None
            piece = base64.b64encode(data[start : start + _CHUNK]).decode()
            await self._agent.send({"id": self.number, "input": piece})
        if data is None:
            await self._agent.send({"id": self.number, "input": None})

    async def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size."""
        await self._agent.send({"id": self.number, "size": [rows, columns]})

    async def signal(self, number: signal.Signals) -> None:
        """Send its process group a signal."""
        await self._agent.send({"id": self.number, "signal": int(number)})


@define(eq=False)
class Agent:
    """The agent of a host, while a connection to it lasts; made by `connected`. `lost` is set at its end."""

    name: str
    greeting: Greeting
    _stream: trio.SocketStream
    lost: trio.Event = field(factory=trio.Event)
    _running: dict[int, Running] = field(factory=dict)
    _numbers: Any = field(factory=lambda: itertools.count(1))
    _lock: trio.Lock = field(factory=trio.Lock)

    @asynccontextmanager
    async def start(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        pty: tuple[int, int] | None = None,
    ) -> AsyncIterator[Running]:
        """Run a command, a shell's if it is one string, for the length of a block; its end kills it."""
        argv = ["/bin/bash", "-c", command] if isinstance(command, str) else list(command)
        async with self._begin({"run": argv, "env": dict(env or {}), "cwd": cwd, "pty": pty}) as running:
            yield running

    @asynccontextmanager
    async def connect(self, path: str) -> AsyncIterator[Running]:
        """Connect to a UNIX socket in the host for the length of a block; what it says is the output."""
        async with self._begin({"connect": path}) as running:
            yield running

    @asynccontextmanager
    async def _begin(self, request: dict[str, Any]) -> AsyncIterator[Running]:
        sink, source = trio.open_memory_channel[dict[str, Any]](math.inf)
        running = Running(next(self._numbers), self, sink, source)
        self._running[running.number] = running
        try:
            if self.lost.is_set():
                raise HostLost
            await self.send({"id": running.number, **request})
            yield running
        finally:
            self._running.pop(running.number, None)
            if running.status is None:
                with trio.move_on_after(1) as scope:
                    scope.shield = True
                    try:
                        await running.signal(signal.SIGKILL)
                    except HostLost:
                        pass

    async def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        check: bool = True,
        within: float = 120,
    ) -> Done:
        """Run a command to its end.

        Raises:
            CommandFailed: with `check`: it ended with something else than 0; without: never.
            HostLost: the line broke before.
            TimeoutError: it took longer than `within` seconds; it is killed.
        """
        collected = {"out": bytearray(), "err": bytearray()}
        words = command if isinstance(command, str) else shlex.join(command)
        with trio.move_on_after(within):
            async with self.start(command, env=env, cwd=cwd) as running:
                if stdin:
                    await running.input(stdin)
                await running.input(None)
                async for name, data in running.output():
                    collected[name] += data
                assert running.status is not None
                stdout, stderr = (collected[name].decode(errors="replace") for name in ("out", "err"))
                if check and running.status:
                    raise CommandFailed(
                        f"{self.name}# {words}\nended with {running.status}:\n{stdout}{stderr}"
                    )
                return Done(running.status, stdout, stderr)
        so_far = b"".join(map(bytes, collected.values())).decode(errors="replace")
        raise TimeoutError(f"{self.name}# {words}\nruns longer than {within} s. It said:\n{so_far}")

    async def read(self, path: str) -> bytes:
        """The contents of a file."""
        async with self.start(["cat", path]) as running:
            collected = {"out": bytearray(), "err": bytearray()}
            async for name, data in running.output():
                collected[name] += data
        if running.status:
            raise CommandFailed(f"{self.name}: {collected['err'].decode(errors='replace')}")
        return bytes(collected["out"])

    async def write(self, path: str, data: str | bytes, *, mode: int = 0o644) -> None:
        """Make a file, and its folders."""
        raw = data.encode() if isinstance(data, str) else data
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        await self.run(["/bin/sh", "-c", script, "sh", path, f"{mode:o}"], stdin=raw)

    async def send(self, message: dict[str, Any]) -> None:
        """Send the agent a line."""
        try:
            async with self._lock:
                await self._stream.send_all(json.dumps(message).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise HostLost from None

    async def receive(self, received: bytes) -> None:
        """Carry the agent's lines to those who wait for them, until the line breaks."""
        try:
            while True:
                *lines, received = received.split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if running := self._running.get(message.get("id", 0)):
                        running._sink.send_nowait(message)
                data = await self._stream.receive_some(_CHUNK)
                if not data:
                    return
                received += data
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            self.lost.set()
            for running in self._running.values():
                running._sink.close()
            await trio.aclose_forcefully(self._stream)


@asynccontextmanager
async def connected(name: str, path: Path, *, within: float = 240) -> AsyncIterator[Agent]:
    """A connection to the agent behind QEMU's socket at `path`, waited for while its host boots.

    Raises:
        TimeoutError: no agent answered.
    """
    greeted: tuple[trio.SocketStream, Greeting, bytes] | None = None
    with trio.move_on_after(within):
        stream = await trio.open_unix_socket(str(path))
        greeted = await _greet(stream)
    if greeted is None:
        raise TimeoutError(f"the agent of {name} does not answer within {within} s")
    stream, greeting, rest = greeted
    agent = Agent(name, greeting, stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.receive, rest)
        try:
            yield agent
        finally:
            nursery.cancel_scope.cancel()


async def _greet(stream: trio.SocketStream) -> tuple[trio.SocketStream, Greeting, bytes]:
    """Ask for a greeting until one comes: what is sent before the agent runs may be lost."""
    received = b""
    while True:
        nonce, asked_at = uuid.uuid4().hex, time.monotonic()
        # The line break ends what an earlier client may have left unfinished.
        await stream.send_all(b"\n" + json.dumps({"hello": nonce}).encode() + b"\n")
        with trio.move_on_after(_GREETING_PATIENCE):
            while True:
                data = await stream.receive_some(_CHUNK)
                if not data:
                    raise HostLost
                *lines, received = (received + data).split(b"\n")
                for number, line in enumerate(lines):
                    if nonce.encode() not in line:
                        continue
                    # An unfinished line of an earlier client's may stand before it.
                    said = json.loads(line[line.rindex(b'{"hello"') :])
                    halfway = (asked_at + time.monotonic()) / 2
                    greeting = Greeting(said["boot"], said["monotonic"], said["realtime"], halfway)
                    return stream, greeting, b"\n".join([*lines[number + 1 :], received])
