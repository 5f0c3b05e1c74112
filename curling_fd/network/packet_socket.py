"""Packet sockets: what passes one interface about who has which address, and frames sent out of it.

Sources: packet(7); include/uapi/linux/if_packet.h, filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

from attrs import frozen

from curling_fd.errors import NetlinkError
from curling_fd.network.bpf import ARP_AND_DISCOVERY, Program, encode

_ETH_P_ALL = 3
_SOL_PACKET = 263
_ADD_MEMBERSHIP, _AUXDATA = 1, 8
_MEMBER_MULTICAST = 0
_OUTGOING = 4
_VLAN_VALID = 1 << 4
_ATTACH_FILTER = 26

_AUXILIARY = struct.Struct("=IIIHHHH")
_MEMBERSHIP = struct.Struct("=iHH8s")
_LONGEST = 2048


@frozen
class Heard:
    """A frame that passed. `leaving`: the host sent it; on a tap that is to the guest."""

    frame: bytes
    vlan: int | None
    leaving: bool


class PacketSocket:
    """Owns a packet socket on one interface, for frames whole with their Ethernet header.

    Args:
        interface: its name.
        hear: receive the frames of ARP_AND_DISCOVERY that pass, in both directions.

    Raises:
        NetlinkError: ENODEV, or EPERM for want of CAP_NET_RAW.
    """

    def __init__(self, interface: str, *, hear: bool = False) -> None:
        self._what = f"a packet socket on {interface}"
        # With protocol 0 it hears nothing until it is bound to the one interface.
        try:
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise self._refused(error) from None
        try:
            self.socket.setblocking(False)
            if hear:
                attach_program(self.socket, ARP_AND_DISCOVERY)
                self.socket.setsockopt(_SOL_PACKET, _AUXDATA, 1)
            self.socket.bind((interface, _ETH_P_ALL if hear else 0))
        except OSError as error:
            self.socket.close()
            raise self._refused(error) from None

    def mac(self) -> str:
        """The interface's own MAC."""
        address: bytes = self.socket.getsockname()[4]
        return address.hex(":")

    def receive(self) -> Heard | None:
        """A frame that has passed, None: none is waiting.

        Raises:
            NetlinkError: ENETDOWN, the interface went down, and is heard again when it is up; ENODEV.
        """
        try:
            frame, extra, _, (_, _, kind, _, _) = self.socket.recvmsg(_LONGEST, 64)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise self._refused(error) from None
        vlan = None
        for level, what, data in extra:
            if (level, what) == (_SOL_PACKET, _AUXDATA) and len(data) >= _AUXILIARY.size:
                status, _, _, _, _, tag, _ = _AUXILIARY.unpack_from(data)
                # Tag 0 carries a priority, and is no VLAN.
                vlan = tag & 0xFFF or None if status & _VLAN_VALID else None
        return Heard(frame, vlan, kind == _OUTGOING)

    def join(self, group: str) -> None:
        """Have the interface take in frames for a multicast MAC."""
        index = socket.if_nametoindex(self.socket.getsockname()[0])
        mac = bytes.fromhex(group.replace(":", ""))
        self.socket.setsockopt(
            _SOL_PACKET, _ADD_MEMBERSHIP, _MEMBERSHIP.pack(index, _MEMBER_MULTICAST, len(mac), mac)
        )

    def send(self, frame: bytes) -> None:
        """Send a frame out of the interface; a full queue loses it.

        Raises:
            NetlinkError: ENETDOWN, ENODEV, ...
        """
        try:
            self.socket.send(frame)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise self._refused(error) from None

    def close(self) -> None:
        """May be called again."""
        self.socket.close()

    def _refused(self, error: OSError) -> NetlinkError:
        number = error.errno or errno.EIO
        return NetlinkError(self._what, number, os.strerror(number))


def attach_program(listener: socket.socket, program: Program) -> None:
    """Have `listener` (borrowed) take in only what `program` wants.

    Raises:
        OSError: as setsockopt(2) says.
    """
    code = encode(program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are.
    where = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, where)
