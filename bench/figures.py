"""Small statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], rank: float) -> float:
    """The value below which `rank` percent of `values` lie (nearest rank); NaN for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * rank / 100))]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle; NaN for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median: how far a typical round is off."""
    if len(values) < 2:
        return math.inf
    return (percentile(values, 75) - percentile(values, 25)) / 2 / median(values)
