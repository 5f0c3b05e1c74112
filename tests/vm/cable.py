"""The networks between lab hosts: learning switches in a process of their own, with ports that obey.

A port is one end of a cable: QEMU's `-netdev stream` on a UNIX socket (a frame behind its length in four
bytes, net/stream.c), or a tap in a network name space of this machine. Whatever passes a port is recorded in
a pcap file. A port can be cut, and what goes through it delayed or slowed down, in either direction.

    python -m tests.vm.cable SOCKETS RECORDS PORT...

PORT: NETWORK.NAME, or NETWORK.NAME=NETNS for a tap there. Below RECORDS: PORT.pcap. Below SOCKETS: PORT.sock
for QEMU, and control.sock, which takes lines of JSON:

    {"port": "link.alpha", "up": false}    and "delay" (seconds) and "rate" (bytes a second, null: no limit)
    {}                                     changes nothing

and answers each with the statistics of all ports, {"link.alpha": {"up": ..., "in_frames": ..., ...}, ...}.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

import trio
from attrs import asdict, define, field

_CHUNK = 1 << 18
#: Bytes that wait in a port at most; a real switch drops what comes on top as well.
_QUEUE_BYTES = 4 << 20
#: Bytes of each frame that are recorded: small ones whole, of large ones the headers.
_SNAPLEN, _HEADERS = 256, 80
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x1002
_CLONE_NEWNET = 0x40000000


@define
class Behaviour:
    """How a port treats what passes it."""

    up: bool = True
    delay: float = 0.0
    rate: float | None = None


@define
class Statistics:
    """Frames since the switch began: in is from the port's owner. Dropped: cut, or too many waited."""

    in_frames: int = 0
    in_bytes: int = 0
    out_frames: int = 0
    out_bytes: int = 0
    dropped: int = 0


class Recorder:
    """A pcap file (nanoseconds, Ethernet); the format is libpcap's pcap-savefile(5)."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, _SNAPLEN, 1))

    def record(self, frame: bytes) -> None:
        now = time.time_ns()
        kept = frame if len(frame) <= _SNAPLEN else frame[:_HEADERS]
        self._file.write(struct.pack("<IIII", now // 10**9, now % 10**9, len(kept), len(frame)) + kept)

    def flush(self) -> None:
        self._file.flush()


@define(eq=False)
class Port:
    """One end of a cable. What the switch sends to it waits here until it is due."""

    name: str
    recorder: Recorder
    behaviour: Behaviour = field(factory=Behaviour)
    statistics: Statistics = field(factory=Statistics)
    write: Callable[[list[bytes]], Awaitable[None]] | None = None
    _waiting: deque[tuple[float, bytes]] = field(factory=deque)
    _waiting_bytes: int = 0
    _free_at: float = 0.0
    _news: trio.Event = field(factory=trio.Event)

    def report(self) -> dict[str, Any]:
        """What `control` answers of it."""
        connected = {"connected": self.write is not None}
        return {**asdict(self.behaviour), **asdict(self.statistics), **connected}

    def due(self, frame: bytes) -> float:
        """When a frame that enters this port's cable now is at its other end."""
        start = max(trio.current_time(), self._free_at)
        if self.behaviour.rate is not None:
            start += len(frame) / self.behaviour.rate
            self._free_at = start
        return start + self.behaviour.delay

    def put(self, at: float, frame: bytes) -> None:
        """Send `frame` to the port's owner, not before `at`."""
        at = max(at, self.due(frame))
        if not self.behaviour.up or self.write is None or self._waiting_bytes > _QUEUE_BYTES:
            self.statistics.dropped += 1
            return
        self._waiting.append((at, frame))
        self._waiting_bytes += len(frame)
        self._news.set()

    async def deliver(self) -> None:
        """Give the owner what is due, for ever."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while self._waiting:
                now = trio.current_time()
                if self._waiting[0][0] > now:
                    await trio.sleep_until(self._waiting[0][0])
                    continue
                batch: list[bytes] = []
                while self._waiting and self._waiting[0][0] <= now and len(batch) < 64:
                    frame = self._waiting.popleft()[1]
                    self._waiting_bytes -= len(frame)
                    # Cut while it was under way.
                    if self.behaviour.up and self.write is not None:
                        batch.append(frame)
                        self.recorder.record(frame)
                        self.statistics.out_frames += 1
                        self.statistics.out_bytes += len(frame)
                    else:
                        self.statistics.dropped += 1
                if batch and self.write is not None:
                    await self.write(batch)


@define(eq=False)
class Switch:
    """The ports of one network."""

    ports: list[Port] = field(factory=list)
    _learned: dict[bytes, Port] = field(factory=dict)

    def take(self, port: Port, frame: bytes) -> None:
        """A frame from a port's owner."""
        if not port.behaviour.up or len(frame) < 14:
            port.statistics.dropped += 1
            return
        port.recorder.record(frame)
        port.statistics.in_frames += 1
        port.statistics.in_bytes += len(frame)
        self._learned[frame[6:12]] = port
        at = port.due(frame)
        known = None if frame[0] & 1 else self._learned.get(frame[:6])
        for other in [known] if known else self.ports:
            if other is not port:
                other.put(at, frame)


