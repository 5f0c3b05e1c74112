"""One entry of systemd's journal as the datagram that carries it, without I/O.

Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. A datagram is one entry: `NAME=value` lines, or, for a
value with a line break in it, the name on a line of its own, the value's length as le64, the value, and a
line break. Names are capital letters, digits and underscores; those that begin with an underscore are
journald's own.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

_LENGTH = struct.Struct("<Q")
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")

#: Bytes of one value that are sent. What is longer, a traceback of many nested groups say, is cut: a datagram
#: has at most net.core.wmem_default bytes (208 KiB), and an entry is to fit one.
LONGEST = 48 << 10

_CUT = b" ... (cut)"


def encode(fields: Mapping[str, object]) -> bytes:
    """The datagram of an entry with these fields.

    Raises:
        ValueError: a name journald would not take: a bug.
    """
    return b"".join(_field(name, str(value)) for name, value in fields.items())


def _field(name: str, text: str) -> bytes:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a field of the journal")
    # Surrogates stand for bytes of a path or a command line that are not UTF-8.
    value = text.encode(errors="backslashreplace")
    if len(value) > LONGEST:
        value = value[: LONGEST - len(_CUT)] + _CUT
    if b"\n" in value:
        return name.encode() + b"\n" + _LENGTH.pack(len(value)) + value + b"\n"
    return name.encode() + b"=" + value + b"\n"
