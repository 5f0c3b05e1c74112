"""What this host has that VMs and their protection need: devices, kernel modules, a clock.

Sources: the kernel's virt/kvm/api (KVM_GET_API_VERSION), kmod's modules.builtin(5) and modules.dep(5), and
ABI/testing/sysfs-class-rtc.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable
from pathlib import Path

DEVICES = {
    "kvm": Path("/dev/kvm"),
    "tun": Path("/dev/net/tun"),
    "vhost-net": Path("/dev/vhost-net"),
    "vhost-vsock": Path("/dev/vhost-vsock"),
}
"""Devices a QEMU may need to have on both hosts, by the module that makes them."""

_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12


def kvm_problem(device: Path = DEVICES["kvm"], cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why VMs cannot use KVM here, or None if they can."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        flag = re.search(r"^flags\s*:.*\b(vmx|svm)\b", _text(cpuinfo), re.MULTILINE)
        if flag is None:
            return f"there is no {device}, and the CPU shows no virtualization"
        module = "kvm_intel" if flag[1] == "vmx" else "kvm_amd"
        return f"there is no {device}, though the CPU could: {module} is not loaded"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"{device} is not KVM's: {error.strerror}"
    finally:
        os.close(fd)
    return None if version == _KVM_API_VERSION else f"{device} speaks version {version} of KVM's interface"


def devices() -> frozenset[str]:
    """Those of `DEVICES` that are here. Some make their module load when they are first opened."""
    return frozenset(name for name, path in DEVICES.items() if path.is_char_device())


def missing_modules(
    names: Iterable[str], release: str | None = None, root: Path = Path("/")
) -> tuple[str, ...] | None:
    """Those of the kernel modules `names` that are not built in, not loaded and not to be had.

    Returns:
        None where nobody can tell: the running kernel's modules are not installed here.
    """
    folder = root / "lib/modules" / (os.uname().release if release is None else release)
    listed = _text(folder / "modules.dep") + _text(folder / "modules.builtin")
    known = {_plain(name) for name in re.findall(r"([^/\s]+)\.ko(?:\.\w+)?(?=:|\s)", listed)}
    loaded = root / "sys/module"
    missing = tuple(
        name for name in names if _plain(name) not in known and not (loaded / _plain(name)).is_dir()
    )
    return None if missing and not known else missing


def hardware_clock(clock: Path = Path("/sys/class/rtc/rtc0/since_epoch")) -> int | None:
    """What the battery-backed clock says, in seconds since the Unix epoch; None if there is none.

    Where it is kept in local time, as next to Windows, it is up to 14 hours off.
    """
    text = _text(clock).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _plain(module: str) -> str:
    return module.replace("-", "_")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
