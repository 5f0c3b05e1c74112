"""Output that changes while one looks at it: the bar of a first pass, and the table of `watch`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from curling_fd.ctl import words
from curling_fd.ctl.render import Output, plain_table, rich_table
from curling_fd.units import format_size

_LINE_EVERY = 10
"""Percent between two lines of progress where there is no bar."""


class Progress(Protocol):
    """Shows how far a long step has come."""

    def show(self, vm: Mapping[str, Any]) -> None:
        """Take in the newest state of the VM."""


@contextmanager
def progress(output: Output) -> Iterator[Progress]:
    """Show progress for the duration of a block: a bar on a terminal, lines elsewhere, nothing with
    --json."""
    if output.as_json:
        yield _NoProgress()
    elif output.is_terminal:
        with _Bar(output) as bar:
            yield bar
    else:
        yield _Lines(output)


class _NoProgress:
    def show(self, vm: Mapping[str, Any]) -> None:
        pass


class _Lines:
    """A line when the phase changes and after every tenth of it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last: tuple[str, int] = ("", 0)
        self._started = time.monotonic()

    def show(self, vm: Mapping[str, Any]) -> None:
        made = vm.get("progress")
        if not made:
            return
        phase, done, total = made.get("phase", ""), made.get("done_bytes", 0), made.get("total_bytes", 0)
        tenth = words.percent(done, total) // _LINE_EVERY if total else 0
        now = time.monotonic()
        if phase != self._last[0]:
            self._started = now
        if (phase, tenth) != self._last:
            elapsed = now - self._started
            ours = f", {format_size(done / elapsed)}/s" if elapsed > 0.1 and done else ""
            speed = "" if words.speed(made) else ours  # an older daemon does not say
            self._output.say(f"{words.word(vm.get('name'))}: {words.progress(vm)}{speed}")
            self._last = (phase, tenth)


class _Bar:
    """One bar; it starts anew with every phase."""

    def __init__(self, output: Output) -> None:
        from rich import progress as rich

        self._rich = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
            rich.DownloadColumn(binary_units=True),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
            console=output.console(),
            transient=True,
        )
        self._phase: str | None = None

    def __enter__(self) -> _Bar:
        self._rich.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._rich.stop()

    def show(self, vm: Mapping[str, Any]) -> None:
        made = vm.get("progress")
        if not made:
            return
        done, total = made.get("done_bytes", 0), made.get("total_bytes", 0)
        phase = words.word(made.get("phase"))
        if phase != self._phase:
            for task in self._rich.task_ids:
                self._rich.remove_task(task)
            self._rich.add_task(f"{words.word(vm.get('name'))}: {phase}", total=total)
            self._phase = phase
        self._rich.update(self._rich.task_ids[0], completed=done, total=total)


class Screen(Protocol):
    """Shows the VMs as they change."""

    def show(self, vms: Sequence[Mapping[str, Any]]) -> None:
        """Take in the newest state."""

    def silent(self) -> None:
        """Take in that no news came when some were due."""


@contextmanager
def screen(output: Output, interval: str) -> Iterator[Screen]:
    """Show `watch` for the duration of a block: a table in place on a terminal, rows or JSON lines
    elsewhere."""
    if output.as_json:
        yield _JsonLines(output)
    elif output.is_terminal:
        from rich.live import Live

        # Refreshed by us only: rich would start a thread for it.
        with Live(console=output.console(), auto_refresh=False, vertical_overflow="ellipsis") as live:
            yield _Table(live, interval)
    else:
        yield _Rows()


class _JsonLines:
    def __init__(self, output: Output) -> None:
        self._output = output

    def show(self, vms: Sequence[Mapping[str, Any]]) -> None:
        self._output.item({"time": time.time(), "vms": list(vms)})

    def silent(self) -> None:
        pass


class _Rows:
    """A row for each VM and update, under one header; columns only grow, so that they stay in line."""

    _START = (8, 12, 7, 11, 11, 6, 23, 5, 6, 0)

    def __init__(self) -> None:
        self._widths: Sequence[int] = self._START
        self._started = False

    def show(self, vms: Sequence[Mapping[str, Any]]) -> None:
        rows: list[tuple[str, ...]] = [] if self._started else [("TIME", *words.WATCH_HEADERS)]
        self._started = True
        now = time.strftime("%H:%M:%S")
        rows += [(now, *words.watch_row(vm)) for vm in vms] or [
            (now, "no VMs", *[""] * (len(words.WATCH_HEADERS) - 1))
        ]
        columns = zip(self._widths, *rows, strict=True)
        self._widths = [max(least, *map(len, column)) for least, *column in columns]
        print("\n".join(plain_table(rows, self._widths)), flush=True)

    def silent(self) -> None:
        pass


class _Table:
    def __init__(self, live: Any, interval: str) -> None:
        self._live = live
        self._interval = interval
        self._vms: Sequence[Mapping[str, Any]] = ()
        self._heard = time.monotonic()
        self._clock = ""

    def show(self, vms: Sequence[Mapping[str, Any]]) -> None:
        self._vms = vms
        self._heard = time.monotonic()
        self._clock = time.strftime("%H:%M:%S")
        self._draw(f"{self._clock}, every {self._interval}; Ctrl-C ends")

    def silent(self) -> None:
        seconds = int(time.monotonic() - self._heard)
        self._draw(f"{self._clock or 'nothing yet'}: no news from curlingd for {seconds} s; Ctrl-C ends")

    def _draw(self, caption: str) -> None:
        rows = [words.watch_row(vm) for vm in self._vms]
        self._live.update(rich_table(words.WATCH_HEADERS, rows, caption), refresh=True)
