"""Rounds: every variant at every load in turn, over and over, until the ratios between them stand still."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import trio
from attrs import define, field

from bench.figures import median, percentile, spread
from bench.machine import Usage, wait_quiet
from bench.stops import Bench, Load, Variant, Visit

#: The guest's own kernel dirties 40 to 70 pages more in an epoch. An epoch is long enough to take, ship and
#: commit its checkpoint before the next, on two cores: what is compared is the stop, not a queue.
LOADS = (
    Load("0.25k", 200, 0.05),
    Load("1k", 945, 0.05),
    Load("10k", 9930, 0.12),
    Load("30k", 29_930, 0.35),
)

#: Checkpoints of one visit, after the warm-up; three rounds make more than the 50 that a median shall have.
PER_VISIT = 20

#: Rounds each load gets at least and at most.
LEAST, MOST = 3, 8

#: CPUs' worth of other programs' work from which on a visit counts as disturbed, and how many such visits are
#: made a second time.
DISTURBED, AGAIN = 0.25, 10

#: A ratio stands still when half the distance between the quartiles of its rounds is below this part of it.
STABLE = 0.03


@define
class Series:
    """All visits of one variant at one load."""

    visits: list[Visit] = field(factory=list)

    @property
    def stops(self) -> list[float]:
        return [stop for visit in self.visits for stop in visit.stops]

    def medians(self) -> list[float]:
        """Of each round."""
        return [median(visit.stops) for visit in self.visits]

    def row(self) -> dict[str, Any]:
        """For the results."""
        stops = self.stops
        names = {name for visit in self.visits for name in visit.details}
        return {
            "checkpoints": len(stops),
            "pages_p50": median([count for visit in self.visits for count in visit.pages]),
            "stop_ms_p50": median(stops),
            "stop_ms_p90": percentile(stops, 90),
            "stop_ms_p99": percentile(stops, 99),
            "stop_ms_max": max(stops),
            "round_medians_ms": self.medians(),
            "stops_ms": stops,
            "details": {
                name: median([visit.details[name] for visit in self.visits if name in visit.details])
                for name in sorted(names)
            },
        }


async def run_rounds(
    bench: Bench,
    loads: Sequence[Load],
    variants: Sequence[Variant],
    budget: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Visit until every load is stable, has had `MOST` rounds, or `budget` seconds are over.

    Returns:
        A row per load: its series by variant, and the ratio of `curling` (and of `engine`) to the others.
    """
    until = time.monotonic() + budget
    series = {(load.name, variant.name): Series() for load in loads for variant in variants}
    disturbed = {load.name: 0 for load in loads}
    longest, again = 0.0, AGAIN
    for number in range(MOST):
        # Another order in each round, so that none always comes after the same one.
        order = [*variants[number % len(variants) :], *variants[: number % len(variants)]]
        started = time.monotonic()
        for load in loads:
            if number >= LEAST and _stable(series, load, variants):
                continue
            await bench.vm.send(f"d {load.pages}")
            for variant in order:
                visit, foreign = await _visit(bench, load, variant)
                if foreign > DISTURBED and again > 0:
                    again -= 1
                    visit, foreign = await _visit(bench, load, variant)
                disturbed[load.name] += foreign > DISTURBED
                series[load.name, variant.name].visits.append(visit)
                say(
                    f"round {number + 1}, {load.name}, {variant.name}: {median(visit.stops):.2f} ms, "
                    f"{median(visit.pages):.0f} pages"
                )
        longest = max(longest, time.monotonic() - started)
        if number + 1 >= LEAST and all(_stable(series, load, variants) for load in loads):
            break
        if number + 1 >= LEAST and time.monotonic() + longest > until:
            break
    return [
        {
            "load": load.name,
            "epoch_ms": load.epoch * 1000,
            "rounds": len(series[load.name, variants[0].name].visits),
            "disturbed_visits": disturbed[load.name],
            "variants": {variant.name: series[load.name, variant.name].row() for variant in variants},
            "ratios": {
                f"{one}/{other}": _ratio(series, load, one, other)
                for one in ("curling", "engine")
                for other in ("floor", "stock")
            },
        }
        for load in loads
    ]


async def _visit(bench: Bench, load: Load, variant: Variant) -> tuple[Visit, float]:
    """A visit, and how many CPUs' worth of other programs ran meanwhile."""
    await trio.to_thread.run_sync(wait_quiet)
    before = Usage.now()
    visit = await variant.visit(bench, load, PER_VISIT)
    return visit, Usage.now().foreign_since(before)


def _ratios(series: dict[tuple[str, str], Series], load: Load, one: str, other: str) -> list[float]:
    """Round by round: what disturbs one visit is likely to disturb its neighbours."""
    above, below = series[load.name, one].medians(), series[load.name, other].medians()
    return [first / second for first, second in zip(above, below, strict=True)]


def _ratio(series: dict[tuple[str, str], Series], load: Load, one: str, other: str) -> dict[str, float]:
    ratios = _ratios(series, load, one, other)
    return {
        "median": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "spread": spread(ratios),
        "of_all": median(series[load.name, one].stops) / median(series[load.name, other].stops),
    }


def _stable(series: dict[tuple[str, str], Series], load: Load, variants: Sequence[Variant]) -> bool:
    return all(spread(_ratios(series, load, "curling", other)) < STABLE for other in ("floor", "stock"))
