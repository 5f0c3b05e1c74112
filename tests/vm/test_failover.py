"""A guest that outlives its host, and what its clients see."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

import trio

from tests.lab.connections import COUNTER, STREAM, Progress, connected, download, increment

from .calls import follow
from .client import echo
from .lab import Lab
from .steps import GUEST_ADDRESS, LONGEST_EPOCH_MS, VM

_COMMITTED = 10
_GOES_ON = 20

#: Requests of a client before its server's host is lost, and after; numbers that it downloads meanwhile.
_AFTER = 10
_BULK = 400_000

#: Milliseconds: the shortest interval of `curlingctl watch`.
_INTERVAL = 100


async def test_a_kvm_guest_is_protected_with_the_incremental_engine_and_checkpointed(lab: Lab) -> None:
    await lab.protected()
    shown = await lab.committed(lab.alpha, _COMMITTED)
    assert (shown["engine"], shown["accelerator"]) == ("incremental", "kvm")
    assert shown["qemu_version"].startswith("10.0.")
    seen = lab.alpha.guest_console.rounds()[-1]
    later = await lab.alpha.guest_console.wait_round(seen.number + _GOES_ON)
    assert later.corrupt == 0


async def test_a_client_outside_both_hosts_reaches_the_guest(lab: Lab) -> None:
    await lab.protected()
    before = (await lab.cables.statistics())["front.client"]["in_frames"]
    number = await echo(lab.client, GUEST_ADDRESS)
    lab.timeline.note("client", f"{GUEST_ADDRESS} answered request {number}")
    assert (await lab.cables.statistics())["front.client"]["in_frames"] > before


async def test_the_primarys_host_loses_power_and_the_guest_goes_on_at_the_backup(lab: Lab) -> None:
    await lab.protected()
    generation = (await lab.show(lab.alpha))["generation"]
    start = len(lab.beta.guest_console.lines())

    told = await _watched_until_power_is_lost(lab, _COMMITTED)
    assert lab.alpha.pid is None

    first = await lab.beta.guest_console.wait_round(0, start=start, within=60)
    last = lab.alpha.guest_console.rounds()[-1]
    lab.timeline.note("guest", f"last on alpha: {last}; first on beta: {first}")
    assert first.number > 1, "the guest was started anew"

    # What the guest does not remember, by its own clock: no more than the age of the newest commit, as alpha
    # said it last, and what went by until alpha could say no more.
    back = last.uptime_ms - first.uptime_ms
    allowed = max(one["statistics"]["lag_ms"] for one in told) + _INTERVAL + LONGEST_EPOCH_MS
    lab.timeline.note("guest", f"it went back by {back} ms at most; {allowed:.0f} ms were allowed")
    assert back <= allowed

    shown = await lab.wait_state(lab.beta, "active", "connecting", "unprotected")
    assert shown["generation"] == generation + 1
    assert shown["statistics"]["committed"] >= told[-1]["statistics"]["committed"], "alpha promised more"
    claim = json.loads((lab.shared / f"{VM}.generation.{generation + 1}").read_text())
    assert claim["host"] == "beta"

    after = await lab.beta.guest_console.wait_round(last.number + _GOES_ON, start=start)
    assert after.corrupt == 0
    number = await echo(lab.client, GUEST_ADDRESS)
    lab.timeline.note("client", f"{GUEST_ADDRESS} answered request {number} at the backup")


async def test_connections_of_a_client_survive_the_loss_of_the_primarys_host(lab: Lab) -> None:
    await lab.protected()
    shown = await lab.committed(lab.alpha, _COMMITTED)
    assert shown["output"] == "plug", "the hosts' kernel has it"
    made = Progress(), Progress()
    with trio.fail_after(300):
        async with (
            connected(lab.client, GUEST_ADDRESS, COUNTER) as counter,
            connected(lab.client, GUEST_ADDRESS, STREAM) as stream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(download, stream, _BULK, made[1])
            number, after = 0, _AFTER
            while after:
                number += 1
                assert await increment(counter, made[0]) == number, "none is lost, and none is counted twice"
                if lab.alpha.pid is None:
                    after -= 1
                elif number > _AFTER and made[1].steps > _BULK // 8:
                    await lab.lose_power(lab.alpha)
    lab.timeline.note("client", f"counter: {made[0]}; download: {made[1]}")
    assert min(each.longest for each in made) > 1, "both were under way when the host was lost"
    await lab.wait_state(lab.beta, "active", "connecting", "unprotected")


async def _watched_until_power_is_lost(lab: Lab, count: int) -> list[dict[str, Any]]:
    """Take alpha's power when it has committed `count` more checkpoints; what it said of the VM before."""
    told: list[dict[str, Any]] = []
    async with aclosing(follow(lab.alpha.agent, "Watch", {"name": VM, "interval_ms": _INTERVAL})) as answers:
        async for answer in answers:
            told += answer["vms"]
            if told[-1]["statistics"]["committed"] >= told[0]["statistics"]["committed"] + count:
                break
        await lab.lose_power(lab.alpha)
    return told[-20:]
