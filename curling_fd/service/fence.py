"""Stopping a VM on this host, because another one has the right to run it (I3)."""

from __future__ import annotations

import logging

import trio

from curling_fd.capture.recover import recover
from curling_fd.errors import CaptureError, ConfigError, QmpError, QmpUnreachable
from curling_fd.failover.states import State
from curling_fd.qmp.client import open_qmp
from curling_fd.service.handover import quit_qemu
from curling_fd.service.record import VmRecord, text

#: Seconds between two attempts to stop a VM that must not run.
_AGAIN = 1.0


async def stop_here(record: VmRecord, reason: str, *, outright: bool) -> None:
    """Stop the fenced VM of `record`; returns when it stands still, is gone, or is fenced no more.

    Args:
        reason: why, for people, and for the next daemon.
        outright: end its QEMU: in the middle of a handover it stands still, and to recover would start it.
    """
    try:
        record.remember(fenced=reason, wanted=False)
    except ConfigError as error:
        record.note("not-remembered", text(error), level=logging.ERROR)
    while record.qmp is not None and record.state is State.FENCED:
        try:
            async with open_qmp(record.qmp) as qmp:
                if outright:
                    await quit_qemu(qmp)
                else:
                    await recover(qmp)
                    await qmp.execute("stop")
        except QmpUnreachable:
            record.note("gone", f"there is no VM here to be stopped: {reason}")
            return
        except (QmpError, CaptureError) as error:
            record.note("stop-failed", f"the VM may still run here: {text(error)}", level=logging.ERROR)
            await trio.sleep(_AGAIN)
            continue
        record.note("stopped", f"the VM was stopped here: {reason}")
        return


async def guest_runs_here(record: VmRecord) -> bool:
    """Is there a VM on this host that nobody protects?"""
    if record.qmp is None:
        return False
    try:
        async with open_qmp(record.qmp) as qmp:
            return await qmp.status() == "running"
    except QmpError:
        return False


async def discard_fenced(record: VmRecord) -> None:
    """End the QEMU of a VM that runs elsewhere by right, before it can become its standby here."""
    if record.qmp is not None:
        try:
            async with open_qmp(record.qmp) as qmp:
                await quit_qemu(qmp)  # not recovered before: that could start its guest
        except QmpUnreachable:
            pass  # it is gone already
    record.remember(fenced=None, qmp=None)
