"""What a host remembers of a copy it keeps: whether, and relative to what, it is known. No I/O.

A copy is valid between sessions only. While one writes to it, and when a daemon ended without a word, nobody
knows what is in it, and the next session compares it whole. A valid copy differs from the primary's disk in
no other blocks than those that are marked in the map of the primary's disk log which has the same `basis`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attrs import asdict, evolve, frozen

#: Bytes of a disk: none is larger, whatever is written in a file.
_MOST_BYTES = 1 << 63


@frozen
class Marker:
    """What is known of one copy.

    Attributes:
        size: bytes of the disk.
        basis: of the primary's log; empty while the copy is not valid.
        generation: of the VM, when the copy was written last.
        sequence: of the checkpoint that the copy is; 0 before the first of its session.
        stamp: what the file or device looked like when it was closed, see `curling_fd.disk.markers`; if it
            looks otherwise somebody has written to it.
    """

    size: int
    basis: str = ""
    generation: int = 0
    sequence: int = 0
    stamp: str = ""

    @property
    def valid(self) -> bool:
        return bool(self.basis)

    def invalidated(self) -> Marker:
        """A session begins to write."""
        return evolve(self, basis="", stamp="")

    def basis_for(self, size: int, stamp: str) -> str:
        """The basis for a disk of `size` bytes whose copy looks like `stamp` now; empty if it is in doubt."""
        return self.basis if self.size == size and self.stamp == stamp and stamp else ""


def encode(markers: Mapping[str, Marker]) -> str:
    """The file of a VM: its copies' markers by the names of the disks."""
    return json.dumps({disk: asdict(marker) for disk, marker in markers.items()})


def decode(text: str) -> dict[str, Marker]:
    """The markers in a file.

    Raises:
        ValueError: it is damaged: nothing in it counts.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("no object")
    return {disk: _marker(entry) for disk, entry in content.items()}


def _marker(entry: Any) -> Marker:
    kinds = {"size": int, "basis": str, "generation": int, "sequence": int, "stamp": str}
    if not isinstance(entry, dict) or entry.keys() != kinds.keys():
        raise ValueError("no marker")
    for name, kind in kinds.items():
        # Not isinstance: to Python, True is a number.
        if type(entry[name]) is not kind or (kind is int and not 0 <= entry[name] < _MOST_BYTES):
            raise ValueError(f"`{name}` is {entry[name]!r}")
    return Marker(**entry)
