"""A guest's serial console: read from the log file QEMU keeps of it, written through its socket."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio
from attrs import define, field, frozen

_ROUND = re.compile(r"curling round=(\d+) corrupt=(\d+) uptime_ms=(\d+)$")
_POLL_SECONDS = 0.01
_T = TypeVar("_T")


@frozen
class Round:
    """A report of the guest: the round it finished, pages found corrupt so far, its own clock."""

    number: int
    corrupt: int
    uptime_ms: int


@define(eq=False)
class Console:
    """The console whose output QEMU appends to `log` and whose input it takes at `socket`.

    All of the log can be read at any time, whoever is or was connected to the socket. `alive` tells whether
    there still is a QEMU to wait for. What waits here raises TimeoutError after `within` seconds.
    """

    log: Path
    socket: Path
    alive: Callable[[], bool] = lambda: True
    _lines: list[str] = field(factory=list, init=False)
    _offset: int = field(default=0, init=False)

    def lines(self) -> list[str]:
        """All complete lines so far."""
        if self.log.exists():
            with self.log.open("rb") as log:
                log.seek(self._offset)
                whole, newline, _ = log.read().rpartition(b"\n")
            if newline:
                self._offset += len(whole) + 1
                text = whole.decode("ascii", errors="replace")
                self._lines += [line.rstrip("\r") for line in text.split("\n")]
        return list(self._lines)

    def rounds(self, start: int = 0) -> list[Round]:
        """The reports among the lines from number `start` on. A guest that rebooted counts from 1 again."""
        found = map(_ROUND.search, self.lines()[start:])
        return [Round(*map(int, match.groups())) for match in found if match]

    async def wait_line(self, pattern: str, *, start: int = 0, within: float = 60) -> str:
        """The first line, from line number `start` on, in which the regular expression is found."""

        def first() -> str | None:
            return next((line for line in self.lines()[start:] if re.search(pattern, line)), None)

        return await self._wait(first, f"line with {pattern!r}", within)

    async def wait_ready(self, count: int = 1, *, within: float = 60) -> None:
        """Wait until the guest's program has started, `count` times in all."""
        await self._wait(
            lambda: sum("curling ready" in line for line in self.lines()) >= count or None,
            f"start number {count} of the guest",
            within,
        )

    async def wait_round(self, number: int, *, start: int = 0, within: float = 60) -> Round:
        """The first report of round `number` or a later one, from line number `start` on."""
        return await self._wait(
            lambda: next((one for one in self.rounds(start) if one.number >= number), None),
            f"report of round {number}",
            within,
        )

    async def next_round(self, *, within: float = 60) -> Round:
        """The next report from now on."""
        return await self.wait_round(0, start=len(self.lines()), within=within)

    async def send(self, command: str, *, within: float = 60) -> None:
        """Give the guest a command line like "d 100", and wait until it says that it took it."""
        start = len(self.lines())
        async with await trio.open_unix_socket(str(self.socket)) as stream, trio.open_nursery() as nursery:
            # Unread output would in the end stop the guest's serial port.
            nursery.start_soon(_drain, stream)
            await stream.send_all(command.encode() + b"\n")
            # QEMU may drop what it has not read when its client leaves, so stay until the answer is there.
            await self.wait_line("curling ok", start=start, within=within)
            nursery.cancel_scope.cancel()

    def tail(self, count: int = 20) -> str:
        """The last lines, for messages."""
        return "\n".join(self.lines()[-count:])

    async def _wait(self, look: Callable[[], _T | None], what: str, within: float) -> _T:
        with trio.move_on_after(within):
            while True:
                alive = self.alive()
                found = look()
                if found is not None:
                    return found
                if not alive:
                    raise RuntimeError(f"QEMU is gone, and no {what}. The console ends with:\n{self.tail()}")
                await trio.sleep(_POLL_SECONDS)
        raise TimeoutError(f"no {what} within {within} s. The console ends with:\n{self.tail()}")


async def _drain(stream: trio.SocketStream) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        # QEMU went away: the one who waits for the answer notices.
        return
