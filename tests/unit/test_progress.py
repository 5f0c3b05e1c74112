"""How a first pass is told: how far, how fast, and what it is held to."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from curling_fd.ctl import words
from curling_fd.service.config_keys import Rate
from curling_fd.service.progress import PassMeter, Progress

MIB = 1 << 20


async def test_a_speed_is_that_of_the_last_seconds(autojump_clock: trio.testing.MockClock) -> None:
    meter = PassMeter(1000 * MIB, None)
    assert meter.sent(0) == Progress("first pass", 0, 1000 * MIB)
    for second in range(1, 11):
        await trio.sleep(1)
        shown = meter.sent(second * 100 * MIB)
        assert shown.rate == 100 * MIB
    for quarter in range(1, 17):  # and then at 20 MiB a second
        await trio.sleep(0.25)
        shown = meter.sent((1000 + quarter * 5) * MIB)
    assert shown.rate == 20 * MIB
    assert (shown.done, shown.total) == (1080 * MIB, 1080 * MIB)


async def test_a_limit_is_shown_as_it_is_now_and_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    meter = PassMeter(100 * MIB, 10 * MIB)
    await trio.sleep(10)
    assert meter.sent(100 * MIB).limit == 10 * MIB
    meter.limit = 20 * MIB
    await trio.sleep(5)
    assert meter.sent(200 * MIB).limit == 20 * MIB
    assert meter.summary() == "200 MiB in 15 s, 13.3 MiB/s (limit 20 MiB/s)"
    assert PassMeter(0, None).summary() == "0 B in 1 ms, 0 B/s"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            {"rate": 98.5 * MIB, "limit": 100 * MIB},
            "first pass: 1 MiB of 4 MiB (25 %), 98.5 MiB/s (limit 100 MiB/s)",
        ),
        ({"rate": 98.5 * MIB, "limit": None}, "first pass: 1 MiB of 4 MiB (25 %), 98.5 MiB/s"),
        ({"rate": None, "limit": 100 * MIB}, "first pass: 1 MiB of 4 MiB (25 %)"),
        ({}, "first pass: 1 MiB of 4 MiB (25 %)"),
    ],
)
def test_people_read_both_where_there_are_both(made: dict[str, Any], said: str) -> None:
    progress = {"phase": "first pass", "done_bytes": MIB, "total_bytes": 4 * MIB, **made}
    assert words.progress({"progress": progress}) == said


def test_the_control_interface_has_all_of_it() -> None:
    shown = Progress("first pass", 1, 2, 3.14159, 4).show()
    assert shown == {"phase": "first pass", "done_bytes": 1, "total_bytes": 2, "rate": 3.1, "limit": 4}


# The key of the configuration.


@pytest.mark.parametrize(("value", "speed"), [("100MiB/s", 100 * MIB), (" 1.5 GiB / s", 1536 * MIB)])
def test_a_speed_is_a_size_by_the_second(value: str, speed: int) -> None:
    assert Rate(MIB, 1 << 40).read(value) == speed


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("100MiB", "write /s after the size"),
        ("100MiB/min", "write /s after the size"),
        ("100MB/s", "'MB' is not a unit of size"),
        ("1KiB/s", "is not from 1 MiB/s to 1 TiB/s"),
        ("/s", "is not a size"),
        (100, "is not a speed like"),
        (True, "is not a speed like"),
    ],
)
def test_what_is_no_speed_is_refused_with_the_reason(value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rate(MIB, 1 << 40).read(value)
