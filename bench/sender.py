"""The other end of the transfer benchmarks, a process of its own: `python -m bench.sender KIND ...`.

frames PORT PAGES COUNT    a primary's part of a session: a first pass, then COUNT checkpoints of PAGES
                           pages, two on their way at most, as the daemon sends them
file PORT BYTES            BYTES of a memfd by sendfile, nothing else
chunks FD BYTES CHUNK      BYTES into the socket FD in writes of CHUNK bytes, as QEMU writes to a socket
"""

from __future__ import annotations

import os
import socket
import sys

import trio

from bench.synthetic import checkpoint, first_pass
from curling_fd.errors import LinkError
from curling_fd.link.frames import Header, Kind
from curling_fd.link.transport import FrameLink, connect
from curling_fd.system.buffers import Buffer

GENERATION = 1
_IN_FLIGHT = 2


async def frames(port: int, pages: int, count: int) -> None:
    """See above."""
    buffer, head = checkpoint(pages)
    piece = first_pass()
    link = FrameLink(await connect(("127.0.0.1", port)))
    opening = Buffer("bench-pass", len(piece))
    opening.view[:] = piece
    await link.send_raw(Header(Kind.BULK, GENERATION, 1, len(piece)), b"", (opening, len(piece)))
    slots = trio.Semaphore(_IN_FLIGHT)
    acknowledged = trio.Event()

    async def receive() -> None:
        try:
            while True:
                header = (await link.receive()).header
                if header.kind is Kind.ACK:
                    slots.release()
                    if header.sequence == count:
                        acknowledged.set()
        except LinkError:
            acknowledged.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for sequence in range(1, count + 1):
            await slots.acquire()
            header = Header(Kind.CHECKPOINT, GENERATION, sequence, head.payload_size)
            await link.send_raw(header, head.encode(), (buffer, head.ram + head.device))
        await acknowledged.wait()
        # The backup closes the link, and with it ends the task above.
        await link.send(Kind.END, GENERATION)


def file(port: int, size: int) -> None:
    """See above."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        send_file(sock, Buffer("bench-file", 128 << 20, prefault=128 << 20), size)


def send_file(sock: socket.socket, buffer: Buffer, size: int) -> None:
    """Send `size` bytes of `buffer`, over and over, to the socket `sock` (borrowed)."""
    sent = 0
    while sent < size:
        sent += os.sendfile(sock.fileno(), buffer.fd, sent % buffer.capacity, min(1 << 20, size - sent))


def chunks(fd: int, size: int, chunk: int) -> None:
    """See above."""
    data = memoryview(os.urandom(chunk))
    with socket.socket(fileno=fd) as sock:
        sent = 0
        while sent < size:
            sock.sendall(data[: min(chunk, size - sent)])
            sent += chunk


def main(arguments: list[str]) -> None:
    """Do what the command line says."""
    kind, numbers = arguments[0], [int(word) for word in arguments[1:]]
    match kind:
        case "frames":
            port, pages, count = numbers
            trio.run(frames, port, pages, count)
        case "file":
            file(*numbers)
        case "chunks":
            chunks(*numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
