"""What happens to two real hosts, and what becomes of the guest. Every fault is seen to have happened."""

from __future__ import annotations

import json
from typing import Any

import trio

from .host import Host
from .lab import PORTS, Lab
from .steps import VM

#: Where the VM runs and no checkpoint is taken, for the moment.
_ALONE = ("active", "unprotected", "connecting", "syncing", "holding")

#: Rounds of the guest after which it surely goes on.
_GOES_ON = 20

#: Checkpoints that are minutes' work in a lab.
_MANY = 150


async def main_pid(host: Host) -> int:
    """The process id of curlingd."""
    done = await host.agent.run("systemctl show --value --property=MainPID curlingd")
    return int(done.stdout)


async def events(host: Host, event: str) -> int:
    """How often curlingd has told of that event of the VM, over all its lives since the host has booted."""
    journal = [
        "journalctl",
        "--boot",
        "--quiet",
        "--output=cat",
        "--unit=curlingd",
        f"--grep=^{VM}: {event}: ",
    ]
    done = await host.agent.run(journal, check=False)
    return len(done.stdout.splitlines())


async def runs_on(lab: Lab, host: Host, *, rounds: int = _GOES_ON) -> None:
    """See the guest make progress on `host`, its memory as it should be."""
    console = host.guest_console
    start = len(console.lines())
    first = await console.wait_round(0, start=start, within=120)
    last = await console.wait_round(first.number + rounds, start=start, within=180)
    assert first.corrupt == last.corrupt == 0
    lab.timeline.note("guest", f"on {host.name}: {first} ... {last}")


async def silent(lab: Lab, host: Host, other: Host) -> None:
    """See the guest make progress on `other`, and none on `host` meanwhile."""
    before = len(host.guest_console.lines())
    await runs_on(lab, other)
    assert host.guest_console.lines()[before:] == []


async def protected_between(lab: Lab, primary: Host, backup: Host) -> dict[str, Any]:
    """Wait until the VM runs on `primary` and `backup` has a valid replica."""
    shown = await lab.wait_state(primary, "protected", within=300)
    there = await lab.wait_state(backup, "standby", within=60)
    assert there["generation"] == shown["generation"]
    return shown


async def more_checkpoints(lab: Lab, host: Host, count: int = 5) -> None:
    """Wait until `count` more checkpoints of the running session are committed."""
    now = (await lab.show(host))["statistics"]["committed"]
    await lab.committed(host, now + count)


async def test_curlingd_is_restarted_on_either_host_and_the_session_goes_on(lab: Lab) -> None:
    await lab.protected()
    before = await lab.show(lab.alpha)
    passes = await events(lab.alpha, "prepared")
    for host in lab.hosts:
        old, taken = await main_pid(host), await events(host, "taken-up")
        seen = lab.alpha.guest_console.rounds()[-1]
        await host.agent.run("systemctl restart curlingd")
        new = await main_pid(host)
        assert new not in (0, old), "it was restarted"
        assert await events(host, "taken-up") == taken + 1
        lab.timeline.note("test", f"curlingd on {host.name}: process {old}, then {new}")
        await more_checkpoints(lab, lab.alpha)
        assert lab.alpha.guest_console.rounds()[-1].number > seen.number
    after = await protected_between(lab, lab.alpha, lab.beta)
    assert after["generation"] == before["generation"]
    assert after["statistics"]["committed"] > before["statistics"]["committed"]
    assert await events(lab.alpha, "prepared") == passes, "no new session, no first pass"
    await runs_on(lab, lab.alpha)


async def test_a_clock_that_is_set_by_an_hour_on_either_host_changes_nothing(lab: Lab) -> None:
    await lab.protected()
    before = await lab.show(lab.alpha)
    lost = [await events(host, "link-lost") for host in lab.hosts]
    for host, step in zip(lab.hosts, ("+1 hour", "-1 hour"), strict=True):
        told = await host.agent.run(
            [
                "/bin/sh",
                "-c",
                f"date +%s; date --set='{step}' >/dev/null; date +%s; timedatectl 2>/dev/null || :",
            ]
        )
        was, now = map(int, told.stdout.split()[:2])
        assert abs(now - was) in range(3595, 3606), "the clock was set"
        lab.timeline.note("test", f"the clock of {host.name} was set from {was} to {now}")
        await more_checkpoints(lab, lab.alpha)
    after = await protected_between(lab, lab.alpha, lab.beta)
    assert after["generation"] == before["generation"]
    assert after["statistics"]["committed"] > before["statistics"]["committed"]
    assert [await events(host, "link-lost") for host in lab.hosts] == lost
    await runs_on(lab, lab.alpha)
    for host, step in zip(lab.hosts, ("-1 hour", "+1 hour"), strict=True):
        await host.agent.run(["date", f"--set={step}"])
        await more_checkpoints(lab, lab.alpha)


