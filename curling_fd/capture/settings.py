"""Migration capabilities and parameters of a QEMU, set for a while and put back as they were."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio
from attrs import frozen

from curling_fd.errors import QmpCommandFailed, QmpError
from curling_fd.qmp.client import QmpClient

#: Bytes per second; far above any link, so that our own backpressure sets the speed, not QEMU's default.
UNTHROTTLED = 1 << 40

#: Milliseconds the guest may stand still at the end of a first pass.
_DOWNTIME_LIMIT = 300


async def capabilities(qmp: QmpClient) -> dict[str, bool]:
    """Every migration capability this QEMU knows, and whether it is on."""
    answer = await qmp.execute("query-migrate-capabilities")
    return {entry["capability"]: entry["state"] for entry in answer}


async def set_capabilities(qmp: QmpClient, wanted: Mapping[str, bool]) -> None:
    if wanted:
        entries = [{"capability": name, "state": state} for name, state in wanted.items()]
        await qmp.execute("migrate-set-capabilities", {"capabilities": entries})


async def set_bandwidth(qmp: QmpClient, bandwidth: int) -> None:
    """How fast QEMU may write a migration, in bytes a second; also one that is under way."""
    await qmp.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})


@frozen
class Before:
    """What held before ours: capabilities and parameters to be put back."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, int]


@asynccontextmanager
async def migration_settings(
    qmp: QmpClient, wanted: Mapping[str, bool], parameters: Mapping[str, int] | None = None
) -> AsyncIterator[Before]:
    """Inside the block these capabilities and parameters hold; afterwards what held before.

    Raises:
        QmpCommandFailed: QEMU refuses the combination; nothing was changed.
    """
    before = await capabilities(qmp)
    changed = {name: state for name, state in wanted.items() if before.get(name) != state}
    known = await qmp.execute("query-migrate-parameters")
    new = {"max-bandwidth": UNTHROTTLED, "downtime-limit": _DOWNTIME_LIMIT, **(parameters or {})}
    old = {name: known[name] for name in new if name in known}
    found = Before({name: before.get(name, False) for name in changed}, old)
    await set_capabilities(qmp, changed)
    try:
        await qmp.execute("migrate-set-parameters", new)
        yield found
    finally:
        with trio.CancelScope(shield=True):
            await put_back(qmp, found)


async def put_back(qmp: QmpClient, before: Before) -> None:
    """Have QEMU's settings as they were."""
    try:
        await set_capabilities(qmp, before.capabilities)
        await qmp.execute("migrate-set-parameters", dict(before.parameters))
    except QmpCommandFailed:
        pass  # somebody started a migration of his own: his settings now
    except QmpError:
        pass  # QEMU is gone
