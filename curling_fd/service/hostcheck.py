"""What `curlingctl doctor` says of a host, whatever VMs it has: here, and to the other host over the link."""

from __future__ import annotations

import os
import time
from pathlib import Path

from attrs import frozen

from curling_fd.service.config import DaemonConfig
from curling_fd.system.platform import hardware_clock, kvm_problem, missing_modules
from curling_fd.units import format_size

#: Free bytes a directory of ours must have. What is written there is tiny, but it must be written: a
#: generation to `state_directory`, sockets and what QEMU puts beside them to `runtime_directory`.
ROOM = 1 << 20

#: Free inodes it must have: a standby makes a directory and a handful of sockets.
_INODES = 32

#: What holds a guest's packets until their checkpoint is committed, with output = "plug".
_HOLDING = ("sch_plug", "ifb", "sch_ingress", "cls_matchall", "act_mirred")

_DAY = 86400.0


@frozen
class Check:
    """One finding. `status` is `ok`, `warning` or `failed`; `remedy` says what to do.

    Attributes:
        vm: the VM it is about, None where it is about a host.
    """

    check: str
    vm: str | None
    status: str
    message: str
    remedy: str = ""


def check_host(config: DaemonConfig) -> list[Check]:
    """Look at this host; changes nothing."""
    return [
        _kvm(),
        _modules(),
        _directory("state directory", "state_directory", config.state_directory),
        _directory("runtime directory", "runtime_directory", config.runtime_directory),
        _clock(config),
        _link(config),
    ]


def _kvm() -> Check:
    problem = kvm_problem()
    if problem is None:
        return Check("kvm", None, "ok", "/dev/kvm can be used")
    remedy = (
        "load kvm_intel or kvm_amd, or switch virtualization on in the firmware (in a VM: nested); without "
        "it VMs are slow, and a VM that runs with KVM on the other host cannot be taken over here"
    )
    return Check("kvm", None, "warning", problem, remedy)


def _modules() -> Check:
    missing = missing_modules(_HOLDING)
    if missing == ():
        return Check("kernel modules", None, "ok", f"{', '.join(_HOLDING)} can be had")
    what = (
        "whether they can be had is not known" if missing is None else f"{', '.join(missing)} cannot be had"
    )
    remedy = (
        "without them packets are held in QEMU, which needs network cards without vhost; install the modules "
        "of the running kernel (Debian: linux-image-amd64 has them)"
    )
    return Check("kernel modules", None, "warning", f"for holding packets in the kernel: {what}", remedy)


def _directory(check: str, key: str, directory: str) -> Check:
    try:
        room = os.statvfs(directory)
    except OSError as error:
        message = f"{directory} cannot be looked at: {error.strerror}"
        return Check(
            check, None, "failed", message, f"make it, or set `{key}` to another place; restart curlingd"
        )
    free = room.f_bavail * room.f_frsize
    if room.f_flag & os.ST_RDONLY or not os.access(directory, os.W_OK | os.X_OK):
        message = f"{directory} cannot be written"
        return Check(check, None, "failed", message, f"make it writable, or set `{key}` to another place")
    # A file system that makes inodes as it goes says that it has none at all.
    few_inodes = room.f_files > 0 and room.f_favail < _INODES
    if free < ROOM or few_inodes:
        what = "inodes" if few_inodes else "space"
        message = f"{directory} is full: {format_size(free)} and {room.f_favail} inodes are free"
        remedy = f"free some {what} there ('df -h {directory}', 'df -i {directory}' show the file system)"
        return Check(check, None, "failed", message, remedy)
    return Check(check, None, "ok", f"{directory} can be written, {format_size(free)} free")


def _clock(config: DaemonConfig) -> Check:
    problem = clock_problem(time.time(), _newest_file(Path(config.state_directory)), hardware_clock())
    if problem is None:
        return Check("clock", None, "ok", f"the clock says {_date(time.time())}")
    remedy = "set it and have it kept right ('timedatectl', systemd-timesyncd or chrony)"
    return Check("clock", None, "warning", problem, remedy)


def clock_problem(now: float, newest: float, hardware: int | None) -> str | None:
    """What shows that the clock, at `now`, is more than a day off; all are seconds since the Unix epoch.

    Args:
        newest: when a file here was written last by the clock there was then.
        hardware: what the battery-backed clock says.
    """
    if now < newest - _DAY:
        return f"the clock says {_date(now)}, but files here were written on {_date(newest)}"
    if hardware is not None and abs(now - hardware) > _DAY:
        return f"the clock says {_date(now)}, the battery-backed one {_date(hardware)}"
    return None


def _newest_file(directory: Path) -> float:
    """When a file of ours was written last: in `directory`, or the program itself."""
    times = [0.0]
    for path in (Path(__file__), *directory.glob("*.json")):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


def _link(config: DaemonConfig) -> Check:
    listen = config.listen
    loopback = listen.host in ("localhost", "::1") or listen.host.startswith("127.")
    if config.insecure:
        remedy = "use it only on a network of which both ends and all between are trusted"
        return Check("link", None, "warning", f"links at {listen} are not encrypted", remedy)
    if loopback:
        remedy = "set `listen` to this host's address and, until links are encrypted, `insecure = true`"
        return Check("link", None, "warning", f"only this host itself can reach {listen}", remedy)
    remedy = "until links are encrypted, say `insecure = true`"
    return Check("link", None, "failed", f"links from other hosts to {listen} are refused", remedy)
