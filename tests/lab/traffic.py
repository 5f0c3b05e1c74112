"""Clients of the server guest's real servers: each sees to it that nothing of its connection is wrong.

    ssh        the real client; a command over there prints 1, 2, 3 ...
    download   HTTP, a file whose every byte is known; again and again
    upload     HTTP, the server's checksum must be right; again and again
    redis      INCR, one at a time: each answer is the next number

A client goes on until it is told to stop, and then finishes what it is at.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Awaitable, Callable, Sequence

import trio
from attrs import define, field

from .connections import Progress, connected
from .hosts import Host
from .servers import CONTENT_BYTES, HOST_NAME, HTTP, REDIS, Servers, content

_CHUNK = 1 << 16
_KEY = "counter"

#: Microseconds between two numbers of the ssh session.
_PACE_US = 20000


@define(eq=False)
class Client:
    """One of them, and how far it is. A step is a number, an increment, or a piece of a file."""

    name: str
    work: Callable[[Client], Awaitable[None]]
    stopped: bool = False
    progress: Progress = field(factory=Progress)
    _step: trio.Event = field(factory=trio.Event)

    def step(self, count: int = 1) -> None:
        self.progress.step(count)
        self._step.set()

    async def more(self, count: int) -> None:
        """Wait until it has made `count` more steps."""
        wanted = self.progress.steps + count
        while self.progress.steps < wanted:
            self._step = trio.Event()
            await self._step.wait()


@define(eq=False)
class Traffic:
    """All clients in the name space of `host`, to all `addresses` of a guest.

    Args:
        file_bytes: how much of the server's file a download takes, and how long an upload is.
    """

    host: Host
    servers: Servers
    addresses: Sequence[str]
    file_bytes: int = CONTENT_BYTES
    clients: list[Client] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        for address in self.addresses:
            for kind in (self._ssh, self._download, self._upload, self._redis):
                self.clients.append(Client(f"{kind.__name__.strip('_')} {address}", _bound(kind, address)))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start all of them; ends when they have, after `stop`. One that finds something wrong raises."""
        async with trio.open_nursery() as nursery:
            for client in self.clients:
                nursery.start_soon(_explained, client)
            task_status.started()

    async def more(self, count: int, *, within: float) -> None:
        """Wait until each of them has made `count` more steps."""
        late = {client.name for client in self.clients}

        async def one(client: Client) -> None:
            await client.more(count)
            late.discard(client.name)

        with trio.move_on_after(within):
            async with trio.open_nursery() as nursery:
                for client in self.clients:
                    nursery.start_soon(one, client)
            return
        raise TimeoutError(f"not one more step in {within} s: {', '.join(sorted(late))}")

    def stop(self) -> None:
        """Have each finish what it is at."""
        for client in self.clients:
            client.stopped = True

    def measure(self) -> None:
        """Forget the gaps so far."""
        for client in self.clients:
            client.progress.longest = 0.0

    def gaps(self) -> dict[str, float]:
        """Of each client the longest time without a step since `measure`, in seconds."""
        return {client.name: round(client.progress.longest, 2) for client in self.clients}

    async def _ssh(self, client: Client, address: str) -> None:
        command = ["ssh", "-T", "-F", "none", "-i", str(self.servers.identity), "-o", "IdentitiesOnly=yes"]
        for option in (
            f"UserKnownHostsFile={self.servers.known_hosts}",
            f"HostKeyAlias={HOST_NAME}",
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
            "CheckHostIP=no",
        ):
            command += ["-o", option]
        loop = f"i=0; while :; do i=$((i+1)); echo $i; busybox usleep {_PACE_US}; done"
        reader, writer = os.pipe()
        async with trio.lowlevel.FdStream(reader) as numbers:
            # Whatever ssh complains of is no number, and is shown when it is taken for one.
            process = self.host.popen(
                [*command, f"root@{address}", loop], stdin=subprocess.DEVNULL, stdout=writer, stderr=writer
            )
            os.close(writer)
            try:
                expected, rest = 1, b""
                while not client.stopped:
                    part = await numbers.receive_some(_CHUNK)
                    assert part, "the session ended"
                    *lines, rest = (rest + part).split(b"\n")
                    assert lines == [b"%d" % number for number in range(expected, expected + len(lines))]
                    expected += len(lines)
                    client.step(len(lines))
            finally:
                process.kill()
                process.wait()

    async def _download(self, client: Client, address: str) -> None:
        wanted = content(self.file_bytes)
        while not client.stopped:
            async with connected(self.host, address, HTTP) as stream:
                await stream.send_all(
                    f"GET /data HTTP/1.1\r\nHost: {HOST_NAME}\r\nRange: bytes=0-{len(wanted) - 1}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                head, body = await _head(stream)
                assert b" 206 " in head or b" 200 " in head, head
                taken, state = 0, hashlib.sha256()
                while part := body or await stream.receive_some(_CHUNK):
                    assert wanted.startswith(part, taken), f"the file is another one from {taken} on"
                    state.update(part)
                    taken, body = taken + len(part), b""
                    client.step()
                    if taken == len(wanted):
                        break
                assert state.digest() == hashlib.sha256(wanted).digest()

    async def _upload(self, client: Client, address: str) -> None:
        given = content(self.file_bytes)
        while not client.stopped:
            async with connected(self.host, address, HTTP) as stream:
                await stream.send_all(
                    f"POST /cgi-bin/sum HTTP/1.1\r\nHost: {HOST_NAME}\r\nConnection: close\r\n"
                    f"Content-Length: {len(given)}\r\n\r\n".encode()
                )
                for at in range(0, len(given), _CHUNK):
                    await stream.send_all(given[at : at + _CHUNK])
                    client.step()
                head, body = await _head(stream)
                assert b" 200 " in head, head
                while part := await stream.receive_some(_CHUNK):
                    body += part
                assert body.split()[0].decode() == hashlib.sha256(given).hexdigest(), body

    async def _redis(self, client: Client, address: str) -> None:
        key = f"{_KEY}-{address}"
        async with connected(self.host, address, REDIS) as stream:
            number = 0
            while not client.stopped:
                number += 1
                answer = await ask(stream, "INCR", key)
                assert answer == number, f"increment {number} was answered with {answer!r}"
                client.step()
            assert await ask(stream, "GET", key) == str(number).encode(), (
                "what was acknowledged is there, once"
            )


async def ask(stream: trio.SocketStream, *words: str) -> int | bytes:
    """A command in redis' protocol (RESP), and its answer: a number or a string."""
    coded = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    await stream.send_all(f"*{len(words)}\r\n{coded}".encode())
    answer = b""
    while not (answer.endswith(b"\r\n") and (answer[:1] != b"$" or answer.count(b"\r\n") == 2)):
        part = await stream.receive_some(_CHUNK)
        assert part, f"redis closed the connection after {answer!r}"
        answer += part
    kind, first, *others = answer[:1], *answer[1:].split(b"\r\n")
    assert kind in b":$", answer
    return int(first) if kind == b":" else others[0]


async def _head(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    """The head of an HTTP answer, and what came with it of the body."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = await stream.receive_some(_CHUNK)
        assert part, f"the server closed the connection after {answer!r}"
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def _bound(
    kind: Callable[[Client, str], Awaitable[None]], address: str
) -> Callable[[Client], Awaitable[None]]:
    async def work(client: Client) -> None:
        await kind(client, address)

    return work


async def _explained(client: Client) -> None:
    try:
        await client.work(client)
    except Exception as error:
        error.add_note(f"the client was {client.name}, after {client.progress}")
        raise
