"""A KVM guest's disk on two hosts with disks of their own (I4)."""

from __future__ import annotations

import re

from .host import Host
from .lab import Lab
from .steps import VM, WRITER
from .test_scenarios import protected_between

_COMMITTED = 10
_BYTES = 4 << 20
_NUMBER = re.compile(r"curling disk=vda writer=0 number=(\d+) bad=0$")
_WITHIN = 180


async def test_a_disk_is_of_the_memorys_moment_when_its_host_is_lost_and_the_lost_hosts_is_put_right(
    lab: Lab,
) -> None:
    await lab.power_on(*[host for host in lab.hosts if host.pid is None])
    (image,) = WRITER.disks
    await lab.on_each(lambda host: lab.script(host, f"rm -f {image}; truncate --size={_BYTES} {image}"))
    await lab.protected(WRITER)
    await lab.committed(lab.alpha, _COMMITTED)
    start = len(lab.beta.guest_console.lines())
    last = numbers(lab.alpha)[-1]
    await lab.lose_power(lab.alpha)
    await lab.wait_state(lab.beta, "active", "connecting", "unprotected")
    await reaches(lab.beta, start, last)
    await checks_its_disk(lab, lab.beta)

    await lab.power_on(lab.alpha)
    await protected_between(lab, lab.beta, lab.alpha)
    start, last = len(lab.alpha.guest_console.lines()), numbers(lab.beta)[-1]
    await lab.ctl(lab.beta, "switch", VM, "--confirm", VM)
    await reaches(lab.alpha, start, last)
    await checks_its_disk(lab, lab.alpha)


def numbers(host: Host) -> list[int]:
    """How far the guest has come with its disk, as it said on `host`."""
    return [int(found[1]) for line in host.guest_console.lines() if (found := _NUMBER.search(line))]


async def reaches(host: Host, start: int, number: int) -> None:
    """Wait until the guest has come as far as `number`, in what it has said since line `start`."""
    console, reached = host.guest_console, 0
    while reached < number:
        line = await console.wait_line("curling disk=vda writer=0 number=", start=start, within=_WITHIN)
        start = console.lines().index(line, start) + 1
        found = _NUMBER.search(line)
        assert found, line
        reached = int(found[1])


async def checks_its_disk(lab: Lab, host: Host) -> None:
    """Have the guest compare every block of its disk with its memory."""
    console = host.guest_console
    start = len(console.lines())
    path = (await host.agent.run("ss -Hxl | grep -o '/[^ ]*console.sock'")).stdout.strip()
    async with host.agent.connect(path) as running:
        await running.input(b"v")
        checked = "curling disk=vda writer=0 checked="
        line = await console.wait_line(checked, start=start, within=_WITHIN)
    lab.timeline.note("guest", f"on {host.name}: {line}")
    assert line.endswith(" bad=0"), line
    assert not [line for line in console.lines() if "curling bad disk" in line]
