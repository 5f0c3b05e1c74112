"""The journal: bounded, numbered, and followed by as many as like."""

from __future__ import annotations

import logging
from contextlib import aclosing

import pytest
import trio
import trio.testing

from curling_fd.service.journal import KEPT, Journal, JournalEvent


async def read(journal: Journal, count: int, since: int | None = None) -> list[JournalEvent]:
    found: list[JournalEvent] = []
    async with aclosing(journal.follow(since)) as events:
        async for event in events:
            found.append(event)
            if len(found) == count:
                break
    return found


def filled(count: int) -> Journal:
    journal = Journal()
    for number in range(1, count + 1):
        journal.add("web", "tick", f"number {number}", n=number)
    return journal


async def test_an_event_says_what_happened_to_whom_and_when() -> None:
    journal = Journal()
    journal.add("web", "link-lost", "protected -> holding", state="holding", vm="a field of this name too")
    (event,) = await read(journal, 1, since=0)
    assert (event.sequence, event.vm, event.event) == (1, "web", "link-lost")
    assert event.message == "protected -> holding"
    assert event.fields == {"state": "holding", "vm": "a field of this name too"}
    assert event.time > 1_600_000_000


async def test_events_since_a_number_are_those_after_it() -> None:
    journal = filled(10)
    assert [event.sequence for event in await read(journal, 4, since=6)] == [7, 8, 9, 10]
    assert [event.sequence for event in await read(journal, 10, since=0)] == list(range(1, 11))


async def test_without_a_number_it_is_followed_from_now_on(nursery: trio.Nursery) -> None:
    journal, found = filled(10), []

    async def follow() -> None:
        found.extend(await read(journal, 2))

    nursery.start_soon(follow)
    await trio.testing.wait_all_tasks_blocked()
    journal.add("web", "tick", "eleven")
    journal.add("web", "tick", "twelve")
    await trio.testing.wait_all_tasks_blocked()
    assert [event.message for event in found] == ["eleven", "twelve"]


async def test_every_follower_gets_every_event_once_and_in_order(nursery: trio.Nursery) -> None:
    journal, found = Journal(), [[] for _ in range(3)]  # type: ignore[var-annotated]

    async def follow(into: list[int]) -> None:
        async with aclosing(journal.follow()) as events:
            async for event in events:
                into.append(event.sequence)
                for _ in range(event.sequence % 7):  # slow now and then
                    await trio.lowlevel.checkpoint()

    for into in found:
        nursery.start_soon(follow, into)
    await trio.testing.wait_all_tasks_blocked()
    for number in range(100):
        journal.add("web", "tick", str(number))
        if number % 10 == 0:
            await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()
    assert found == [list(range(1, 101))] * 3
    nursery.cancel_scope.cancel()


async def test_an_event_that_comes_while_the_last_one_is_looked_at_is_not_missed() -> None:
    journal = filled(1)
    seen = []
    async with aclosing(journal.follow(0)) as events:
        async for event in events:
            seen.append(event.sequence)
            if event.sequence < 5:
                journal.add("web", "tick", "and another")
            else:
                break
    assert seen == [1, 2, 3, 4, 5]


async def test_the_oldest_are_forgotten_and_the_numbers_tell() -> None:
    journal = filled(KEPT + 50)
    assert (await read(journal, 1, since=0))[0].sequence == 51
    assert [event.sequence for event in await read(journal, KEPT, since=10)] == list(range(51, KEPT + 51))


async def test_a_follower_that_goes_away_leaves_nothing(nursery: trio.Nursery) -> None:
    journal = Journal()
    scope = trio.CancelScope()

    async def follow() -> None:
        with scope:
            await read(journal, 1)

    nursery.start_soon(follow)
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    journal.add("web", "tick", "nobody listens")
    assert (await read(journal, 1, since=0))[0].message == "nobody listens"


def test_events_go_to_the_log_with_their_level(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal()
    with caplog.at_level(logging.INFO, "curling"):
        journal.add("web", "lost", "fenced", level=logging.ERROR)
        journal.add("", "started", "curlingd 1.0")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "web: lost: fenced"),
        (logging.INFO, "curlingd: started: curlingd 1.0"),
    ]
