"""What the guest's clock sees of its checkpoints.

A guest that reads the time from kvm-clock loses every moment it stands still: QEMU stops that clock with the
guest. One that reads the TSC loses nothing, for the TSC goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .calls import call
from .lab import RECORDS, Lab
from .steps import VM, guest_command

#: Seconds over which a clock is watched.
_SPAN = 15.0

#: `longest_epoch` by default: the drift is to be that of who has not said otherwise.
_DEFAULT_EPOCH = "100ms"

#: Starts the guest; see `lab.configure`.
_SCRIPT = "/usr/local/sbin/start-guest"

#: docs/operations.md recommends these two words for the kernel's command line in a guest.
_TSC = "clocksource=tsc tsc=reliable"


async def rate(lab: Lab) -> float:
    """Seconds of the guest's clock for each second of a clock outside, over `_SPAN` seconds."""
    console = lab.alpha.guest_console
    first = await console.next_round()
    began = lab.clocks.now()
    while lab.clocks.now() < began + _SPAN:
        last = await console.next_round()
    seconds = lab.clocks.now() - began
    return (last.uptime_ms - first.uptime_ms) / 1000 / seconds


async def guest_with(lab: Lab, clocksource: str) -> None:
    """A new guest on alpha that reads the time from `clocksource`, not protected yet."""
    command = guest_command()
    if clocksource == "tsc":
        command = command.replace(" curling.pages=", f" {_TSC} curling.pages=")
        assert _TSC in command
    await lab.alpha.agent.write(_SCRIPT, f"#!/bin/sh -e\n{command}", mode=0o755)
    await lab.afresh()


@pytest.mark.parametrize("clocksource", ["kvm-clock", "tsc"])
async def test_the_guests_clock_loses_what_the_guest_stands_still_unless_it_is_the_tsc(
    lab: Lab, clocksource: str
) -> None:
    await guest_with(lab, clocksource)
    try:
        alone = await rate(lab)
        await call(lab.alpha.agent, "Protect", {"name": VM})
        await call(lab.alpha.agent, "Tune", {"name": VM, "longest_epoch": _DEFAULT_EPOCH})
        await lab.committed(lab.alpha, 20)
        protected = await rate(lab)
        statistics = (await lab.show(lab.alpha))["statistics"]
        stopped = statistics["stop_ms_p50"] / 1000 * statistics["checkpoints_per_s"]
        found = {
            "clocksource": clocksource,
            "rate_alone": alone,
            "rate_protected": protected,
            "stopped_part": stopped,
            "drift_s_per_h": (1 - protected) * 3600,
        }
        lab.timeline.note("test", json.dumps(found))
        kept = Path(RECORDS / f"time-{clocksource}.json")
        kept.write_text(json.dumps(found) + "\n")
        assert alone == pytest.approx(1, abs=0.03), "without checkpoints the clock is right"
        lost = 1 - protected
        if clocksource == "tsc":
            assert lost == pytest.approx(0, abs=0.03)
        else:
            # The median stop is shorter than the mean one.
            assert 0.05 < stopped < lost * 1.2
    finally:
        # For the next guest; this one is not to be found protected by other tests.
        await lab.alpha.agent.write(_SCRIPT, f"#!/bin/sh -e\n{guest_command()}", mode=0o755)
        await call(lab.alpha.agent, "Unprotect", {"name": VM})