async def test_a_planned_switch_there_and_back_loses_nothing(lab: Lab) -> None:
    await lab.protected()
    here, there = lab.hosts
    for _ in range(2):
        generation = (await lab.show(here))["generation"]
        start = len(there.guest_console.lines())
        await lab.ctl(here, "switch", VM, "--confirm", VM)
        last = here.guest_console.rounds()[-1]
        first = await there.guest_console.wait_round(0, start=start, within=120)
        lab.timeline.note("guest", f"last on {here.name}: {last}; first on {there.name}: {first}")
        # The line that was being printed at the switch may be cut in two between the consoles.
        assert last.number < first.number <= last.number + 2, "nothing is lost, nothing is done twice"
        shown = await protected_between(lab, there, here)
        assert shown["generation"] == generation + 1
        await silent(lab, here, there)
        here, there = there, here


async def test_curlingd_is_ended_by_sigsegv_and_protection_comes_back_by_itself(lab: Lab) -> None:
    for host in lab.hosts:
        await lab.protected()
        old = await main_pid(host)
        await host.agent.run(["kill", "-SEGV", str(old)])
        await runs_on(lab, lab.alpha)
        with trio.fail_after(60):
            while (await main_pid(host)) in (0, old):
                await host.agent.run(["sleep", "0.2"])
        journal = [
            "journalctl",
            "--boot",
            "--quiet",
            "--output=cat",
            "--grep=status=11/SEGV",
            "--unit=curlingd",
        ]
        assert (await host.agent.run(journal)).stdout
        await protected_between(lab, lab.alpha, lab.beta)
        await runs_on(lab, lab.alpha)


async def test_a_frozen_curlingd_is_ended_by_the_watchdog_and_the_guest_runs_on(lab: Lab) -> None:
    await lab.protected()
    short = "/run/systemd/system/curlingd.service.d/watchdog.conf"
    await lab.alpha.agent.write(short, "[Service]\nWatchdogSec=8s\n")
    await lab.alpha.agent.run("systemctl daemon-reload && systemctl restart curlingd")
    await protected_between(lab, lab.alpha, lab.beta)
    old = await main_pid(lab.alpha)
    await lab.alpha.agent.run(["kill", "-STOP", str(old)])
    state = (await lab.alpha.agent.run(["ps", "-o", "stat=", "-p", str(old)])).stdout
    assert state.startswith("T"), "it is frozen"
    await runs_on(lab, lab.alpha)
    with trio.fail_after(120):
        while (await main_pid(lab.alpha)) in (0, old):
            await lab.alpha.agent.run(["sleep", "0.2"])
    journal = [
        "journalctl",
        "--boot",
        "--quiet",
        "--output=cat",
        "--grep=Watchdog timeout",
        "--unit=curlingd",
    ]
    assert (await lab.alpha.agent.run(journal)).stdout
    await protected_between(lab, lab.alpha, lab.beta)
    await runs_on(lab, lab.alpha)
    await lab.alpha.agent.run(f"rm {short} && systemctl daemon-reload && systemctl restart curlingd")
    await protected_between(lab, lab.alpha, lab.beta)


