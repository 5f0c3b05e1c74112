"""The machine the numbers come from: what it is, and what else was running on it meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from attrs import frozen

_TICK = os.sysconf("SC_CLK_TCK")

#: CPUs' worth of foreign work up to which a measurement counts as undisturbed.
QUIET = 0.10

#: Seconds to wait for quiet before one measurement, and before all of them together.
_PATIENCE, _PATIENCE_IN_ALL = 10.0, 90.0
_SAMPLE = 0.2

_waited = 0.0


@frozen
class Usage:
    """CPU seconds since boot: of the whole machine, and of this process with all that it started."""

    at: float
    busy: float
    ours: float

    @classmethod
    def now(cls) -> Usage:
        """The usage now."""
        numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = numbers
        busy = user + nice + system + irq + softirq + steal
        return cls(time.monotonic(), busy / _TICK, _tree(os.getpid()) / _TICK)

    def foreign_since(self, before: Usage) -> float:
        """CPUs' worth of work that was not ours since `before`."""
        elapsed = max(self.at - before.at, 0.01)
        return max(0.0, (self.busy - before.busy) - (self.ours - before.ours)) / elapsed


def wait_quiet() -> bool:
    """Wait until little else runs on the machine; False if that did not come about in time."""
    global _waited
    start = time.monotonic()
    before = Usage.now()
    while True:
        time.sleep(_SAMPLE)
        after = Usage.now()
        if after.foreign_since(before) <= QUIET:
            return True
        if after.at - start > min(_PATIENCE, _PATIENCE_IN_ALL - _waited):
            _waited += after.at - start
            return False
        before = after


def describe() -> dict[str, Any]:
    """The machine, for the report."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = Path("/proc/meminfo").read_text().split()[1]
    gcc = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory) / (1 << 20), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gcc": gcc,
    }


def _tree(root: int) -> int:
    """Ticks of `root` and all its descendants, of those that have ended as far as they were waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])
    total = 0
    for pid in parents:
        at = pid
        while at not in (0, root):
            at = parents.get(at, 0)
        if at == root:
            total += ticks[pid]
    return total
