"""A tap whose guest is this process: what is written here is what the interface receives.

Needs nothing but the standard library, so that it runs in a lab host too.
Source: Documentation/networking/tuntap.rst of the kernel.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from types import TracebackType

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000

#: Of those for experiments (IEEE 802): nobody else answers or sends it.
ETHERTYPE = 0x88B5
GUEST_MAC = bytes.fromhex("525400000777")
BROADCAST = b"\xff" * 6


def numbered(number: int) -> bytes:
    """A frame to everybody with a number in it."""
    return BROADCAST + GUEST_MAC + struct.pack("!HI", ETHERTYPE, number) + bytes(46)


class Tap:
    """Owns the tap `name`, in the name space of the calling thread; it is gone when closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def send(self, frame: bytes) -> None:
        """The guest sends a frame."""
        os.write(self.fd, frame)

    def number(self, *numbers: int) -> None:
        """The guest sends numbered frames, to everybody."""
        for number in numbers:
            self.send(numbered(number))

    def receive(self, within: float = 10.0) -> bytes:
        """The next frame for the guest."""
        if not select.select([self.fd], [], [], within)[0]:
            raise TimeoutError(f"nothing came to {self.name} in {within} s")
        return os.read(self.fd, 1 << 16)


class Wire:
    """Hears the numbered frames that leave through a tap, in the order in which the kernel sends them.

    A packet socket would not do: on the way to one, what two CPUs have sent may change places.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    def heard(self) -> list[int]:
        """What came since the last look."""
        numbers: list[int] = []
        while True:
            try:
                frame = os.read(self._tap.fd, 1 << 16)
            except BlockingIOError:
                return numbers
            if frame[12:14] == ETHERTYPE.to_bytes(2):
                numbers.append(struct.unpack_from("!I", frame, 14)[0])

    def hear(self, count: int, within: float = 20.0) -> list[int]:
        """Wait for so many; what came until then, which is less if they do not come."""
        numbers: list[int] = []
        while len(numbers) < count:
            if not select.select([self._tap.fd], [], [], within)[0]:
                break
            numbers += self.heard()
        return numbers
