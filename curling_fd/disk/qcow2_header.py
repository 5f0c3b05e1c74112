"""What the header of a qcow2 image says, as far as it decides whether the image can be a copy. No I/O.

Source: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

from struct import Struct

from attrs import frozen

MAGIC = b"QFI\xfb"

#: Bytes from the beginning of the file that are enough: the header and a name of 1023 bytes, in most files.
ENOUGH = 64 << 10

_HEADER = Struct(">4sIQIIQI")
_INCOMPATIBLE = Struct(">Q")
_INCOMPATIBLE_AT = 72

_CORRUPT = 1 << 1
_DATA_FILE = 1 << 2


@frozen
class Qcow2Header:
    """`size`: bytes the guest sees. `backing`: the file that has the rest of the content. `problem`: else."""

    size: int
    backing: str | None
    problem: str | None


def read_header(data: bytes) -> Qcow2Header | None:
    """The header in the first bytes of a file, `ENOUGH` or all there are; None if it is no qcow2 image."""
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        return None
    _, version, backing_at, backing_size, _, size, encryption = _HEADER.unpack_from(data)
    backing = problem = None
    if backing_at:
        name = data[backing_at : backing_at + backing_size].decode("utf-8", "replace")
        backing = " ".join(name.split()) or "another file"
    features = 0
    if version >= 3 and len(data) >= _INCOMPATIBLE_AT + _INCOMPATIBLE.size:
        features = _INCOMPATIBLE.unpack_from(data, _INCOMPATIBLE_AT)[0]
    if version not in (2, 3):
        problem = f"it is qcow2 of version {version}, which is not known here"
    elif encryption:
        problem = "it is encrypted, and the key is not known here"
    elif features & _CORRUPT:
        problem = "QEMU has marked it as corrupt (see 'qemu-img check')"
    elif features & _DATA_FILE:
        problem = "its data are in another file"
    return Qcow2Header(size, backing, problem)
