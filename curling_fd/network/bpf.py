"""Classic BPF: programs that a packet socket runs on each frame, to say how many bytes of it are wanted.

An instruction is u16 code, u8 jump if true, u8 jump if false, u32 operand, in native byte order; jumps count
the instructions that are left out. Source: Documentation/networking/filter.rst of the kernel.
"""

from __future__ import annotations

import struct

Program = tuple[tuple[int, int, int, int], ...]

_INSTRUCTION = struct.Struct("=HBBI")

_LOAD_HALF, _LOAD_BYTE, _IF_EQUAL, _IF_AT_LEAST, _IF_MORE, _RETURN = 0x28, 0x30, 0x15, 0x35, 0x25, 0x06

ONE_BYTE: Program = ((_RETURN, 0, 0, 1),)
"""Of every frame one byte: that it was there."""

ARP_AND_DISCOVERY: Program = (
    (_LOAD_HALF, 0, 0, 12),  # ethertype; the kernel has taken a tag out
    (_IF_EQUAL, 6, 0, 0x0806),
    (_IF_EQUAL, 0, 6, 0x86DD),
    (_LOAD_BYTE, 0, 0, 20),  # next header
    (_IF_EQUAL, 0, 4, 58),
    (_LOAD_BYTE, 0, 0, 54),  # ICMPv6 type
    (_IF_AT_LEAST, 0, 2, 134),
    (_IF_MORE, 1, 0, 136),
    (_RETURN, 0, 0, 0xFFFF),
    (_RETURN, 0, 0, 0),
)
"""What `packets.parse` reads, whole."""


def encode(program: Program) -> bytes:
    """The program as the kernel takes it."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
