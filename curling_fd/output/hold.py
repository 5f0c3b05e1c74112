"""Output commit (I2): what holds the guest's packets until their epoch is committed.

The capture calls `barrier(N)` while the guest stands still at the end of epoch N, and the session
`release(N)` when the backup has committed checkpoint N.
"""

from __future__ import annotations

from typing import Protocol


class OutputHold(Protocol):
    """A way of holding a VM's packets."""

    def barrier(self, sequence: int) -> None:
        """Everything sent so far belongs to epoch `sequence`. Called in the capture's thread."""
        ...

    def release(self, sequence: int) -> None:
        """Epoch `sequence` and all before it may leave."""
        ...

    def waiting(self) -> bool:
        """The guest has sent something that is being held."""
        ...


class NoHold:
    """Holds nothing: packets leave at once, so clients may see an epoch that a failover undoes."""

    def barrier(self, sequence: int) -> None:
        pass

    def release(self, sequence: int) -> None:
        pass

    def waiting(self) -> bool:
        return False
