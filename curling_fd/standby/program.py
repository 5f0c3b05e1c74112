"""What a QEMU on this host says of itself when it is asked on its command line, without a VM."""

from __future__ import annotations

import os
import re
import subprocess
from functools import lru_cache

from attrs import frozen

from curling_fd.errors import StandbyFailed

#: Seconds a QEMU may take to say what it is.
_PATIENCE = 3.0

_VERSION = re.compile(r"version (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")


@frozen
class Program:
    """A QEMU program: its version, and the machine types it knows."""

    path: str
    version: tuple[int, int, int]
    machines: frozenset[str]


def query(path: str) -> Program:
    """Ask the QEMU at `path`; blocks, for some 50 ms the first time.

    Raises:
        StandbyFailed: it cannot be run, or says nothing of the kind.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise StandbyFailed(f"{path} cannot be run: {error.strerror}") from None
    return _query(path, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _query(path: str, inode: int, changed: int) -> Program:
    """Whoever asks over the link cannot have more than a few processes started: each file is asked once."""
    found = _VERSION.search(_run(path, "--version"))
    if found is None:
        raise StandbyFailed(f"{path} does not say which version of QEMU it is")
    lines = _run(path, "-machine", "help").splitlines()[1:]
    machines = frozenset(line.split()[0] for line in lines if line.strip())
    return Program(path, (int(found[1]), int(found[2]), int(found[3] or 0)), machines)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise StandbyFailed(f"{command[0]} cannot be run: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise StandbyFailed(f"{command[0]} did not answer within {_PATIENCE:g} s") from None
    return done.stdout
