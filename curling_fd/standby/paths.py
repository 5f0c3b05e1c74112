"""Which path the standby uses where the primary's command line has one.

There are three kinds. A path QEMU *makes* (a listening socket, a log) gets a name of its own in the
standby's directory: two QEMUs on one machine would otherwise take it from each other, and on another host
its folder may not exist. A path QEMU only *reads* (kernel, image, script) stays: both hosts have it, or
QEMU says which one is missing. A path of something that serves *one* QEMU (a device node, a FIFO, a server
it connects to at start) cannot be guessed: the administrator names the standby's. What the administrator's
`replace` table says goes before all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LONGEST_SOCKET_PATH = 107
"""Bytes of sun_path without its NUL (unix(7))."""


class TooLong(ValueError):
    """A socket path is longer than the kernel takes."""


class Paths:
    """The paths of one standby.

    Args:
        directory: where the files and sockets the standby makes go.
        replace: texts of the primary's command line and what stands there on this host. Whole names only:
            `/run/vm1` matches in `/run/vm1/qmp` and not in `/run/vm10`.
        taken: names in `directory` that are spoken for.
    """

    def __init__(
        self, directory: str, replace: Mapping[str, str], taken: frozenset[str] = frozenset()
    ) -> None:
        self._directory = directory.rstrip("/") or "/"
        self._replace = dict(replace)
        self._taken = set(taken)
        self._own: dict[str, str] = {}
        parts = [_whole(old) for old in sorted(filter(None, replace), key=len, reverse=True)]
        self._pattern = re.compile("|".join(parts)) if parts else None

    def told(self, text: str) -> str | None:
        """`text` as `replace` changes it, or None where `replace` says nothing about it."""
        if self._pattern is None or not self._pattern.search(text):
            return None
        return self._pattern.sub(lambda found: self._replace[found[0]], text)

    def read(self, text: str) -> str:
        """For a path that is only read, and for any other text: changed as told, else as it is."""
        told = self.told(text)
        return text if told is None else told

    def file(self, path: str, name: str) -> str:
        """For a file QEMU writes; `name` where the primary's has none (a descriptor its starter opened)."""
        told = self.told(path)
        if told is not None:
            return told
        passed = path.startswith("/dev/fdset/")
        if path.startswith("/dev/") and not passed and not path.startswith("/dev/shm/"):
            return path
        key = f"{path} {name}" if passed or not path else path
        if key not in self._own:
            last = name if passed else path.rpartition("/")[2] or name
            self._own[key] = f"{self._directory}/{self._free(last.replace('/', '_'))}"
        return self._own[key]

    def socket(self, path: str, name: str) -> str:
        """For a socket QEMU listens at.

        Raises:
            TooLong: the standby's would not fit.
        """
        own = self.file(path, name)
        if len(own.encode("utf-8", "surrogateescape")) > LONGEST_SOCKET_PATH:
            raise TooLong(own)
        return own

    def _free(self, name: str) -> str:
        free, number = name, 2
        while free in self._taken:
            free, number = f"{name}.{number}", number + 1
        self._taken.add(free)
        return free


def _whole(old: str) -> str:
    """A pattern for `old` that is not part of a longer name."""
    end = r"(?![\w.-])" if re.search(r"[\w.-]$", old) else ""
    return rf"(?<![\w.-]){re.escape(old)}{end}"
