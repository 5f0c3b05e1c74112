"""What is too big for the tree and the same for every run: kept in `$CURLING_CACHE`.

The default is ~/.cache/curling. An entry is named by what went into it, is made in a temporary place beside
its final one and renamed when it is whole, so an entry that exists is complete. A lock per entry makes a
second maker wait for the first instead of doing the work again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_root() -> Path:
    """The absolute path of the cache; made when it is not there."""
    configured = os.environ.get("CURLING_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "curling"
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    return root


def digest(*parts: str | bytes | Path) -> str:
    """Twelve hex digits for `parts`; a Path counts with the contents of its file."""
    state = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        raw = data.encode() if isinstance(data, str) else data
        state.update(len(raw).to_bytes(8, "big"))
        state.update(raw)
    return state.hexdigest()[:12]


def made(key: str, make: Callable[[Path], None]) -> Path:
    """The path of entry `key`, after `make` has made it if it was not there.

    Args:
        key: Path of the entry relative to the cache.
        make: Called with a path that does not exist yet; creates a file or a folder there. When it raises,
            what it left is removed and the entry does not exist.
    """
    final = cache_root() / key
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(key):
        if final.exists():
            return final
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        # mkdtemp makes it private; a root folder's programs are run by others as well.
        scratch.chmod(0o755)
        try:
            fresh = scratch / final.name
            make(fresh)
            fresh.rename(final)
        finally:
            _remove(scratch)
    return final


@contextlib.contextmanager
def _locked(key: str) -> Iterator[None]:
    locks = cache_root() / "locks"
    locks.mkdir(exist_ok=True)
    fd = os.open(locks / (key.replace("/", "_") + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    """Remove `folder`, but never through a file system somebody left mounted in it."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if any(line.split()[4].startswith(f"{folder}/") for line in mounts):
        raise RuntimeError(f"something is still mounted below {folder}: unmount it and remove the folder")
    shutil.rmtree(folder)
