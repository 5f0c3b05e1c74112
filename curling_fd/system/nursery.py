"""A nursery that fails with one error of ours instead of a group of them.

Tasks of one session fail together when its link or its QEMU goes: the group holds the same story several
times. The first CurlingError in it tells it; anything that is not one is a bug and passes whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from curling_fd.errors import CurlingError


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """`trio.open_nursery`, but a group of CurlingErrors is raised as its first."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        ours, others = group.split(CurlingError)
        if others is not None:
            others = others.split(trio.Cancelled)[1]
        if ours is None or others is not None:
            raise
        raise _first(ours) from None


def _first(group: BaseExceptionGroup[CurlingError]) -> CurlingError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
