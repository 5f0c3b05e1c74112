"""How much memory this host can still give.

Sources: proc(5) for MemAvailable, the kernel's admin-guide/cgroup-v2 for the files of a control group. A
memfd counts as shared memory of the control group that first touches it, so a limit on curlingd's unit
binds too.
"""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int:
    """Bytes that can be had now without swapping, within the host and every control group we are in."""
    found: list[int | None] = [_host(proc / "meminfo"), *map(_group, _groups(proc, cgroups))]
    return max(0, min(left for left in found if left is not None))


def killed_for_memory(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int:
    """How many processes of our control group the kernel has killed because memory was short."""
    for group in _groups(proc, cgroups):
        try:
            events = (group / "memory.events").read_text(encoding="ascii").splitlines()
        except OSError:
            break
        return sum(int(line.split()[1]) for line in events if line.startswith("oom_kill "))
    return 0


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """The control group of version 2 that we are in, and those around it."""
    for line in (proc / "self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        # The one hierarchy of version 2 has no controllers in its line.
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            group = cgroups / path.lstrip("/")
            return [folder for folder in (group, *group.parents) if folder.is_relative_to(cgroups)]
    return []


def _host(meminfo: Path) -> int:
    for line in meminfo.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return 0


def _group(folder: Path) -> int | None:
    """Bytes below this group's limit, counting its page cache as free; None where there is no limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # As MemAvailable does for the host: file pages on the inactive list cost nothing to have back.
    cache = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    return int(limit) - used + cache
