"""How fast a backup takes checkpoints, next to what the machine can do at all; splice against recv_into."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from bench.sender import GENERATION, send_file
from bench.synthetic import RAM, checkpoint, first_pass, payload
from curling_fd.capture.reader import migration_socketpair
from curling_fd.link.frames import digest
from curling_fd.link.transport import PIPE_SIZE, FrameLink
from curling_fd.replica.image import Replica
from curling_fd.service.backup import BackupSession
from curling_fd.service.statistics import Counters
from curling_fd.system.buffers import Buffer

_GB = 1e9

#: QEMU hands its socket at most 64 pieces of memory at once, a page's header and content being two.
QEMU_CHUNK = 32 * 4104

_MAX_RAW = 256 << 20

#: As curlingd has it.
SWITCH_INTERVAL = 0.0005


def commit(pages: int, total: int) -> dict[str, float]:
    """GB/s of checkpoints received, digested, checked and applied by a BackupSession over loopback TCP.

    Args:
        pages: of each checkpoint.
        total: bytes in all, about.
    """
    count = max(total // (pages * 4104), 20)

    async def run() -> dict[str, float]:
        listener = trio.socket.socket()
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        image = Buffer("bench-ram", RAM.size, prefault=RAM.size)
        times: list[float] = []
        commits: list[tuple[float, float]] = []  # when, and the process's CPU seconds

        class Watched(Counters):
            def commit(self, sequence: int) -> None:
                super().commit(sequence)
                times.append(time.perf_counter())
                commits.append((time.perf_counter(), _cpu()))

        with _sender("frames", listener.getsockname()[1], pages, count):
            link = FrameLink((await listener.accept())[0])
            replica = Replica([(RAM, image)])
            counters = Watched()
            session = BackupSession(
                link,
                replica,
                counters,
                generation=GENERATION,
                max_raw=_MAX_RAW,
                heartbeat_interval=0.1,
                failure_timeout=30.0,
                # No standby is needed to take checkpoints.
                rehearse=trio.lowlevel.checkpoint,
                standby_failed=trio.sleep_forever,
                committed=lambda: None,
                learned=lambda addresses: None,
            )
            await session.run()
            link.close()
        replica.close()
        image.close()
        listener.close()
        # The first quarter touches the staging buffers for the first time.
        start = count // 4
        seconds = commits[-1][0] - commits[start][0]
        size = counters.bytes_total / counters.checkpoints * (count - 1 - start)
        return {
            "gb_per_s": size / seconds / _GB,
            "cpu_s_per_gb": (commits[-1][1] - commits[start][1]) / (size / _GB),
            "checkpoint_mb": size / (count - 1 - start) / 1e6,
        }

    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        return trio.run(run)
    finally:
        sys.setswitchinterval(interval)


def stages(pages: int, repeat: int = 8) -> dict[str, float]:
    """GB/s of each stage of a commit by itself, in one thread, the data in memory."""
    buffer, head = checkpoint(pages)
    whole = Buffer("bench-frame", head.payload_size, prefault=1 << 40)
    whole.view[:] = payload(head, buffer)
    image = Buffer("bench-ram", RAM.size, prefault=RAM.size)
    replica = Replica([(RAM, image)])
    opening = memoryview(bytearray(first_pass()))
    replica.bulk(opening, len(opening))
    size = head.payload_size
    spent = {"digest": 0.0, "stage": 0.0, "apply": 0.0}
    for sequence in range(1, repeat + 1):
        start = time.perf_counter()
        digest(b"", whole.view)
        spent["digest"] += (digested := time.perf_counter()) - start
        staged = replica.stage(sequence, whole.view, size)
        spent["stage"] += (checked := time.perf_counter()) - digested
        replica.commit(staged)
        spent["apply"] += time.perf_counter() - checked
    replica.close()
    for each in (buffer, whole, image):
        each.close()
    return {name: size * repeat / seconds / _GB for name, seconds in spent.items()}


def memcpy(size: int = 123 << 20, repeat: int = 8) -> float:
    """GB/s of libc's memcpy between two mapped buffers: what applying a checkpoint cannot beat."""
    source, target = Buffer("bench-a", size, prefault=size), Buffer("bench-b", size, prefault=size)
    start = time.perf_counter()
    for _ in range(repeat):
        target.view[:] = source.view
    seconds = time.perf_counter() - start
    source.close()
    target.close()
    return size * repeat / seconds / _GB


