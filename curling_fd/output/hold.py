"""Output commit (I2): what holds the guest's packets until their epoch is committed.

A backend is attached when a session begins, and open: packets leave at once. The capture calls `barrier(N)`
while the guest stands still at the end of epoch N, and the session `release(N)` when the backup has committed
checkpoint N. From the first barrier on packets are held. What becomes of those that are held when a session
ends is decided by whoever finds out which host may run the VM: `detach` lets them out, `drop` throws them
away. Until then they stay held, also when this daemon dies: backends live in the kernel, or in QEMU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio
from attrs import frozen


@frozen
class HoldStatistics:
    """What is held now, in packets and bytes, and how many packets the kernel had no more room for."""

    packets: int = 0
    bytes: int = 0
    dropped: int = 0


class OutputHold(Protocol):
    """A way of holding a VM's packets.

    Attributes:
        name: of the backend, for `curlingctl show`.
        depth: how many barriers may be waiting for their release at once; None for any number.
        last_will: what QEMU has to be told over the monitor when this daemon is gone.
    """

    name: str
    depth: int | None

    @property
    def last_will(self) -> bytes: ...

    async def attach(self) -> None:
        """Get everything into place; nothing is held yet.

        Raises:
            OutputError: it cannot be; everything is as it was.
        """
        ...

    def barrier(self, sequence: int) -> Callable[[], None] | None:
        """Everything sent so far is of epoch `sequence`. Called in the capture's thread, the guest stopped.

        Returns:
            What has to be called there before the guest goes on, if the barrier is not in place yet.

        Raises:
            OutputError: it cannot be told apart from what comes.
        """
        ...

    async def release(self, sequence: int) -> None:
        """Epoch `sequence` and all before it may leave.

        Raises:
            OutputError: they cannot.
        """
        ...

    async def let_go_stopped(self) -> None:
        """The guest stands still, and goes on elsewhere: see that what was released has left its QEMU.

        Raises:
            QmpError: QEMU did not do it.
        """
        ...

    def set_limit(self, limit: int) -> None:
        """The guest is made to wait at `limit` bytes from now on: have room for somewhat more.

        Raises:
            OutputError: there is none.
        """
        ...

    async def drop(self) -> None:
        """Throw away what is held, and what comes until `detach`."""
        ...

    async def detach(self) -> None:
        """Let out what is held, and leave everything as it was before `attach`. May be called again."""
        ...

    async def watch(self, on_output: Callable[[], None]) -> None:
        """Call `on_output` at the first packet that the guest sends after a barrier; goes on until cancelled.

        Raises:
            OutputError: it cannot be seen any more.
        """
        ...

    def statistics(self) -> HoldStatistics:
        """What is held now."""
        ...

    def waiting(self) -> bool:
        """The guest has sent something since the last barrier."""
        ...


class NoHold:
    """Holds nothing: packets leave at once, so clients may see an epoch that a failover undoes."""

    name = "none"
    depth: int | None = None
    last_will = b""

    async def attach(self) -> None:
        pass

    def barrier(self, sequence: int) -> Callable[[], None] | None:
        return None

    async def release(self, sequence: int) -> None:
        pass

    async def let_go_stopped(self) -> None:
        pass

    def set_limit(self, limit: int) -> None:
        pass

    async def drop(self) -> None:
        pass

    async def detach(self) -> None:
        pass

    async def watch(self, on_output: Callable[[], None]) -> None:
        await trio.sleep_forever()

    def statistics(self) -> HoldStatistics:
        return HoldStatistics()

    def waiting(self) -> bool:
        return False
