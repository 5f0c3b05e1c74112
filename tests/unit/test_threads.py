"""Where work on bytes is done."""

from __future__ import annotations

import threading

from curling_fd.system.threads import AT_ONCE, work


async def test_a_few_bytes_are_worked_on_at_once() -> None:
    assert await work(AT_ONCE, threading.get_ident) == threading.get_ident()


async def test_many_bytes_are_worked_on_in_a_thread() -> None:
    assert await work(AT_ONCE + 1, threading.get_ident) != threading.get_ident()