async def test_a_backup_that_runs_out_of_memory_ends_protection_and_says_so(lab: Lab) -> None:
    await lab.protected()
    now = "systemctl show --value --property=MemoryCurrent curlingd"
    used = int((await lab.beta.agent.run(now)).stdout)
    limit = used // 2
    await lab.beta.agent.run(
        f"systemctl set-property --runtime curlingd.service MemoryMax={limit} MemorySwapMax=0"
    )
    try:
        kernel = [
            "journalctl",
            "--boot",
            "--quiet",
            "--dmesg",
            "--output=cat",
            "--grep=Memory cgroup out of memory",
        ]
        assert (await lab.beta.agent.run(kernel)).stdout, "the kernel killed what had too much"
        # It killed curlingd, whose the images are. The next one sees beforehand that there is too little.
        reason = ""
        with trio.fail_after(120):
            while "memory" not in reason:
                shown = await lab.wait_state(lab.alpha, "unprotected")
                reason = str(shown["reason"])
        lab.timeline.note("test", f"of {used} bytes {limit} were allowed; alpha says: {reason}")
        await runs_on(lab, lab.alpha)
        assert (await lab.beta.agent.run("systemctl is-active curlingd")).stdout.strip() == "active"
    finally:
        await lab.beta.agent.run(
            "systemctl set-property --runtime curlingd.service MemoryMax=infinity MemorySwapMax=infinity"
        )
    await protected_between(lab, lab.alpha, lab.beta)
    await runs_on(lab, lab.alpha)


async def test_the_cable_between_the_hosts_is_cut_and_exactly_one_runs_the_guest(lab: Lab) -> None:
    await lab.protected()
    generation = (await lab.show(lab.alpha))["generation"]
    before = await lab.cables.statistics()
    await lab.cables.cut("link.alpha")
    decided = [*_ALONE, "fenced", "idle"]
    states = {}
    with trio.fail_after(180):
        while True:
            for host in lab.hosts:
                shown = await lab.show(host)
                states[host.name] = (shown["state"], shown["generation"])
            settled = all(state in decided and state != "holding" for state, _ in states.values())
            if settled and max(number for _, number in states.values()) == generation + 1:
                break
            await lab.alpha.agent.run(["sleep", "0.5"])
    lab.timeline.note("test", f"decided: {states}")
    winners = [host for host in lab.hosts if states[host.name][0] in _ALONE]
    assert len(winners) == 1, states
    (winner,) = winners
    loser = lab.other(winner)
    after = await lab.cables.statistics()
    assert after["link.alpha"]["dropped"] > before["link.alpha"]["dropped"], "frames were lost in the cut"
    await silent(lab, loser, winner)
    await lab.cables.heal(*PORTS)
    await protected_between(lab, winner, loser)
    await silent(lab, loser, winner)


async def test_the_backups_host_loses_power_the_guest_runs_on_and_is_protected_again(lab: Lab) -> None:
    await lab.protected()
    await lab.lose_power(lab.beta)
    assert lab.beta.pid is None
    await lab.wait_state(lab.alpha, "unprotected", "connecting")
    await runs_on(lab, lab.alpha)
    await lab.power_on(lab.beta)
    await protected_between(lab, lab.alpha, lab.beta)
    await runs_on(lab, lab.alpha)


async def test_a_lost_primary_that_comes_back_does_not_start_the_guest_and_becomes_the_backup(
    lab: Lab,
) -> None:
    await lab.protected()
    before = await lab.show(lab.alpha)
    await lab.lose_power(lab.alpha)
    await lab.wait_state(lab.beta, "active", "connecting", "unprotected")
    await runs_on(lab, lab.beta)
    await lab.power_on(lab.alpha)
    shown = await protected_between(lab, lab.beta, lab.alpha)
    assert shown["generation"] > before["generation"]
    assert not (await lab.alpha.agent.run("systemctl is-active lab-guest", check=False)).stdout.startswith(
        "active"
    )
    await silent(lab, lab.alpha, lab.beta)
    await lab.ctl(lab.beta, "switch", VM, "--confirm", VM)
    await protected_between(lab, lab.alpha, lab.beta)


async def test_a_guest_is_checkpointed_for_minutes(lab: Lab) -> None:
    await lab.protected()
    lab.say(f"{_MANY} checkpoints")
    before = await events(lab.alpha, "prepared")
    shown = await lab.committed(lab.alpha, _MANY, within=900)
    assert shown["state"] == "protected"
    assert await events(lab.alpha, "prepared") == before, "it was one session"
    await runs_on(lab, lab.alpha)
    lab.timeline.note("test", f"statistics: {json.dumps(shown['statistics'])}")
