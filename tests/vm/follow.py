"""Runs in a lab host: copies lines written to any of the files named, once those are there, to stdout.

Each line gets the host's monotonic clock put before it, as the kernel's log has it: "[  123.456789] ". The
first line tells which boot of the host that clock is of: "boot ID".

`tail -F` looks for a file whose folder does not exist only once a second; the last words of a guest whose
host loses its power must not be that late.
"""

from __future__ import annotations

import os
import sys
import time

#: How long nothing is looked at: shortest while there is news, and longer the longer there is none.
_POLL_SECONDS = 0.02
_IDLE_SECONDS = 0.2
_LOOK_SECONDS = 0.2


class Follower:
    """One file, by its name: another file of that name is read from its start."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._looked = 0.0
        self._pending = b""

    def news(self) -> bytes:
        """The lines that were finished since the last call."""
        data = os.read(self._fd, 1 << 16) if self._fd >= 0 else b""
        now = time.monotonic()
        if not data and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._look()
        *lines, self._pending = (self._pending + data).split(b"\n")
        stamp = b"[%12.6f] " % now
        return b"".join(stamp + line + b"\n" for line in lines)

    def _look(self) -> None:
        try:
            found = os.stat(self._path)
        except OSError:
            return
        if self._fd >= 0:
            ours = os.fstat(self._fd)
            if (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino):
                if ours.st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
                    os.lseek(self._fd, 0, os.SEEK_SET)
                return
            os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)


def main(paths: list[str]) -> None:
    followers = [Follower(path) for path in paths]
    with open("/proc/sys/kernel/random/boot_id") as boot:
        os.write(1, f"[{time.monotonic():12.6f}] boot {boot.read()}".encode())
    pause = _POLL_SECONDS
    while True:
        news = b"".join(follower.news() for follower in followers)
        if news:
            os.write(1, news)
        pause = _POLL_SECONDS if news else min(2 * pause, _IDLE_SECONDS)
        time.sleep(pause)


if __name__ == "__main__":
    main(sys.argv[1:])
