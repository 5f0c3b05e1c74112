"""Durations and sizes as people write them in configuration files, and as they read them.

A duration is a number and a unit: us, ms, s, min, h. A size is a number and B, KiB, MiB, GiB or TiB (powers
of 1024), or a plain whole number of bytes. A unit is always asked for where its absence could be read two
ways: "100" is no duration, and "1GB" is no size.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DURATIONS = {
    "us": Fraction(1, 1_000_000),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_duration(text: str) -> float:
    """Return the seconds `text` stands for.

    Raises:
        ValueError: `text` is not a number followed by us, ms, s, min or h.
    """
    number, unit = _split(text, "a duration like 500ms, 1.5s or 2min")
    if not unit:
        raise ValueError(f"{text!r} has no unit: write us, ms, s, min or h after the number")
    if unit not in _DURATIONS:
        raise ValueError(f"{unit!r} is not a unit of time: use us, ms, s, min or h")
    return float(number * _DURATIONS[unit])


def format_duration(seconds: float) -> str:
    """Write `seconds` with the unit that makes it a short number: "1.5 s", "500 ms", "2 min".

    Three digits count: the result is for reading, and parses back to within one part in 200.
    """
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds == 0:
        return "0 s"
    for unit, limit in (
        ("us", Fraction(1, 1000)),
        ("ms", Fraction(1)),
        ("s", Fraction(120)),
        ("min", Fraction(7200)),
    ):
        # 0.9996 ms would read "1000 us": the next unit starts where three digits would round up to it.
        if seconds < limit * Fraction(9995, 10_000):
            return f"{_three_digits(seconds / float(_DURATIONS[unit]))} {unit}"
    return f"{_three_digits(seconds / 3600)} h"


def parse_size(value: str | int) -> int:
    """Return the bytes `value` stands for; an int is bytes already.

    Raises:
        ValueError: `value` is negative, has an unknown unit, or is not a whole number of bytes.
    """
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is negative")
        return value
    number, unit = _split(value, "a size like 512MiB or 1GiB, or a whole number of bytes")
    if unit and unit not in _SIZES:
        hint = _SIZE_HINTS.get(unit.lower().removesuffix("ib").removesuffix("b"))
        also = f" ({unit!r} may mean {hint})" if hint else ""
        raise ValueError(f"{unit!r} is not a unit of size: use B, KiB, MiB, GiB or TiB{also}")
    size = number * _SIZES[unit or "B"]
    if size.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return int(size)


def format_size(size: float) -> str:
    """Write `size` bytes with the unit that makes it a short number: "1.5 GiB", "512 MiB", "17 B"."""
    if size < 0:
        return "-" + format_size(-size)
    for unit, factor in _SIZES.items():
        if size < factor * 1023.5 or unit == "TiB":
            return f"{_three_digits(size / factor)} {unit}"
    raise AssertionError("unreachable")


_SIZE_HINTS = {"k": "KiB", "m": "MiB", "g": "GiB", "t": "TiB"}


def _split(text: str, wanted: str) -> tuple[Fraction, str]:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {wanted}")
    return Fraction(match[1]), match[2]


def _three_digits(number: float) -> str:
    if number >= 99.95:
        return f"{number:.0f}"
    text = f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"
    return text.rstrip("0").rstrip(".")
