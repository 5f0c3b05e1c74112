"""Fuzzes the migration stream scanner with atheris (coverage-guided, libFuzzer underneath).

    pip install atheris attrs
    python tests/fuzz/fuzz_scanner.py -runs=100000

Any input must be read or refused with StreamError, the same whole, in pieces and byte by byte, and as the
slow reader of `tests.unit.scanner_reference` does it; everything else is a crash. libFuzzer's options
apply: `-max_total_time=600`, a folder to keep the corpus in, a file to run again.

The first byte of an input picks where the scan stands when the rest comes, the second where it is cut. A
byte fe in the rest stands for the content of a page, so that pages need not be found by chance.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["curling_fd"]):
    from curling_fd.vmstate.records import Block, RamLayout
    from tests.unit.scanner_reference import check

LAYOUT = RamLayout((Block("a", 0x8000), Block("bc", 0x1000)), section_id=2)

_MAGIC = b"QEVM" + struct.pack(">I", 3)
_CONFIGURATION = b"\x07" + struct.pack(">I", 3) + b"q35"
_START = b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, 4)
_LIST = (
    struct.pack(">Q", 0x9004) + b"\x01a" + struct.pack(">Q", 0x8000) + b"\x02bc" + struct.pack(">Q", 0x1000)
)
_TAIL = struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", 2)
_END = b"\x03" + struct.pack(">I", 2)

PASSES = (
    b"",
    _MAGIC,
    _MAGIC + _CONFIGURATION,
    _MAGIC + _START,
    _MAGIC + _CONFIGURATION + _START + _LIST,
    _MAGIC + _CONFIGURATION + _START + _LIST + _TAIL,
    _MAGIC + _CONFIGURATION + _START + _LIST + _TAIL + _END,
    _MAGIC + _CONFIGURATION + _START + _LIST + _TAIL + _END + _TAIL,
)
CHECKPOINTS = (b"", _START, _END, _END + _TAIL)
CONTENT = bytes((*bytes(7), 0x28)) * 512


def one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    if len(data) < 2:
        return
    choice, step, rest = data[0], data[1], data[2:]
    body = CONTENT.join(rest.split(b"\xfe"))
    options = {"check_addresses": bool(choice & 0x80), "bytewise": len(body) < 200}
    choice &= 0x7F
    if choice < 0x40:
        stream, layout, last = PASSES[choice % len(PASSES)] + body, None, None
    else:
        stream, layout = CHECKPOINTS[choice % len(CHECKPOINTS)] + body, LAYOUT
        last = (None, "a", "bc")[choice % 3]
    cuts = range(step, len(stream), max(step * 37, len(stream) // 64, 1))
    check(stream, layout, last, cuts=cuts, **options)


def main() -> None:
    """Runs the fuzzer with libFuzzer's command line."""
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
