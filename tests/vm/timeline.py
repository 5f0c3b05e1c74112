"""What happened when in a scenario: kept as build/vm/NAME/timeline.jsonl, and timeline.txt for people.

Everything is placed by the monotonic clock of this machine, in seconds since the lab began. Entries of a
host's journal have their own clock, which counts from its boot and knows no steps; what it shows when the
agent greets says where its zero is. The wall clock of whoever made the entry is kept beside it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import define, field

from .control import Greeting

_STAMPED = re.compile(r"\[ *(\d+\.\d+)\] (.*)$")
#: Fields of the journal that are of use when something has to be understood afterwards.
_KEPT = ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "_SYSTEMD_UNIT", "_PID", "MESSAGE_ID")


@define
class Clocks:
    """Where the clocks of all boots of all hosts have their zero."""

    began: float = field(factory=time.monotonic)
    _zeros: dict[str, float] = field(factory=dict)

    def now(self) -> float:
        return time.monotonic() - self.began

    def learn(self, greeting: Greeting) -> None:
        """Take note of the clock of a boot."""
        zero = greeting.asked_at - self.began - greeting.monotonic / 1e9
        self._zeros[greeting.boot.replace("-", "")] = zero

    def zero(self, boot: str) -> float | None:
        """When a boot's monotonic clock began; None for one in which the agent was never reached."""
        return self._zeros.get(boot)


@define
class Timeline:
    """The entries of one scenario, written as they come."""

    folder: Path
    clocks: Clocks
    _entries: list[dict[str, Any]] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "timeline.jsonl").write_text("")

    def note(self, source: str, text: str, **fields: Any) -> None:
        """Something the test did or saw, now."""
        self.add(self.clocks.now(), time.time(), source, text, **fields)

    def add(self, at: float, wall: float, source: str, text: str, **fields: Any) -> None:
        """An entry of any time: `at` in seconds since the lab began, `wall` by the clock of `source`."""
        stamp = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
        entry = {"at": round(at, 3), "wall": stamp, "source": source, "text": text, **fields}
        self._entries.append(entry)
        with (self.folder / "timeline.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def add_journal(self, host: str, data: bytes) -> None:
        """Entries of a host's journal, one JSON object a line; what is torn is left out."""
        for entry in _objects(data.splitlines()):
            monotonic = int(entry.get("__MONOTONIC_TIMESTAMP", 0))
            zero = self.clocks.zero(str(entry.get("_BOOT_ID", "")))
            message = entry.get("MESSAGE")
            if zero is None or message is None:
                continue
            at = zero + monotonic / 1e6
            # journalctl gives what is not UTF-8 as a list of bytes.
            text = message if isinstance(message, str) else bytes(message).decode(errors="replace")
            who = entry.get("SYSLOG_IDENTIFIER", "?")
            fields = {key: entry[key] for key in entry if key in _KEPT[1:] or key.startswith("CURLING_")}
            wall = int(entry["__REALTIME_TIMESTAMP"]) / 1e6
            self.add(at, wall, f"{host} journal", f"{who}: {text}", monotonic_us=monotonic, **fields)

    def add_console(self, host: str, data: bytes, start: int) -> None:
        """What the guest printed on a host, as `follow` stamped it, from offset `start` on.

        Of its rounds, which are many, the first and the last and one a second.
        """
        zero, kept, seen = 0.0, -math.inf, -math.inf
        skipped: tuple[float, str] | None = None
        offset = 0
        for raw in data.splitlines(keepends=True):
            offset += len(raw)
            found = _STAMPED.match(raw.decode(errors="replace").rstrip())
            if found is None:
                continue
            seconds, text = float(found[1]), found[2]
            if text.startswith("boot "):
                zero = self.clocks.zero(text[5:].replace("-", "")) or 0.0
            elif offset > start:
                at, before = zero + seconds, seen
                if "round=" in text:
                    seen = at
                    if at < kept + 1:
                        skipped = (at, text)
                        continue
                    if skipped and at > before + 1:
                        # The last one before a silence, or before a failover.
                        self._add_guest(host, *skipped)
                    kept, skipped = at, None
                self._add_guest(host, at, text)
        if skipped:
            self._add_guest(host, *skipped)

    def _add_guest(self, host: str, at: float, text: str) -> None:
        self.add(at, time.time() - self.clocks.now() + at, f"{host} guest", text)

    def finish(self) -> Path:
        """Sort everything into timeline.txt, and return its path."""
        entries = sorted(self._entries, key=lambda entry: entry["at"])
        width = max((len(entry["source"]) for entry in entries), default=0)
        lines = ["seconds  clock of the source       source and what happened"]
        for entry in entries:
            text = entry["text"].replace("\n", "\n" + " " * (36 + width))
            lines.append(f"{entry['at']:7.3f}  {entry['wall'][:-6]}  {entry['source']:{width}}  {text}")
        with (self.folder / "timeline.jsonl").open("w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        path = self.folder / "timeline.txt"
        path.write_text("\n".join(lines) + "\n")
        return path


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