async def serve_socket(port: Port, switch: Switch, listener: trio.SocketListener) -> None:
    """A port whose owner is a QEMU; another may connect when one has gone."""
    while True:
        stream = await listener.accept()

        async def write(frames: list[bytes], stream: trio.SocketStream = stream) -> None:
            try:
                await stream.send_all(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                port.write = None

        port.write = write
        pending = bytearray()
        try:
            while data := await stream.receive_some(_CHUNK):
                pending += data
                start = 0
                while len(pending) >= start + 4:
                    (length,) = struct.unpack_from(">I", pending, start)
                    if len(pending) < start + 4 + length:
                        break
                    switch.take(port, bytes(pending[start + 4 : start + 4 + length]))
                    start += 4 + length
                del pending[:start]
        except trio.BrokenResourceError:
            pass
        if port.write is write:
            port.write = None
        await stream.aclose()


async def serve_tap(port: Port, switch: Switch, fd: int) -> None:
    """A port whose owner is a network name space."""

    async def write(frames: list[bytes]) -> None:
        for frame in frames:
            try:
                os.write(fd, frame)
            except OSError:  # it is down, or full
                port.statistics.dropped += 1

    port.write = write
    while True:
        try:
            switch.take(port, os.read(fd, 1 << 16))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)


async def control(stream: trio.SocketStream, ports: dict[str, Port]) -> None:
    """Do what the lines of one client say."""
    pending = b""
    while data := await stream.receive_some(_CHUNK):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            request: dict[str, Any] = json.loads(line)
            if name := request.pop("port", None):
                for key, value in request.items():
                    setattr(ports[name].behaviour, key, value)
            answer = {port.name: port.report() for port in ports.values()}
            for port in ports.values():
                port.recorder.flush()
            await stream.send_all(json.dumps(answer).encode() + b"\n")


def tap(netns: str, interface: str) -> int:
    """A new tap in the network name space `netns`. The caller owns the descriptor, with which the tap ends.

    Moves this thread into that name space, for ever.
    """
    there = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    if ctypes.CDLL(None, use_errno=True).setns(there, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {netns}")
    os.close(there)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TAP_NO_PI))
    return fd


async def main(sockets: Path, records: Path, names: list[str]) -> None:
    switches: dict[str, Switch] = {}
    ports: dict[str, Port] = {}
    async with trio.open_nursery() as nursery:
        for word in names:
            name, _, netns = word.partition("=")
            switch = switches.setdefault(name.partition(".")[0], Switch())
            port = ports[name] = Port(name, Recorder(records / f"{name}.pcap"))
            switch.ports.append(port)
            nursery.start_soon(port.deliver)
            if netns:
                nursery.start_soon(serve_tap, port, switch, tap(netns, "eth0"))
            else:
                nursery.start_soon(serve_socket, port, switch, await _listen(sockets / f"{name}.sock"))
        # Last: who can connect to it knows that all the others are there.
        listener = await _listen(sockets / "control.sock")
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(trio.serve_listeners, lambda stream: control(stream, ports), [listener])
            # The end of our output says that we are ready.
            os.dup2(2, 1)
            async for _ in signals:
                break
        for port in ports.values():
            port.recorder.flush()
        nursery.cancel_scope.cancel()


async def _listen(path: Path) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(1)
    return trio.SocketListener(sock)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
