"""Which engine suits a QEMU: decided from what it says of itself, before the guest is touched.

The table of builds is measured (docs/qemu-builds.md): a COLO primary deadlocks under TCG before QEMU 11,
and from 10.0.0 to 10.0.6 and 10.1.0 to 10.1.2 never enters its checkpoint loop (fixed by "migration: Fix
transition to COLO state from precopy").
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from curling_fd.errors import EngineUnavailable

Version = tuple[int, int, int]

#: First and last version of builds that accept `x-colo` and then complete the migration instead.
_NEVER_ENTERS = (((10, 0, 0), (10, 0, 6)), ((10, 1, 0), (10, 1, 2)))

#: Before this version a COLO primary deadlocks under TCG within a few checkpoints.
_TCG_WORKS = (11, 0, 0)

#: From this version on COLO is refused without the `return-path` capability.
RETURN_PATH = (11, 0, 0)


@frozen
class Choice:
    """An engine and the reason for it, in words for people. `accelerator` is `kvm` or `tcg`."""

    engine: str
    reason: str
    accelerator: str
    version: Version
    return_path: bool


def why_not_incremental(version: Version, accelerator: str, capabilities: frozenset[str]) -> str | None:
    """Why this QEMU cannot do `incremental`, or None if it can."""
    text = ".".join(map(str, version))
    if "x-colo" not in capabilities:
        return f"QEMU {text} is built without COLO"
    if any(first <= version <= last for first, last in _NEVER_ENTERS):
        return f"COLO is broken in QEMU {text} (fixed in 10.0.7 and 10.1.3)"
    if accelerator == "tcg" and version < _TCG_WORKS:
        return f"COLO deadlocks in QEMU {text} under TCG"
    return None


def choose(
    wanted: str,
    version: Version,
    accelerator: str,
    capabilities: frozenset[str],
    *,
    background_snapshot: str | None,
    unusable: Mapping[str, str],
) -> Choice:
    """The engine to use.

    Args:
        wanted: `auto` or the name of an engine.
        capabilities: names from `query-migrate-capabilities`.
        background_snapshot: None if QEMU took that capability when tried, else its reason.
        unusable: engines that failed at run time, and how.

    Raises:
        EngineUnavailable: the one asked for cannot work here.
    """

    def choice(engine: str, reason: str) -> Choice:
        return Choice(engine, reason, accelerator, version, return_path=version >= RETURN_PATH)

    not_incremental = why_not_incremental(version, accelerator, capabilities)
    not_snapshot = background_snapshot and f"no background snapshots: {background_snapshot}"
    if wanted == "incremental" and not_incremental:
        raise EngineUnavailable(wanted, not_incremental)
    if wanted == "snapshot" and background_snapshot:
        raise EngineUnavailable(wanted, background_snapshot)
    if wanted != "auto":
        return choice(wanted, "asked for by the configuration")
    not_incremental = not_incremental or unusable.get("incremental")
    not_snapshot = not_snapshot or unusable.get("snapshot")
    if not_incremental is None:
        return choice("incremental", "QEMU sends only what changed")
    if not_snapshot is None:
        return choice("snapshot", not_incremental)
    return choice("precopy", f"{not_incremental}; {not_snapshot}")
