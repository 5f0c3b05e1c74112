"""When a checkpoint is due."""

from __future__ import annotations

from attrs import frozen


@frozen
class Boundary:
    """When the guest stopped for the last checkpoint, and when it ran again: seconds of one clock."""

    stopped: float
    resumed: float


@frozen
class Pace:
    """Bounds on the time from one boundary to the next, in seconds.

    An epoch ends late, after `longest`, when the guest has no output waiting. When it has some it ends early:
    after `shortest`, but the guest runs at least as long as it has just stood still. So a small idle guest
    answers within milliseconds, and a large busy one still has half of its time. A free capture buffer is one
    more condition, and is waited for elsewhere (I6).
    """

    shortest: float
    longest: float

    def due(self, last: Boundary, *, output_waiting: bool) -> float:
        """The time of the next boundary after `last`."""
        late = last.stopped + self.longest
        if not output_waiting:
            return late
        own = last.resumed + (last.resumed - last.stopped)
        return min(late, max(last.stopped + self.shortest, own))
