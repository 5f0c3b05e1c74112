"""Runs in a lab host and does what `control` asks, over a virtio port. Standard library of Python 3.11 only.

Both ends speak lines of JSON. From the test process:

    {"hello": NONCE}                            a new client: commands of the one before are killed
    {"id": N, "run": ARGV, "env": {}, "cwd": PATH, "pty": [ROWS, COLUMNS] or null}
    {"id": N, "connect": PATH}                  to a UNIX socket; what comes out of it is "out"
    {"id": N, "input": BASE64 or null}          for its standard input; null closes it
    {"id": N, "size": [ROWS, COLUMNS]}          of its terminal
    {"id": N, "signal": NUMBER}                 to its process group

From here:

    {"hello": NONCE, "boot": ID, "monotonic": NS, "realtime": NS}
    {"id": N, "out": BASE64}, {"id": N, "err": BASE64}
    {"id": N, "exit": STATUS}                   the last word about N; negative: the signal that ended it
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import pty
import queue
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PORT = "/dev/virtio-ports/lab.agent"
_PORT_PATIENCE = 60.0
_IDLE_SECONDS = 0.1
_CHUNK = 1 << 15

Send = Callable[[dict[str, Any]], None]


class Command:
    """A process that was asked for, and the threads that carry its output."""

    def __init__(self, number: int, request: dict[str, Any], send: Send) -> None:
        self._number, self._send = number, send
        self._terminal: int | None = None
        options: dict[str, Any] = {
            "env": {**_environment(), **request.get("env", {})},
            "cwd": request.get("cwd", "/"),
            "start_new_session": True,
        }
        if request.get("pty"):
            self._terminal, slave = pty.openpty()
            self.resize(request["pty"])
            take = lambda: _ordinary(terminal=True)  # noqa: E731
            self._process = subprocess.Popen(
                request["run"], stdin=slave, stdout=slave, stderr=slave, preexec_fn=take, **options
            )
            os.close(slave)
            outputs: list[tuple[str, BinaryIO]] = [("out", os.fdopen(os.dup(self._terminal), "rb", 0))]
            self._input: Any = os.fdopen(os.dup(self._terminal), "wb", 0)
        else:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                request["run"],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                preexec_fn=_ordinary,
                bufsize=0,
                **options,
            )
            assert self._process.stdout and self._process.stderr
            outputs = [("out", self._process.stdout), ("err", self._process.stderr)]  # type: ignore[list-item]
            self._input = self._process.stdin
        self._inputs: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._feed, daemon=True).start()
        threads = [threading.Thread(target=self._carry, args=output, daemon=True) for output in outputs]
        for thread in threads:
            thread.start()
        threading.Thread(target=self._finish, args=(threads,), daemon=True).start()

    def input(self, data: bytes | None) -> None:
        """Have `data` written to its standard input when it reads, or that closed."""
        self._inputs.put(data)

    def resize(self, size: list[int]) -> None:
        """Tell its terminal how large it is."""
        if self._terminal is not None:
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))

    def signal(self, number: int) -> None:
        """Send its process group a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _feed(self) -> None:
        with contextlib.suppress(OSError), self._input:
            while data := self._inputs.get():
                view = memoryview(data)
                while view:
                    view = view[self._input.write(view) :]

    def _carry(self, name: str, output: BinaryIO) -> None:
        # A terminal whose last user has gone reads as EIO.
        with contextlib.suppress(OSError), output:
            while data := output.read(_CHUNK):
                self._send({"id": self._number, name: base64.b64encode(data).decode()})

    def _finish(self, threads: list[threading.Thread]) -> None:
        status = self._process.wait()
        # What it started in the background may hold its output open for ever.
        for thread in threads:
            thread.join(timeout=1)
        self._inputs.put(None)
        self._send({"id": self._number, "exit": status})


class Connection:
    """A connection to a UNIX socket that was asked for, in place of a command."""

    def __init__(self, number: int, path: str, send: Send) -> None:
        self._number, self._send = number, send
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        threading.Thread(target=self._carry, daemon=True).start()

    def input(self, data: bytes | None) -> None:
        """Send `data`; None ends the connection."""
        with contextlib.suppress(OSError):
            self._socket.sendall(data) if data else self._socket.shutdown(socket.SHUT_RDWR)

    def resize(self, size: list[int]) -> None:
        """It has no terminal."""

    def signal(self, number: int) -> None:
        """Any signal ends it."""
        self.input(None)

    def _carry(self) -> None:
        with contextlib.suppress(OSError), self._socket:
            while data := self._socket.recv(_CHUNK):
                self._send({"id": self._number, "out": base64.b64encode(data).decode()})
        self._send({"id": self._number, "exit": 0})


class Agent:
    """The port, and the commands of its one client."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._commands: dict[int, Command | Connection] = {}
        self._nonce: Any = None

    def serve(self) -> None:
        """Take requests for ever."""
        pending = b""
        while True:
            data = os.read(self._port, _CHUNK)
            if not data:
                # Nobody is connected; the port has no way to wait for somebody.
                pending = b""
                time.sleep(_IDLE_SECONDS)
                continue
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                # A client that was cut off in the middle of a line leaves half of one.
                with contextlib.suppress(ValueError):
                    self._obey(json.loads(line))

    def _obey(self, request: dict[str, Any]) -> None:
        if "hello" in request:
            self._welcome(request["hello"])
        elif "run" in request or "connect" in request:
            self._begin(request)
        elif command := self._commands.get(request["id"]):
            if "input" in request:
                data = request["input"]
                command.input(None if data is None else base64.b64decode(data))
            elif "size" in request:
                command.resize(request["size"])
            elif "signal" in request:
                command.signal(request["signal"])

    def _welcome(self, nonce: Any) -> None:
        for command in self._commands.values():
            command.signal(signal.SIGKILL)
        self._commands.clear()
        self._nonce = nonce
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        clocks = {"monotonic": time.monotonic_ns(), "realtime": time.time_ns()}
        self._send(nonce, {"hello": nonce, "boot": boot, **clocks})

    def _begin(self, request: dict[str, Any]) -> None:
        number, nonce = request["id"], self._nonce

        def send(message: dict[str, Any]) -> None:
            if "exit" in message:
                self._commands.pop(number, None)
            self._send(nonce, message)

        path = request.get("connect")
        try:
            made = Connection(number, path, send) if path else Command(number, request, send)
            self._commands[number] = made
        except OSError as error:
            words = f"{path or request['run'][0]}: {error.strerror}\n".encode()
            self._send(nonce, {"id": number, "err": base64.b64encode(words).decode()})
            self._send(nonce, {"id": number, "exit": 127})

    def _send(self, nonce: Any, message: dict[str, Any]) -> None:
        view = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            # What is left of an earlier client's commands is not for the one that is connected now.
            while view and nonce == self._nonce:
                view = view[os.write(self._port, view) :]


def _environment() -> dict[str, str]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "xterm"}


def _ordinary(terminal: bool = False) -> None:
    """In the new process: killed as readily as others when memory runs out."""
    Path("/proc/self/oom_score_adj").write_text("0")
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _open_port() -> int:
    end = time.monotonic() + _PORT_PATIENCE
    while True:
        try:
            return os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(_IDLE_SECONDS)


if __name__ == "__main__":
    Agent(_open_port()).serve()
