"""What happened, for people and programs: a bounded log of events that can be followed."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import trio
from attrs import frozen

from curling_fd.journald.messages import journal_fields
from curling_fd.journald.sender import EXTRA

_logger = logging.getLogger("curling")

#: Events kept for `events --since`; each is some hundred bytes.
KEPT = 1000


@frozen
class JournalEvent:
    """One thing that happened. `time` is seconds since the Unix epoch; `event` a word of `Event` or ours."""

    sequence: int
    time: float
    vm: str
    event: str
    message: str
    fields: Mapping[str, Any]


class Journal:
    """All events of one daemon, the newest `KEPT` of them; they go to Python's logging too."""

    def __init__(self) -> None:
        self._events: deque[JournalEvent] = deque(maxlen=KEPT)
        self._numbers = itertools.count(1)
        self._news = trio.lowlevel.ParkingLot()

    def add(self, vm: str, event: str, message: str, /, *, level: int = logging.INFO, **fields: Any) -> None:
        """Record an event and wake every follower."""
        entry = JournalEvent(next(self._numbers), time.time(), vm, event, message, fields)
        self._events.append(entry)
        self._news.unpark_all()
        extra = {EXTRA: journal_fields(vm, event, fields)}
        _logger.log(level, "%s: %s: %s", vm or "curlingd", event, message, extra=extra)

    async def follow(self, since: int | None = None) -> AsyncIterator[JournalEvent]:
        """Every event after number `since` (None: from now on), then each new one as it comes."""
        last = since if since is not None else (self._events[-1].sequence if self._events else 0)
        while True:
            news = [event for event in self._events if event.sequence > last]
            for event in news:
                last = event.sequence
                yield event
            if not news:
                await self._news.park()
