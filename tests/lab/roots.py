"""QEMU builds: the system's, or those of other Debian releases out of a debootstrapped root folder.

A QEMU from a root folder runs without chroot. A copy of its program gets that root's own dynamic loader and
library path written into it, and a two-line script adds where its firmware is. So it is one executable that
sees our sockets, inherited file descriptors and files, is a direct child with the pid we spawned, and has
the command line of any QEMU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from attrs import frozen

from .cache import cache_root, digest, made
from .debs import run

SUITES = ("bookworm", "trixie", "unstable")
_PROGRAM = "qemu-system-x86_64"


@frozen
class Executable:
    """A QEMU that can be run: `path` is all that is needed. `version` is (major, minor, micro)."""

    path: str
    version: tuple[int, int, int]
    banner: str

    @property
    def argv(self) -> list[str]:
        """The start of a command line."""
        return [self.path]


def qemu_root(suite: str) -> Path:
    """The folder of `suite` with qemu-system-x86 in it, made by debootstrap (as root) when missing."""
    return _root(suite, "qemu-system-x86", f"roots/{suite}")


def _tools_root(suite: str) -> Path:
    # A root of its own: to add to one that others run programs out of would not be safe.
    return _root(suite, "qemu-utils", f"roots/{suite}-utils")


def _root(suite: str, package: str, key: str) -> Path:
    if suite not in SUITES:
        raise ValueError(f"no such suite: {suite}")

    def make(target: Path) -> None:
        run(["debootstrap", "--variant=minbase", f"--include={package}", suite, str(target)])

    return made(key, make)


def qemu_binary(which: str = "system") -> Executable:
    """The QEMU `which`: "system", one of SUITES, or the path or name of a program."""
    if which in SUITES:
        return executable(str(_relocated(qemu_root(which))))
    return executable(_PROGRAM if which == "system" else which)


def qemu_tool(name: str, which: str = "system") -> str:
    """The path of one of QEMU's tools (qemu-img, qemu-io, ...): "system"'s, or that of one of SUITES."""
    if which in SUITES:
        return str(_relocated(_tools_root(which), name))
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"there is no {name}: run `make setup`")
    return found


def executable(path: str) -> Executable:
    """`path` (or a name to look up in PATH) as an Executable, after asking it for its version."""
    found = shutil.which(path)
    if found is None:
        raise RuntimeError(f"there is no QEMU at {path}: run `make setup`")
    done = subprocess.run([found, "-version"], capture_output=True, text=True)
    match = re.match(r"QEMU emulator version (\d+)\.(\d+)\.(\d+).*", done.stdout)
    if match is None:
        raise RuntimeError(f"{path} -version is not QEMU's answer: {done.stdout}{done.stderr}")
    major, minor, micro = (int(number) for number in match.groups())
    return Executable(path=str(Path(found).absolute()), version=(major, minor, micro), banner=match.group(0))


def _relocated(root: Path, name: str = _PROGRAM) -> Path:
    """The script that runs `name` of `root`. The place of `root` is written into it, and into its name."""

    def make(target: Path) -> None:
        target.mkdir()
        program = target / name
        shutil.copy2(root / "usr/bin" / name, program)
        # RPATH and not RUNPATH: only the former also holds for the libraries' own libraries.
        patch = ["patchelf", "--force-rpath", "--set-rpath", str(root / "usr/lib/x86_64-linux-gnu")]
        run([*patch, "--set-interpreter", str(root / "lib64/ld-linux-x86-64.so.2"), str(program)])
        # The tools know no firmware.
        folders = ("qemu", "seabios") if name == _PROGRAM else ()
        firmware = " ".join(f"-L '{root}/usr/share/{folder}'" for folder in folders)
        script = target / "curling-qemu"
        script.write_text(
            "#!/bin/sh\n"
            f"export QEMU_MODULE_DIR='{root}/usr/lib/x86_64-linux-gnu/qemu'\n"
            f"exec '{final / name}' {firmware} \"$@\"\n"
        )
        script.chmod(0o755)

    kind = "qemu" if name == _PROGRAM else name
    key = f"{kind}/{root.name}-{digest(str(root), Path(__file__))}"
    final = cache_root() / key
    return made(key, make) / "curling-qemu"
