"""Heartbeats: how each side of a link knows that the other is there.

Time budget of a detection, with the defaults of 100 ms and 1 s: the peer's last sign of life is at most one
interval old when it dies, and silence is noticed `failure_timeout` after it was heard: 0.9 to 1.0 s. Any byte
counts as a sign of life, so that a long frame on a slow link is not taken for a death.

A daemon that is restarted asks for a rest before (REST, answered with RESTING): then both are silent, and its
silence counts only after the time it asked for. Any frame ends the rest.
"""

from __future__ import annotations

import trio

from curling_fd.errors import FrameError, LinkLost
from curling_fd.link.frames import Kind
from curling_fd.link.transport import FrameLink, Received

#: Seconds a daemon may take to be restarted: until then its silence says nothing, and a host that is lost
#: meanwhile is noticed so much later. Python's start and systemd's take about one second.
REST_LIMIT = 30.0


class Pulse:
    """The heartbeats of one link (borrowed).

    Args:
        generation: of the VM the link is about.
        interval: seconds between two heartbeats of ours.
        timeout: seconds of silence after which the peer counts as lost.
    """

    def __init__(self, link: FrameLink, generation: int, interval: float, timeout: float) -> None:
        self._link = link
        self._generation = generation
        self._interval = interval
        self._timeout = timeout
        self._sending = trio.Lock()
        self._resting_until: float | None = None
        self._quiet = False
        self._woken = trio.Event()

    @property
    def resting(self) -> bool:
        """Whether the peer is silent on purpose."""
        return self._resting_until is not None

    async def keep(self) -> None:
        """Send a heartbeat every interval until cancelled, but none in a rest."""
        while True:
            async with self._sending:
                if not self._quiet:
                    await self._link.send(Kind.HEARTBEAT, self._generation)
            if self._quiet:
                await self._woken.wait()
            else:
                await trio.sleep(self._interval)

    async def watch(self) -> None:
        """Return never; raise LinkLost once the peer has been silent for the timeout from now on.

        Silence only counts while we listened: if this process itself was stopped or starved past the
        deadline, or was busy with what the peer had sent before, more of it may lie unread, and the peer gets
        its time again.
        """
        link, timeout = self._link, self._timeout
        link.statistics.heard = trio.current_time()
        while True:
            if self._resting_until is not None:
                with trio.move_on_at(self._resting_until):
                    await self._woken.wait()
                    link.statistics.heard = trio.current_time()
            deadline = link.statistics.heard + timeout
            await trio.sleep_until(deadline)
            if self._resting_until is not None and self._resting_until > trio.current_time():
                continue
            late = trio.current_time() - deadline
            if late > timeout / 4 or not link.listening:
                link.statistics.heard = trio.current_time()
            elif link.statistics.heard + timeout <= trio.current_time():
                silent = trio.current_time() - link.statistics.heard
                link.close()  # whoever is in the middle of a frame need not finish it
                raise LinkLost(f"the peer has been silent for {silent * 1000:.0f} ms")

    async def rest(self, seconds: float) -> None:
        """Be silent; the peer's silence counts only after `seconds`. No heartbeat follows this call."""
        self.expect(seconds)
        self._quiet = True
        async with self._sending:
            pass

    def expect(self, seconds: float) -> None:
        """The peer may be silent for `seconds` more: its daemon is restarted as well."""
        self._woken = trio.Event()
        self._resting_until = trio.current_time() + seconds

    def wake(self) -> None:
        """The rest is over: the peer was heard."""
        if self._resting_until is not None:
            self._resting_until = None
            self._quiet = False
            self._woken.set()


def rest_seconds(received: Received) -> float:
    """How long the REST that was received is to last.

    Raises:
        FrameError: it does not say so.
    """
    seconds = received.content.get("seconds")
    if not isinstance(seconds, int | float) or not 0 < seconds <= REST_LIMIT:
        raise FrameError("a REST frame that does not say for how long")
    return float(seconds)
