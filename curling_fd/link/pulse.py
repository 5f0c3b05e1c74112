"""Heartbeats: how each side of a link knows that the other is there.

Time budget of a detection, with the defaults of 100 ms and 1 s: the peer's last sign of life is at most one
interval old when it dies, and silence is noticed `failure_timeout` after it was heard: 0.9 to 1.0 s. Any byte
counts as a sign of life, so that a long frame on a slow link is not taken for a death.
"""

from __future__ import annotations

import trio

from curling_fd.errors import LinkLost
from curling_fd.link.frames import Kind
from curling_fd.link.transport import FrameLink


async def keep_pulse(link: FrameLink, generation: int, interval: float) -> None:
    """Send a heartbeat every `interval` seconds until cancelled."""
    while True:
        await link.send(Kind.HEARTBEAT, generation)
        await trio.sleep(interval)


async def watch_pulse(link: FrameLink, timeout: float) -> None:
    """Return never; raise LinkLost once the peer has been silent for `timeout` seconds from now on.

    Silence only counts while we listened: if this process itself was stopped or starved past the deadline, or
    was busy with what the peer had sent before, more of it may lie unread, and the peer gets its time again.
    """
    link.statistics.heard = trio.current_time()
    while True:
        deadline = link.statistics.heard + timeout
        await trio.sleep_until(deadline)
        late = trio.current_time() - deadline
        if late > timeout / 4 or not link.listening:
            link.statistics.heard = trio.current_time()
        elif link.statistics.heard + timeout <= trio.current_time():
            silent = trio.current_time() - link.statistics.heard
            link.close()  # whoever is in the middle of a frame need not finish it
            raise LinkLost(f"the peer has been silent for {silent * 1000:.0f} ms")
