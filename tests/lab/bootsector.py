"""The boot-sector guest: 512 bytes of real mode, assembled from bootsector.S; also an option ROM."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from .cache import digest, made
from .debs import run

_SOURCE = Path(__file__).with_name("bootsector.S")
_KVM_GET_API_VERSION = 0xAE00


def boot_sector(report_ms: int = 200, ticks: int = 10) -> Path:
    """The image of the guest: of a disk, or of an option ROM. `ticks`: milliseconds between its rounds."""
    symbols = {"REPORT_MS": report_ms, "TICKS": ticks}
    key = f"bootsector/{digest(_SOURCE, repr(symbols))}.img"
    return made(key, lambda target: _assemble(symbols, target))


def _assemble(symbols: dict[str, int], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        parts, linked = f"{folder}/bootsector.o", Path(folder) / "bootsector"
        defined = [f"--defsym={name}={value}" for name, value in symbols.items()]
        run(["as", "--32", *defined, "-o", parts, str(_SOURCE)])
        run(["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary", "-o", str(linked), parts])
        image = bytearray(linked.read_bytes())
    # The bytes of an option ROM add up to 0.
    image[-1] = -sum(image[:-1]) % 256
    target.write_bytes(image)


def has_kvm() -> bool:
    """Whether there is a /dev/kvm that answers us. Which guests it can run is another matter."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, _KVM_GET_API_VERSION) == 12
    except OSError:
        return False
    finally:
        os.close(fd)
