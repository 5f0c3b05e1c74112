"""Every engine, on every QEMU it is for: the guest loses its host and goes on at the backup."""

from __future__ import annotations

import pytest
import trio

from curling_fd.capture.settings import capabilities
from curling_fd.qmp.client import QmpClient
from tests.integration.stage import ROUND, VM, stage
from tests.lab.guests import BootSectorGuest, Guest, LinuxGuest
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

LINUX = LinuxGuest(pages=1024, dirty=64, memory="128M")
CHECKPOINTS = 10

CASES = [
    # QEMU, accelerator, guest, what the configuration says, the engine, a word of the reason
    pytest.param("system", "tcg", LINUX, "auto", "snapshot", "deadlocks", id="7.2-tcg-auto-is-snapshot"),
    pytest.param("system", "tcg", LINUX, "precopy", "precopy", "asked for", id="7.2-tcg-precopy"),
    pytest.param(
        "system", "kvm", BootSectorGuest(), "auto", "incremental", "only what changed",
        id="7.2-kvm-auto-is-incremental", marks=pytest.mark.kvm,
    ),
    pytest.param("trixie", "tcg", LINUX, "auto", "snapshot", "10.0", id="10.0-tcg-auto-is-snapshot"),
    pytest.param(
        "unstable", "tcg", LINUX, "auto", "incremental", "only what changed", id="11-tcg-auto-is-incremental"
    ),
]  # fmt: skip


@pytest.mark.qemu
@pytest.mark.parametrize(("qemu", "accel", "guest", "wanted", "engine", "reason"), CASES)
async def test_a_guest_loses_its_host_and_goes_on(
    qemu: str, accel: str, guest: Guest, wanted: str, engine: str, reason: str, request: pytest.FixtureRequest
) -> None:
    executable: Executable = request.getfixturevalue(f"{qemu}_qemu")
    async with stage(LabVm(qemu=executable, accel=accel, guest=guest), engine=wanted) as here:
        shown = await here.protect(CHECKPOINTS)
        assert (shown["engine"], shown["accelerator"]) == (engine, accel)
        assert reason in shown["engine_reason"]
        assert shown["qemu_version"] == ".".join(map(str, executable.version))
        there = await here.backup.show(VM)
        assert there["state"] == "standby"
        for key in ("engine", "engine_reason", "accelerator", "qemu_version"):
            assert there[key] == shown[key]
        here.lose_alpha()
        taken = await here.taken_over()
        assert taken["generation"] > shown["generation"]
        await here.goes_on()


@pytest.mark.qemu
async def test_an_engine_that_fails_at_run_time_is_replaced_by_the_next(unstable_qemu: Executable) -> None:
    """Its migration ends `completed` where `colo` was due, as that of a build does whose COLO is broken.

    Here it does so because somebody takes the capability away just before it starts.
    """
    async with stage(LabVm(qemu=unstable_qemu, guest=LINUX)) as here, here.operator() as operator:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_colo_away, operator)
            shown = await here.protect(3)
        assert shown["engine"] == "snapshot"
        assert "`completed` instead of entering COLO" in shown["engine_reason"]
        assert here.happened(here.primary, "capture-failed") == 1
        assert (await here.vm.console.next_round(within=ROUND)).corrupt == 0
        here.lose_alpha()
        await here.taken_over()
        await here.goes_on()


async def take_colo_away(operator: QmpClient) -> None:
    """Turn `x-colo` off as soon as it is on."""
    off = [{"capability": "x-colo", "state": False}]
    with trio.fail_after(60):
        while not (await capabilities(operator))["x-colo"]:
            pass
        await operator.execute("migrate-set-capabilities", {"capabilities": off})
