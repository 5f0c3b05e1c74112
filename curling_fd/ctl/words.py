"""What curlingd tells about a VM, as people read it: words, units, ages. No I/O.

The dictionaries are those of the control interface. A daemon of another version may leave a field out: that
is shown as a dash, never an error.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from curling_fd.units import format_duration, format_size

NOTHING = "-"

_STYLES = {
    "protected": "green",
    "standby": "green",
    "connecting": "yellow",
    "syncing": "yellow",
    "preparing": "yellow",
    "filling": "yellow",
    "switching": "yellow",
    "taking-over": "yellow",
    "active": "yellow",
    "ended": "yellow",
    "unprotected": "bold red",
    "holding": "bold red",
    "fenced": "bold red",
    "suspect": "bold red",
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
}


def style_of(word: str) -> str:
    """Return the colour of a state or status; a word we do not know has none."""
    plain, _, held = word.partition(", ")
    return "yellow" if plain == "protected" and held else _STYLES.get(plain, "")


def clean(text: object) -> str:
    """Make foreign text safe for a terminal: no escape sequence gets through."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}"
        for letter in str(text)
    )


def word(value: object) -> str:
    """A value, or the dash for none."""
    return NOTHING if value is None or value == "" else clean(value)


def state(vm: Mapping[str, Any]) -> str:
    """The state, and that the guest is held when it is."""
    return word(vm.get("state")) + (", paused" if vm.get("paused") else "")


def statistic(vm: Mapping[str, Any], name: str) -> Any:
    """One of the statistics, None when there are none."""
    return _numbers(vm).get(name)


def _numbers(vm: Mapping[str, Any]) -> Mapping[str, Any]:
    # Before the first checkpoint there is nothing to tell: zeros would look like a very good VM.
    numbers: Mapping[str, Any] = vm.get("statistics") or {}
    return numbers if numbers.get("checkpoints") or numbers.get("committed") else {}


def milliseconds(value: float | None) -> str:
    """A duration given in milliseconds."""
    return NOTHING if value is None else format_duration(value / 1000)


def stop_times(vm: Mapping[str, Any]) -> str:
    """Last, median and 99th percentile of the stop time, in milliseconds."""
    numbers = [statistic(vm, name) for name in ("stop_ms_last", "stop_ms_p50", "stop_ms_p99")]
    return NOTHING if None in numbers else " / ".join(f"{number:.1f}" for number in numbers)


def size(value: float | None) -> str:
    """A number of bytes."""
    return NOTHING if value is None else format_size(value)


def count(value: int | None) -> str:
    """A number of things, its thousands apart."""
    return NOTHING if value is None else f"{value:,}"


def rate(value: float | None) -> str:
    """Something per second, without saying so."""
    return NOTHING if value is None else f"{value:.1f}"


def with_reason(first: object, reason: object) -> str:
    """A value and why it is so."""
    return f"{word(first)} ({clean(reason)})" if reason else word(first)


