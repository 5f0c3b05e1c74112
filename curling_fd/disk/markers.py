"""Where markers are kept, and what copies look like from outside; `curling_fd.disk.marker` says why.

The stamp of a file is its identity, size and time of change. A block device has none of these; it has the
kernel's counts of what was written to it, which begin anew when the host does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from curling_fd.disk.marker import Marker, decode, encode
from curling_fd.errors import ConfigError
from curling_fd.system.files import replace

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_DEVICES = Path("/sys/dev/block")

#: Sectors written and sectors discarded, among the numbers of a device's stat (the kernel's block/stat.rst).
_COUNTS = (6, 13)


class MarkerStore:
    """Files `disks/NAME.json` in `directory`, replaced atomically and synced."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory) / "disks"

    def load(self, vm: str) -> dict[str, Marker]:
        """The markers of the copies of `vm`; none if the file is missing or damaged: all is in doubt."""
        try:
            return decode(self._path(vm).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def save(self, vm: str, markers: Mapping[str, Marker]) -> None:
        """Remember these, and no others; they are on disk when this returns.

        Raises:
            ConfigError: they cannot be: the disk is full, say.
        """
        path = self._path(vm)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            replace(path, encode(markers))
        except OSError as error:
            raise ConfigError(str(path), f"cannot be written: {error.strerror or error}") from None

    def _path(self, vm: str) -> Path:
        return self._directory / f"{vm}.json"


def stamp(path: str | os.PathLike[str]) -> str:
    """What the copy at `path` looks like while nobody has it open; empty if that cannot be told."""
    try:
        seen = os.stat(path)
        if not stat.S_ISBLK(seen.st_mode):
            return f"file {seen.st_dev} {seen.st_ino} {seen.st_size} {seen.st_mtime_ns}"
        boot = _BOOT.read_text(encoding="ascii").strip()
        number = f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}"
        counts = (_DEVICES / number / "stat").read_text(encoding="ascii").split()
        written = " ".join(counts[index] for index in _COUNTS)
        return f"device {boot} {number} {written}"
    except (OSError, IndexError):
        return ""
