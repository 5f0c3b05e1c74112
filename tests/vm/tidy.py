"""The cache gets a disk for every state of the project that is tested: all but the newest are removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.cache import cache_root

#: Of each kind; and seconds for which nothing is removed that somebody may be about to use.
_KEPT = 3
_FRESH_SECONDS = 600.0


@contextlib.contextmanager
def in_use(*entries: Path) -> Iterator[None]:
    """Keep folders of the cache from being removed, for the length of a block."""
    with contextlib.ExitStack() as stack:
        for entry in entries:
            os.utime(entry)
            fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield


def tidy(root: Path | None = None) -> list[Path]:
    """Remove disks and trees of hosts that were not used for longest; which ones."""
    root = cache_root() if root is None else root
    kinds: dict[Path, list[Path]] = {}
    for entry in [*root.glob("vm/[!.]*-*"), *root.glob("roots/vm-*")]:
        kinds.setdefault(entry.with_name(entry.name.rpartition("-")[0]), []).append(entry)
    removed = []
    for entries in kinds.values():
        for entry in sorted(entries, key=_used, reverse=True)[_KEPT:]:
            if time.time() - _used(entry) > _FRESH_SECONDS and _remove(entry):
                removed.append(entry)
    return removed


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # somebody else tidies
        return 0.0


def _remove(entry: Path) -> bool:
    """Remove `entry` unless it is in use."""
    try:
        fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Under another name first: who looks for it finds a whole one or none.
        dying = entry.with_name(f".{entry.name}.removed")
        entry.rename(dying)
        shutil.rmtree(dying) if dying.is_dir() else dying.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)
    return True
