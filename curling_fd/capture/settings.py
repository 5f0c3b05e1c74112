"""Migration capabilities and parameters of a QEMU, set for a while and put back as they were."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio

from curling_fd.errors import QmpCommandFailed, QmpError
from curling_fd.qmp.client import QmpClient

#: Bytes per second; far above any link, so that our own backpressure sets the speed, not QEMU's default.
_UNTHROTTLED = 1 << 40

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


@asynccontextmanager
async def migration_settings(
    qmp: QmpClient, wanted: Mapping[str, bool], parameters: Mapping[str, int] | None = None
) -> AsyncIterator[None]:
    """Inside the block these capabilities and parameters hold; afterwards what held before.

    Raises:
        QmpCommandFailed: QEMU refuses the combination; nothing was changed.
    """
    before = await capabilities(qmp)
    changed = {name: state for name, state in wanted.items() if before.get(name) != state}
    known = await qmp.execute("query-migrate-parameters")
    new = {"max-bandwidth": _UNTHROTTLED, "downtime-limit": _DOWNTIME_LIMIT, **(parameters or {})}
    old = {name: known[name] for name in new if name in known}
    await set_capabilities(qmp, changed)
    try:
        await qmp.execute("migrate-set-parameters", new)
        yield
    finally:
        with trio.CancelScope(shield=True):
            await _put_back(qmp, {name: before.get(name, False) for name in changed}, old)


async def _put_back(qmp: QmpClient, changed: Mapping[str, bool], old: Mapping[str, int]) -> None:
    try:
        await set_capabilities(qmp, changed)
        await qmp.execute("migrate-set-parameters", dict(old))
    except QmpCommandFailed:
        pass  # somebody started a migration of his own: his settings now
    except QmpError:
        pass  # QEMU is gone
