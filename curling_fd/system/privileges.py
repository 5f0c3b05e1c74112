"""Dropping the capabilities curlingd does not need."""

from __future__ import annotations


def drop() -> None:
    """Placeholder until the list is measured."""
