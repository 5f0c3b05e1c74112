"""A service manager's part: starts a daemon, and keeps the descriptors it puts into the store for the next.

What systemd does, as sd_notify(3) and sd_listen_fds(3) have it, with as little of systemd as that needs.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LONGEST = 4096
_MOST_FDS = 16


class ServiceManager:
    """Listens at `path` (NOTIFY_SOCKET) until closed. The descriptors in `store` are owned."""

    def __init__(self, path: Path) -> None:
        self.store: dict[str, int] = {}
        self.heard: list[str] = []
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start `argv` with what is in the store, as `subprocess.Popen` does; the store keeps it as well."""
        names = list(self.store)
        environment = {
            **options.pop("env", os.environ),
            "NOTIFY_SOCKET": str(self.path),
            "LISTEN_FDS": str(len(names)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        # Out of the way of 3, 4, ... first.
        high = [os.dup2(self.store[name], 500 + index) for index, name in enumerate(names)]

        def place() -> None:
            for index, fd in enumerate(high):
                os.dup2(fd, 3 + index)

        try:
            with_pid = ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *argv]
            return subprocess.Popen(
                with_pid,
                env=environment,
                pass_fds=[3 + index for index in range(len(names))],
                preexec_fn=place,
                **options,
            )
        finally:
            for fd in high:
                os.close(fd)

    def stop(self) -> None:
        """The service is not to be started again: close what it left."""
        while self.store:
            os.close(self.store.popitem()[1])

    def close(self) -> None:
        """End; idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._socket.close()
            self.stop()

    def _serve(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(_LONGEST, socket.CMSG_SPACE(4 * _MOST_FDS))
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload[: len(payload) - len(payload) % 4])
            if not data:
                return
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            self.heard.append(data.decode())
            if "FDSTORE" in words:
                self.store[words["FDNAME"]] = fds.pop()
            elif "FDSTOREREMOVE" in words and words["FDNAME"] in self.store:
                os.close(self.store.pop(words["FDNAME"]))
            for fd in fds:  # of a BARRIER: closing it is the answer
                os.close(fd)
