"""Work on bytes: at once when there are few, in a thread when there are many.

A thread costs what a megabyte costs: waking it, and waiting for the interpreter each time one of the two has
it. But whatever the event loop does itself keeps heartbeats waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

#: Bytes up to which the event loop does the work: about 1 ms of copying.
AT_ONCE = 4 << 20

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def work(size: int, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """The result of `function(*arguments)`, which handles `size` bytes. Not to be cancelled once begun."""
    if size > AT_ONCE:
        return await trio.to_thread.run_sync(function, *arguments)
    await trio.lowlevel.checkpoint()
    return function(*arguments)
