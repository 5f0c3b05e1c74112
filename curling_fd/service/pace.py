"""When the next checkpoint is due."""

from __future__ import annotations

from attrs import frozen


@frozen
class Pace:
    """Bounds on the length of an epoch, in seconds.

    An epoch ends early, after `shortest`, when the guest has output waiting, and late, after `longest`,
    when it has none. A free capture buffer is the third condition, and is waited for elsewhere (I6).
    """

    shortest: float
    longest: float

    def due(self, boundary: float, *, output_waiting: bool) -> float:
        """The time of the next boundary after the one at `boundary`, on the same clock."""
        return boundary + (self.shortest if output_waiting else self.longest)