def moment(seconds: float) -> str:
    """A point of Unix time, on the local clock."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def age(seconds: float) -> str:
    """How long ago something was, coarse."""
    if seconds < 1:
        return "just now"
    for unit, length in (("day", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            number = int(seconds / length)
            return f"{number} {unit}{'s' if unit == 'day' else ''} ago"
    return f"{int(seconds)} s ago"


LIST_HEADERS = ("NAME", "ROLE", "STATE", "ENGINE", "PEER", "CKPT/S", "STOP", "LAG", "REASON")


def list_row(vm: Mapping[str, Any]) -> tuple[str, ...]:
    """A VM as a row of `list`."""
    return (
        word(vm.get("name")),
        word(vm.get("role")),
        state(vm),
        word(vm.get("engine")),
        word(vm.get("peer")),
        rate(statistic(vm, "checkpoints_per_s")),
        milliseconds(statistic(vm, "stop_ms_p50")),
        milliseconds(statistic(vm, "lag_ms")),
        word(vm.get("reason")),
    )


WATCH_HEADERS = (
    "NAME",
    "ROLE",
    "STATE",
    "ENGINE",
    "CKPT/S",
    "STOP MS LAST / P50 / P99",
    "PAGES",
    "LAG",
    "REASON",
)


def watch_row(vm: Mapping[str, Any]) -> tuple[str, ...]:
    """A VM as a row of `watch`; during a first pass its progress stands for the reason."""
    return (
        word(vm.get("name")),
        word(vm.get("role")),
        state(vm),
        word(vm.get("engine")),
        rate(statistic(vm, "checkpoints_per_s")),
        stop_times(vm),
        count(statistic(vm, "pages_last")),
        milliseconds(statistic(vm, "lag_ms")),
        progress(vm) or word(vm.get("reason")),
    )


def progress(vm: Mapping[str, Any]) -> str:
    """How far a first pass or a switch has come, empty when there is none."""
    made = vm.get("progress")
    if not made:
        return ""
    done, total = made.get("done_bytes", 0), made.get("total_bytes", 0)
    share = f" ({percent(done, total)} %)" if total else ""
    return f"{word(made.get('phase'))}: {format_size(done)} of {format_size(total)}{share}{speed(made)}"


def speed(made: Mapping[str, Any]) -> str:
    """How fast a step is, and how fast it may be, to go after something else; empty when that is not told."""
    rate, limit = made.get("rate"), made.get("limit")
    now = f", {format_size(rate)}/s" if rate else ""
    return now + (f" (limit {format_size(limit)}/s)" if now and limit else "")


def percent(done: int, total: int) -> int:
    """Whole percent, 100 only when all is done."""
    return 100 if done >= total else max(0, int(100 * done / total))


def details(vm: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A VM as the lines of `show`."""
    version, accelerator = vm.get("qemu_version"), vm.get("accelerator")
    rows = [
        ("role", word(vm.get("role"))),
        ("state", state(vm)),
        ("reason", word(vm.get("reason"))),
        ("engine", with_reason(vm.get("engine"), vm.get("engine_reason"))),
        ("QEMU", f"{word(version)}, accelerator {word(accelerator)}" if version or accelerator else NOTHING),
        ("peer", word(vm.get("peer"))),
        ("generation", f"{word(vm.get('generation'))}, arbiter {word(vm.get('arbiter'))}"),
        ("memory", size(vm.get("ram_bytes") or None)),
        *(("disk", disk_line(disk)) for disk in vm.get("disks") or ()),
    ]
    if output := vm.get("output"):
        held = f"{count(vm.get('held_packets'))} packets held, {size(vm.get('held_bytes'))}"
        rows.append(("output", word(output) if output == "none" else f"{word(output)}, {held}"))
    if made := progress(vm):
        rows.append(("progress", made))
    if numbers := _numbers(vm):
        rows += [
            (
                "checkpoints",
                f"{count(numbers.get('checkpoints'))} taken, {count(numbers.get('committed'))} committed, "
                f"{rate(numbers.get('checkpoints_per_s'))} a second",
            ),
            (
                "stop time",
                f"{milliseconds(numbers.get('stop_ms_last'))} last, "
                f"{milliseconds(numbers.get('stop_ms_p50'))} median, "
                f"{milliseconds(numbers.get('stop_ms_p99'))} 99th percentile",
            ),
            ("pages", f"{count(numbers.get('pages_last'))} last, {count(numbers.get('pages_p50'))} median"),
            ("data", f"{size(numbers.get('bytes_last'))} last, {size(numbers.get('bytes_total'))} in all"),
            ("lag", milliseconds(numbers.get("lag_ms"))),
            ("first pass", milliseconds(numbers.get("first_pass_ms") or None)),
        ]
        if numbers.get("failover_ms") is not None:
            rows.append(
                (
                    "last failover",
                    f"detected after {milliseconds(numbers.get('detection_ms'))}, "
                    f"guest running {milliseconds(numbers['failover_ms'])} later",
                )
            )
    return rows


def disk_line(disk: Mapping[str, Any]) -> str:
    """A replicated disk, or its copy."""
    dirty = disk.get("dirty_bytes")
    marked = f", {size(dirty)} to be copied" if dirty is not None else ""
    what = f"{word(disk.get('format'))}, {size(disk.get('size_bytes'))}, {word(disk.get('path'))}"
    return f"{word(disk.get('name'))}: {word(disk.get('state'))}{marked} ({what})"


def event_line(event: Mapping[str, Any], now: float) -> str:
    """An event as a line of `events`."""
    when = event.get("time", 0.0)
    what = f"{word(event.get('event'))}: {word(event.get('message'))}"
    return f"{moment(when)} ({age(now - when)})  {word(event.get('vm'))}  {what}"
