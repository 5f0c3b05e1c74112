"""Making a QEMU that emulates its CPU report every write again at the end of a first pass.

QEMU moves the dirty bits of guest memory into its migration's bitmap, and then has the emulated CPU report
the next write to those pages; but, it seems, not when all of them are in it already. For an idle guest the
last two times, right before and right after it is stopped, are often like that, and the pages that are
written most go unreported. A migration is over by then. A checkpoint loop goes on, and its first checkpoint
lacks them: seen on 11.1.3, in one session of ten, 1 to 17 pages. KVM has a log of its own, and lacked none.

What the CPU may write without a report is in its translation cache, and switching the A20 gate empties that:
none was lacking in 180 sessions. It does so for the first CPU only: with two, 2 sessions of 60 lacked pages.
"""

from __future__ import annotations

from curling_fd.qmp.client import QmpClient

_GATE_PORT = 0x92
_GATE_BIT = 0x02

#: What is read from a port that the machine does not have.
_NO_PORT = 0xFF


async def report_all_writes(qmp: QmpClient) -> None:
    """Empty the translation cache. The guest stands still, and finds the gate as it left it."""
    said = await _hmp(qmp, f"i /b {_GATE_PORT:#x}")
    value = int(said.rpartition("=")[2], 16)
    if value != _NO_PORT:
        await _hmp(qmp, f"o /b {_GATE_PORT:#x} {value ^ _GATE_BIT:#x}")
        await _hmp(qmp, f"o /b {_GATE_PORT:#x} {value:#x}")


async def _hmp(qmp: QmpClient, command: str) -> str:
    return str(await qmp.execute("human-monitor-command", {"command-line": command}))
