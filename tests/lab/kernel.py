"""The kernel the Linux guests boot: this distribution's own, taken out of its package."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from pathlib import Path

from attrs import frozen

from .cache import made
from .debs import depended_on, distribution, refresh_lists, unpacked

_XZ_MAGIC = b"\xfd7zXZ\0"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@frozen
class Kernel:
    """`image` is what `-kernel` gets, `modules` the folder of its release in /lib/modules."""

    release: str
    image: Path
    modules: Path


def kernel() -> Kernel:
    """The kernel of linux-image-amd64, chosen once per distribution release and then kept."""
    name = made(f"kernel/{distribution()}.package", _choose).read_text()
    files = unpacked(name)
    (packed,) = files.glob("boot/vmlinuz-*")
    release = packed.name.removeprefix("vmlinuz-")
    image = made(f"kernel/{distribution()}-{release}.image", lambda target: unpack_image(packed, target))
    # From Debian 13 on the package has its modules below /usr.
    (modules,) = [*files.glob(f"lib/modules/{release}"), *files.glob(f"usr/lib/modules/{release}")]
    return Kernel(release=release, image=image, modules=modules)


def module_files(kernel: Kernel, names: list[str]) -> list[tuple[str, bytes]]:
    """Name and uncompressed contents of each of `names` and all they need, in the order of loading.

    A name that is in no file is built into the kernel and left out.
    """
    paths: dict[str, Path] = {}
    for path in kernel.modules.glob("kernel/**/*.ko*"):
        paths[path.name.split(".")[0].replace("-", "_")] = path
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in ordered or name not in paths:
            return
        data = paths[name].read_bytes()
        if data.startswith(_XZ_MAGIC):
            data = lzma.decompress(data)
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in found.group(1).decode().split(",") if found else []:
            if needed:
                add(needed)
        ordered[name] = data

    for name in names:
        add(name)
    return list(ordered.items())


def _choose(target: Path) -> None:
    # An old list would name a kernel that cannot be downloaded any more.
    refresh_lists()
    target.write_text(depended_on("linux-image-amd64", "linux-image-"))


def unpack_image(packed: Path, target: Path) -> None:
    """Write the uncompressed ELF kernel, which QEMU boots through its PVH entry.

    An emulated CPU needs seconds to decompress a Debian kernel. Where the payload lies is in the header
    described in the kernel's Documentation/arch/x86/boot.rst; behind it are four bytes with its true size.
    A kernel compressed in another way is used as it is.
    """
    image = packed.read_bytes()
    sectors = image[0x1F1]
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length - 4]
    if payload.startswith(_XZ_MAGIC):
        image = lzma.decompress(payload)
    elif payload.startswith(_ZSTD_MAGIC):
        image = subprocess.run(["zstd", "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    target.write_bytes(image)
