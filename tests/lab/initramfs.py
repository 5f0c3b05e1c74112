"""The initramfs of the lab's Linux guest: busybox, drivers, /init and the program of guest*.c."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cache import digest, made
from .debs import run, unpacked
from .kernel import Kernel, module_files

_HERE = Path(__file__).parent

_PROGRAM = [_HERE / "guest.c", _HERE / "guest_disk.c"]

SOURCES = (*_PROGRAM, _HERE / "guest.h", _HERE / "init.sh", Path(__file__))
"""What goes into every archive."""

_DRIVERS = {
    "virtio": ["virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon"],
    "pvpanic-pci": ["pvpanic_pci"],
    "pvpanic-mmio": ["pvpanic_mmio"],
}


def initramfs(kernel: Kernel) -> Path:
    """The uncompressed archive for `kernel`: an emulated CPU would take longer to unpack a compressed one."""
    key = f"initramfs/{kernel.release}-{digest(*SOURCES)}.cpio"
    return made(key, lambda target: _build(kernel, target))


def _build(kernel: Kernel, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        base_tree(kernel, Path(folder))
        pack(Path(folder), target)


def base_tree(kernel: Kernel, tree: Path) -> None:
    """Put everything that the guest needs to run its own program into the folder `tree`."""
    for name in ("bin", "dev", "proc", "sys", "modules"):
        (tree / name).mkdir()
    (tree / "bin/busybox").write_bytes(_busybox().read_bytes())
    (tree / "init").write_bytes((_HERE / "init.sh").read_bytes())
    compile_static(_PROGRAM, tree / "guest")
    for program in ("bin/busybox", "init", "guest"):
        (tree / program).chmod(0o755)
    for group, names in _DRIVERS.items():
        files = module_files(kernel, names)
        for name, data in files:
            (tree / "modules" / f"{name}.ko").write_bytes(data)
        (tree / "modules" / group).write_text("".join(f"{name}.ko\n" for name, _ in files))


def compile_static(sources: Sequence[Path], program: Path) -> None:
    """Compile `sources` into a static `program`."""
    flags = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-s"]
    run(["gcc", *flags, "-o", str(program), *map(str, sources)])


def _busybox() -> Path:
    files = unpacked("busybox-static")
    # Below /usr from Debian 13 on.
    (program,) = [path for path in (files / "bin/busybox", files / "usr/bin/busybox") if path.exists()]
    return program


def pack(tree: Path, target: Path) -> None:
    """Make the archive `target` of what is below `tree`, everything owned by root."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    with target.open("wb") as archive:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "--reproducible"],
            input="\n".join(names).encode(),
            stdout=archive,
            cwd=tree,
            check=True,
        )
