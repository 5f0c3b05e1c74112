"""The results as people read them: a summary on the terminal, and docs/performance.md.

The text around the numbers is in performance.md.in, with a {name} for each table and number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.figures import median, percentile
from curling_fd.capture.intake import PIECE
from curling_fd.link.frames import HEAD_SIZE
from curling_fd.units import parse_size

_TEMPLATE = Path(__file__).with_name("performance.md.in")

#: The targets: stop time against the floor, against stock COLO, bytes a second, failover, rate; what is added
#: to a round trip in ms, checkpoints a second while requests flow, CPUs at rest.
FLOOR_TARGET = 1.10
STOCK_TARGETS = {"30k": 0.85}
STOCK_TARGET = 0.75
COMMIT_TARGET = 1.0
FAILOVER_TARGET = 100.0
SIZE_TARGET = 1.2
RATE_TARGET = 100.0
LATENCY_TARGET = 6.0
FLOWING_TARGET = 80.0
IDLE_CPU_TARGET = 0.03

_VARIANTS = {
    "curling": "Curling",
    "engine": "its engine alone",
    "floor": "floor (C)",
    "stock": "stock COLO",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def stops(results: dict[str, Any]) -> str:
    """Stop times."""
    rows = []
    for load in results["stops"]:
        for name, title in _VARIANTS.items():
            row = load["variants"][name]
            rows.append(
                [
                    load["load"],
                    title,
                    f"{row['pages_p50']:.0f}",
                    f"{row['stop_ms_p50']:.2f}",
                    f"{row['stop_ms_p99']:.2f}",
                    str(row["checkpoints"]),
                ]
            )
    return table(["load", "peer", "pages", "p50 ms", "p99 ms", "checkpoints"], rows)


def ratios(results: dict[str, Any]) -> str:
    """Ratios of stop times, each with what it should be."""
    rows = []
    for load in results["stops"]:
        stock = STOCK_TARGETS.get(load["load"], STOCK_TARGET)
        for pair, target in (("curling/floor", FLOOR_TARGET), ("curling/stock", stock)):
            found = load["ratios"][pair]
            span = f"{found['least']:.2f} to {found['most']:.2f}"
            rows.append(
                [
                    load["load"],
                    pair,
                    f"{found['median']:.2f}",
                    span,
                    f"± {found['spread']:.0%}",
                    str(load["rounds"]),
                    f"{target:.2f}",
                    _met(found["median"] <= target),
                ]
            )
    head = ["load", "ratio", "median", "of single rounds", "quartiles", "rounds", "at most", ""]
    return table(head, rows)


def commit(results: dict[str, Any]) -> str:
    """Backup commit."""
    found = results["commit"]
    rows = [
        [
            f"commit of {row['pages']} pages ({row['checkpoint_mb']:.1f} MB)",
            f"{row['gb_per_s']:.2f}",
            f"{row['cpu_s_per_gb']:.2f}",
            ", ".join(f"{name} {speed:.1f}" for name, speed in row["stages_gb_per_s"].items()),
        ]
        for row in found["rows"]
    ]
    rows += [
        ["`socat -b 8192` into /dev/null", f"{found['socat_8192_gb_per_s']:.2f}", "", ""],
        ["`socat -b 1048576` into /dev/null", f"{found['socat_1048576_gb_per_s']:.2f}", "", ""],
        ["memcpy", f"{found['memcpy_gb_per_s']:.1f}", "", ""],
    ]
    return table(["what", "GB/s", "CPU s/GB", "single stages, GB/s"], rows)


def sockets(results: dict[str, Any]) -> str:
    """splice against recv_into."""
    names = {"receive": "backup, from TCP", "capture": "primary, from QEMU's UNIX socket"}
    rows = [
        [
            names[row["where"]],
            f"{row['frame_mb']}",
            row["how"],
            f"{row['gb_per_s']:.2f}",
            f"{row['cpu_s_per_gb']:.2f}",
        ]
        for row in results["sockets"]
    ]
    return table(["where", "MiB a frame", "how", "GB/s", "CPU s/GB"], rows)


def failover(results: dict[str, Any]) -> str:
    """From the decision to the running guest."""
    rows = [
        [
            row["ram"],
            str(row["used_mib"]),
            _list(row["failover_ms"]),
            _list(row["ordered_ms"]),
            f"{median(row['first_pass_ms']) / 1000:.1f}",
        ]
        for row in results["failover"]
    ]
    head = ["RAM", "MiB in use", "decision to running, ms", "command to RESUME, ms", "first pass, s"]
    return table(head, rows)


def daemons(results: dict[str, Any]) -> str:
    """CPU and memory of the daemons, by load."""
    rows = []
    for load in results["stops"]:
        details = load["variants"]["curling"]["details"]
        rows.append(
            [
                load["load"],
                f"{details['rate']:.1f}",
                f"{details['primary_cpu_s_per_gb']:.2f}",
                f"{details['backup_cpu_s_per_gb']:.2f}",
                *(
                    f"{details[f'{side}_{kind}'] / 1e6:.0f}"
                    for side in ("primary", "backup")
                    for kind in ("peak", "memfds")
                ),
            ]
        )
    head = [
        "load",
        "checkpoints/s",
        "primary CPU s/GB",
        "backup CPU s/GB",
        "primary peak MB",
        "its memfds MB",
        "backup peak MB",
        "its memfds MB",
    ]
    return table(head, rows)


def bounds(results: dict[str, Any]) -> str:
    """What the memory is held against."""
    limit, ram = parse_size(results["max_checkpoint"]), 512 << 20
    primary = 2 * limit + 4 * PIECE
    backup = ram + 2 * (limit + HEAD_SIZE)
    return (
        f"With `max_checkpoint = {results['max_checkpoint']}` and `buffers = 2` the memfds cannot pass "
        f"{primary / 1e6:.0f} MB on the primary (two capture buffers, four pieces of a first pass) and "
        f"{backup / 1e6:.0f} MB on the backup (the image, two staging buffers)."
    )


def idle(results: dict[str, Any]) -> str:
    """The highest rate."""
    found = results["idle"]
    return (
        f"{found['checkpoints_per_s']:.0f} checkpoints a second of {found['pages_p50']:.0f} pages, the guest "
        f"stopped {found['stop_ms_p50']:.2f} ms for each (p99 {found['stop_ms_p99']:.2f} ms); the primary's "
        f"daemon uses {found['primary_cpus']:.2f} CPUs, the backup's {found['backup_cpus']:.2f}."
    )


def targets(results: dict[str, Any]) -> str:
    """Every target and whether it is met."""
    rows: list[list[str]] = []
    for load in results.get("stops", []):
        stock = STOCK_TARGETS.get(load["load"], STOCK_TARGET)
        for other, target in (("floor", FLOOR_TARGET), ("stock", stock)):
            found = load["ratios"][f"curling/{other}"]["median"]
            name = f"stop time against {_VARIANTS[other]}, {load['load']} pages"
            rows.append([name, f"{found:.2f}", f"at most {target:.2f}", _met(found <= target)])
    for row in results.get("commit", {}).get("rows", []):
        speed, name = row["gb_per_s"], f"backup commit, {row['pages']} pages"
        least = f"at least {COMMIT_TARGET:.0f}"
        rows.append([name, f"{speed:.2f} GB/s", least, _met(speed >= COMMIT_TARGET)])
    if "failover" in results:
        small, large = (median(row["failover_ms"]) for row in results["failover"])
        most = f"at most {FAILOVER_TARGET:.0f}"
        rows.append(["failover, 256 MiB", f"{small:.0f} ms", most, _met(small <= FAILOVER_TARGET)])
        ratio, name = large / small, "failover, 4 GiB against 256 MiB"
        rows.append([name, f"{ratio:.2f}", f"at most {SIZE_TARGET}", _met(ratio <= SIZE_TARGET)])
    if "network" in results:
        found = results["network"]
        added = found["default pace"]["p50_ms"] - found["unprotected"]["p50_ms"]
        most = f"at most {LATENCY_TARGET:.0f} ms"
        rows.append(["added to a round trip", f"{added:.1f} ms", most, _met(added <= LATENCY_TARGET)])
        rate, least = found["default pace"]["checkpoints_per_s"], f"at least {FLOWING_TARGET:.0f}"
        name = "checkpoints a second while requests flow"
        rows.append([name, f"{rate:.0f}", least, _met(rate >= FLOWING_TARGET)])
        cpu, most = found["default pace"]["idle_cpu"], f"under {IDLE_CPU_TARGET:.0%}"
        rows.append(["CPU of both daemons at rest", f"{cpu:.1%}", most, _met(cpu < IDLE_CPU_TARGET)])
    if "idle" in results:
        rate, least = results["idle"]["checkpoints_per_s"], f"at least {RATE_TARGET:.0f}"
        rows.append(["checkpoints a second, idle", f"{rate:.0f}", least, _met(rate >= RATE_TARGET)])
    return table(["what", "measured", "target", ""], rows)


def network(results: dict[str, Any]) -> str:
    """Round trips through a protected guest."""
    alone = results["network"]["unprotected"]["p50_ms"]
    rows = []
    for name, row in results["network"].items():
        rows.append(
            [
                name,
                row["backend"] or "",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['p50_ms'] - alone:.2f}",
                _number(row["checkpoints_per_s"], 0),
                _number(row["stop_ms_p50"], 2),
                f"{row['lost']} of {row['requests']}",
                "" if row["idle_cpu"] is None else f"{row['idle_cpu']:.1%}",
            ]
        )
    head = [
        "pace",
        "held by",
        "p50 ms",
        "p99 ms",
        "added, p50 ms",
        "checkpoints/s",
        "stop p50 ms",
        "lost",
        "CPU at rest",
    ]
    return table(head, rows)


def bulk(results: dict[str, Any]) -> str:
    """A stream out of a protected guest."""
    if "bulk" not in results["network"]["unprotected"]:
        return "Not measured yet."
    alone = results["network"]["unprotected"]["bulk"]["mb_per_s"]
    rows = []
    for name, row in results["network"].items():
        found = row["bulk"]
        still = found["still"]
        rows.append(
            [
                name,
                row["backend"] or "",
                f"{found['mb_per_s']:.1f}",
                f"{found['mb_per_s'] / alone:.0%}",
                "" if still is None else f"{still:.0%}",
                "" if still is None else f"{found['mb_per_s'] / (1 - still) / alone:.0%}",
                _number(found["checkpoints_per_s"], 0),
                "" if still is None else _kib(found["mb_per_s"] * 1e6 / max(found["checkpoints_per_s"], 1)),
                "" if still is None else _kib(found["checkpoint_bytes"]),
            ]
        )
    head = [
        "pace",
        "held by",
        "MB/s",
        "of unprotected",
        "guest stands still",
        "while it runs, of unprotected",
        "checkpoints/s",
        "KiB sent in an epoch",
        "KiB of a checkpoint",
    ]
    return table(head, rows)


def _kib(size: float) -> str:
    return f"{size / 1024:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def machine(results: dict[str, Any]) -> str:
    """Where the numbers come from."""
    found = results["machine"]
    foreign = ", ".join(f"{part} {cpus:.2f}" for part, cpus in results["foreign_cpus"].items())
    return (
        f"{found['cpus']} CPUs ({found['cpu']}), {found['memory_gib']} GiB, Linux {found['kernel']}, Python "
        f"{found['python']}, {results['qemu']} under TCG. While a part was measured, programs that do "
        f"not belong to it used, of these CPUs, on average: {foreign}."
    )


def document(results: dict[str, Any]) -> str:
    """docs/performance.md."""
    parts = {
        "machine": machine,
        "targets": targets,
        "stops": stops,
        "ratios": ratios,
        "commit": commit,
        "sockets": sockets,
        "failover": failover,
        "network": network,
        "bulk": bulk,
        "daemons": daemons,
        "bounds": bounds,
        "idle": idle,
    }
    text = _TEMPLATE.read_text()
    for name, make in parts.items():
        text = text.replace(f"{{{name}}}", make(results))
    return text


def summary(results: dict[str, Any]) -> str:
    """What was asked and what came out."""
    return f"{targets(results)}\n\n{machine(results)}\n{sum(results['seconds'].values()):.0f} s in all"


def _met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def _list(values: Sequence[float]) -> str:
    return f"{median(values):.0f} ({percentile(values, 0):.0f} to {max(values):.0f})"
