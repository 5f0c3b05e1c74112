"""The numbers of docs/performance.md: `python -m bench`, some eighteen minutes, into build/bench.json.

    python -m bench                     everything
    python -m bench --parts stops       some of: stops commit sockets failover network idle
    python -m bench --docs              build/bench.json into docs/performance.md

Needs what the tests need (`make setup`): QEMU 11 out of Debian unstable, gcc, socat.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench import bulk, network, transfer
from bench.daemons import MAX_CHECKPOINT, Curling, Failovers, idle_rate
from bench.machine import Usage, describe, wait_quiet
from bench.report import document, summary
from bench.rounds import LOADS, run_rounds
from bench.stops import EngineAlone, Floor, Stock, Variant, primary
from tests.lab.hosts import termination_as_interrupt
from tests.lab.roots import Executable, qemu_binary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build" / "bench.json"
DOCUMENT = ROOT / "docs" / "performance.md"

PARTS = ("commit", "sockets", "failover", "network", "idle", "stops")

_GIB = 1 << 30
_PAGES_PER_GIB = _GIB // 4096

#: How often each way of holding packets is measured, in turn.
_NETWORK_ROUNDS = 3

#: Failovers of each size: a single one takes 7 to 12 ms.
_FAILOVERS = 9


def say(text: str) -> None:
    """Progress, for people."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", flush=True)


_STARTED = time.monotonic()


def measure_commit() -> dict[str, Any]:
    """What a backup takes, stage by stage and whole, next to the machine's own limits."""
    result: dict[str, Any] = {"memcpy_gb_per_s": transfer.middle(transfer.memcpy, 3)}
    say(f"memcpy {result['memcpy_gb_per_s']:.1f} GB/s")
    for block in (8192, 1 << 20):
        result[f"socat_{block}_gb_per_s"] = transfer.middle(partial(transfer.socat, _GIB, block), 3)
        say(f"socat -b {block}: {result[f'socat_{block}_gb_per_s']:.2f} GB/s")
    rows = []
    for pages in (250, 1000, 10_000, 30_000):
        wait_quiet()
        whole = transfer.middle(partial(transfer.commit, pages, _GIB), 5, key=lambda r: r["gb_per_s"])
        rows.append({"pages": pages, **whole, "stages_gb_per_s": transfer.stages(pages)})
        say(f"commit of {pages} pages: {whole['gb_per_s']:.2f} GB/s, {whole['cpu_s_per_gb']:.2f} CPU s/GB")
    return result | {"rows": rows}


def measure_sockets() -> list[dict[str, Any]]:
    """splice against recv_into, on the backup's TCP socket and on QEMU's UNIX socket."""
    rows = []
    for where, measure in (("receive", transfer.receiver), ("capture", transfer.capture)):
        for frame in (4 << 20, 40 << 20):
            for how in ("splice", "recv_into"):
                wait_quiet()
                found = transfer.middle(partial(measure, how, _GIB, frame), 5, key=lambda r: r["gb_per_s"])
                rows.append({"where": where, "how": how, "frame_mb": frame >> 20, **found})
                say(f"{where} {frame >> 20} MiB by {how}: {found['gb_per_s']:.2f} GB/s")
    return rows


async def measure_failover(qemu: Executable) -> list[dict[str, Any]]:
    """From the decision to the running guest, for a small VM and one with 4 GiB, two of them in use."""
    machines = [Failovers("256M", _PAGES_PER_GIB // 8), Failovers("4G", 2 * _PAGES_PER_GIB)]
    for _ in range(_FAILOVERS):
        # In turn, for what disturbs one is likely to disturb the next one too.
        for machine in machines:
            await machine.once_more(qemu)
            say(f"failover with {machine.memory}: {machine.reported[-1]} ms")
    return [machine.row() for machine in machines]


async def measure_network(qemu: Executable) -> dict[str, dict[str, Any]]:
    """Round trips through a protected guest and a stream out of it, for each pace."""
    found = {name: (network.Trips(), bulk.Flow()) for name in network.VARIANTS}
    for _ in range(_NETWORK_ROUNDS):
        for name, (trips, flow) in found.items():
            wait_quiet()
            await network.once_more(qemu, name, trips, flow)
            speed = flow.row()["mb_per_s"]
            say(f"network, {name}: round trip {trips.row()['p50_ms']:.2f} ms, stream {speed:.1f} MB/s")
    return {name: trips.row() | {"bulk": flow.row()} for name, (trips, flow) in found.items()}


async def measure(
    parts: list[str], qemu: Executable, budget: float, keep: Callable[[str, Any], None]
) -> None:
    """Measure part by part; each result is handed to `keep`."""
    if "commit" in parts:
        keep("commit", await trio.to_thread.run_sync(measure_commit))
    if "sockets" in parts:
        keep("sockets", await trio.to_thread.run_sync(measure_sockets))
    if "failover" in parts:
        keep("failover", await measure_failover(qemu))
    if "network" in parts:
        keep("network", await measure_network(qemu))
    if "idle" in parts or "stops" in parts:
        async with primary(qemu) as bench:
            if "idle" in parts:
                found = await idle_rate(bench, 5.0)
                keep("idle", found)
                say(f"idle: {found['checkpoints_per_s']:.0f} checkpoints/s")
            if "stops" in parts:
                variants: list[Variant] = [Floor(), EngineAlone(), Curling(), Stock()]
                left = budget - (time.monotonic() - _STARTED)
                keep("stops", await run_rounds(bench, LOADS, variants, left, say))


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures Curling.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--qemu", default="unstable", help="see tests/lab/roots.py; 11 or later")
    parser.add_argument("--budget", type=float, default=1000, help="seconds for all of it, about")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only write docs/performance.md from --output")
    options = parser.parse_args()
    if options.docs:
        DOCUMENT.write_text(document(json.loads(options.output.read_text())))
        return 0
    qemu = qemu_binary(options.qemu)
    result: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    result |= {"machine": describe(), "qemu": qemu.banner, "max_checkpoint": MAX_CHECKPOINT}
    options.output.parent.mkdir(exist_ok=True)
    before = Usage.now()

    def keep(part: str, found: Any) -> None:
        """Write what is known so far: a later part may fail."""
        nonlocal before
        now = Usage.now()
        result[part] = found
        result["foreign_cpus"] = result.get("foreign_cpus", {}) | {part: round(now.foreign_since(before), 2)}
        result["seconds"] = result.get("seconds", {}) | {part: round(now.at - before.at, 1)}
        before = now
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    with termination_as_interrupt():
        trio.run(measure, options.parts, qemu, options.budget, keep)
    print(summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
