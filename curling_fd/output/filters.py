"""Classic BPF: the programs a packet socket runs on each frame, to say how much of it is wanted.

An instruction is u16 code, u8 jump if true, u8 jump if false, u32 operand, in native byte order; jumps count
the instructions that are left out. Source: Documentation/networking/filter.rst of the kernel.
"""

from __future__ import annotations

import struct

_LOAD_BYTE = 0x30
_LOAD_HALF = 0x28
_JUMP_EQUAL = 0x15
_JUMP_GREATER = 0x25
_JUMP_GREATER_EQUAL = 0x35
_RETURN = 0x06

INSTRUCTION = struct.Struct("=HBBI")

_ETHERTYPE_AT, _ARP, _IPV6 = 12, 0x0806, 0x86DD
_NEXT_HEADER_AT, _ICMPV6 = 14 + 6, 58
_TYPE_AT, _SOLICITATION_OF_ROUTERS, _REDIRECT = 14 + 40, 133, 137

#: Bytes of a frame that are looked at: an ARP packet has 42, a neighbour advertisement with an address 86.
FRAME_BYTES = 128


def _program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(INSTRUCTION.pack(*each) for each in instructions)


#: Of every frame one byte: that it was there.
ANY = _program((_RETURN, 0, 0, 1))

#: ARP, and neighbour discovery: ICMPv6 types 133 to 137, straight after the IPv6 header (RFC 4861 section 4).
NEIGHBOURS = _program(
    (_LOAD_HALF, 0, 0, _ETHERTYPE_AT),
    (_JUMP_EQUAL, 6, 0, _ARP),
    (_JUMP_EQUAL, 0, 6, _IPV6),
    (_LOAD_BYTE, 0, 0, _NEXT_HEADER_AT),
    (_JUMP_EQUAL, 0, 4, _ICMPV6),
    (_LOAD_BYTE, 0, 0, _TYPE_AT),
    (_JUMP_GREATER_EQUAL, 0, 2, _SOLICITATION_OF_ROUTERS),
    (_JUMP_GREATER, 1, 0, _REDIRECT),
    (_RETURN, 0, 0, FRAME_BYTES),
    (_RETURN, 0, 0, 0),
)
