"""Files out of Debian packages that are not to be installed on the machine the tests run on."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .cache import made


def distribution() -> str:
    """ID and version of the running distribution, like "debian-12"; names cache entries."""
    fields = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    version = fields.get("VERSION_ID") or fields.get("VERSION_CODENAME") or "rolling"
    return f"{fields['ID']}-{version}".replace('"', "")


def unpacked(package: str) -> Path:
    """A folder with the files of this distribution's `package`.

    Taken from the archive once and kept: a newer version of the package does not replace it.
    """

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # Run by root, apt-get complains that its own user cannot write into our folder.
            _apt(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package], cwd=folder)
            (archive,) = Path(folder).glob("*.deb")
            run(["dpkg-deb", "-x", str(archive), str(target)])

    return made(f"packages/{distribution()}/{package}", make)


def find_library(name: str, packages: Iterable[str]) -> Path:
    """The shared object `name` out of what `packages` depend on, the nearest first."""
    seen: set[str] = set()
    level = set(packages)
    while level:
        for package in sorted(level):
            for path in unpacked(package).rglob(name):
                # Through an absolute link we would be at this machine's own.
                if path.is_file() and not (path.is_symlink() and path.readlink().is_absolute()):
                    return path
        seen |= level
        level = set().union(*map(_libraries_of, level)) - seen
    raise RuntimeError(f"{name} is in nothing that {', '.join(packages)} need")


@cache
def _libraries_of(package: str) -> frozenset[str]:
    """The library packages that `package` depends on."""
    output = _apt(["apt-cache", "depends", "--no-recommends", "--no-suggests", package])
    names = [line.split()[-1] for line in output.splitlines() if "Depends:" in line]
    # Libraries are called so by Debian's policy, but for this one.
    return frozenset(name for name in names if name.startswith(("lib", "zlib1g")))


def depended_on(package: str, prefix: str) -> str:
    """The name of the package starting with `prefix` that `package` depends on."""
    output = _apt(["apt-cache", "depends", "--no-recommends", "--no-suggests", package])
    names = [line.split()[-1] for line in output.splitlines() if "Depends:" in line]
    found = [name for name in names if name.startswith(prefix)]
    if not found:
        raise RuntimeError(f"{package} depends on no package named {prefix}...")
    return found[0]


def refresh_lists() -> None:
    """Fetch the package lists, if we are root: old lists name versions the archive has no more."""
    if os.geteuid() == 0:
        run(["apt-get", "-q", "update"])


def _apt(command: list[str], cwd: str | None = None) -> str:
    """Run `command`, and once more with fresh package lists if it fails."""
    try:
        return run(command, cwd=cwd)
    except RuntimeError:
        refresh_lists()
    return run(command, cwd=cwd)


def run(command: list[str], cwd: str | None = None) -> str:
    """Run `command` and return its standard output; raise with its standard error when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()}")
    return done.stdout