def socat(total: int, block: int) -> float:
    """GB/s that `socat` takes from loopback TCP into /dev/null, the sender being ours (sendfile)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listen = f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr"
    command = ["socat", "-u", "-b", str(block), listen, "OPEN:/dev/null"]
    buffer = Buffer("bench-file", 128 << 20, prefault=128 << 20)
    with subprocess.Popen(command) as receiver:
        with _connect(port) as sock:
            start = time.perf_counter()
            send_file(sock, buffer, total)
        receiver.wait()
        seconds = time.perf_counter() - start
    buffer.close()
    return total / seconds / _GB


def receiver(how: str, total: int, frame: int) -> dict[str, float]:
    """From loopback TCP into a memfd, by `splice` (through a pipe) or `recv_into` (to its mapping)."""
    buffer = Buffer("bench-staging", frame, prefault=frame)
    with socket.create_server(("127.0.0.1", 0)) as server, _sender("file", server.getsockname()[1], total):
        sock, _ = server.accept()
        with sock:
            result = _take(how, sock, buffer, total)
    buffer.close()
    return result


def capture(how: str, total: int, frame: int) -> dict[str, float]:
    """The same from the UNIX socket on which QEMU sends, with its sizes of writes and of buffers."""
    buffer = Buffer("bench-capture", frame, prefault=frame)
    ours, theirs = migration_socketpair()
    with ours, theirs, _sender("chunks", theirs.fileno(), total, QEMU_CHUNK, fds=[theirs.fileno()]):
        theirs.close()
        result = _take(how, ours, buffer, total)
    buffer.close()
    return result


def _take(how: str, sock: socket.socket, buffer: Buffer, total: int) -> dict[str, float]:
    sock.recv(1, socket.MSG_PEEK)
    start, cpu = time.perf_counter(), _cpu()
    (_by_splice if how == "splice" else _by_recv)(sock, buffer, total)
    seconds, used = time.perf_counter() - start, _cpu() - cpu
    return {"gb_per_s": total / seconds / _GB, "cpu_s_per_gb": used / (total / _GB)}


def _by_recv(sock: socket.socket, buffer: Buffer, total: int) -> None:
    view, at = buffer.view, 0
    while total:
        count = sock.recv_into(view[at : at + min(total, buffer.capacity - at)])
        at = (at + count) % buffer.capacity
        total -= count


def _by_splice(sock: socket.socket, buffer: Buffer, total: int) -> None:
    pipe_out, pipe_in = os.pipe()
    fcntl.fcntl(pipe_in, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    at = 0
    while total:
        count = os.splice(sock.fileno(), pipe_in, min(total, buffer.capacity - at, PIPE_SIZE))
        total -= count
        while count:
            moved = os.splice(pipe_out, buffer.fd, count, offset_dst=at)
            count -= moved
            at = (at + moved) % buffer.capacity
    os.close(pipe_in)
    os.close(pipe_out)


def _connect(port: int) -> socket.socket:
    """A connection to `port`, once somebody listens there."""
    until = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


@contextmanager
def _sender(kind: str, *numbers: int, fds: list[int] | None = None) -> Iterator[Any]:
    command = [sys.executable, "-m", "bench.sender", kind, *map(str, numbers)]
    with subprocess.Popen(command, pass_fds=fds or []) as process:
        try:
            yield process
        finally:
            process.wait(30)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def middle(measure: Callable[[], Any], repeat: int, key: Callable[[Any], float] = float) -> Any:
    """The middle one of `repeat` results."""
    return sorted((measure() for _ in range(repeat)), key=key)[repeat // 2]


__all__ = ["capture", "commit", "memcpy", "middle", "receiver", "socat", "stages"]
