"""A pair as README leaves it; what doctor says of what is really wrong with a host; what the journal says."""

from __future__ import annotations

import json
from typing import Any

from . import readme
from .host import Host
from .lab import Lab
from .steps import VM


async def checks_of(lab: Lab, *hosts: Host) -> list[list[dict[str, Any]]]:
    """What `curlingctl doctor` says on each of `hosts`."""
    said: dict[str, list[dict[str, Any]]] = {}

    async def ask(host: Host) -> None:
        done = await host.agent.run(["curlingctl", "--json", "doctor"], check=False, within=120)
        said[host.name] = json.loads(done.stdout)["checks"]

    await lab.on_each(ask, hosts)
    return [said[host.name] for host in hosts]


async def findings(lab: Lab, *hosts: Host) -> list[dict[str, dict[str, Any]]]:
    """What is not well on each of `hosts`, by check; each says what to do."""
    found = []
    for host, checks in zip(hosts, await checks_of(lab, *hosts), strict=True):
        found.append({check["check"]: check for check in checks if check["status"] != "ok"})
        assert all(check["remedy"] for check in found[-1].values())
        lab.timeline.note("test", f"doctor on {host.name}: {json.dumps(found[-1], indent=1)}")
    return found


async def test_the_installed_service_starts_by_socket_activation_at_the_first_curlingctl_call(
    lab: Lab,
) -> None:
    await lab.alpha.agent.run("systemctl disable --now curlingd.socket curlingd.service", check=False)
    only_the_socket = {"curlingd.socket curlingd.service": "curlingd.socket"}
    await lab.script(lab.alpha, readme.block("sh", "systemctl enable", only_the_socket))
    states = "systemctl is-active curlingd.socket curlingd.service"
    before = (await lab.alpha.agent.run(states, check=False)).stdout.split()
    assert before == ["active", "inactive"]
    assert VM in await lab.ctl(lab.alpha, "list")
    after = (await lab.alpha.agent.run(states)).stdout.split()
    assert after == ["active", "active"]


async def test_doctor_is_green_on_both_hosts(lab: Lab) -> None:
    await lab.ready()
    for checks in await checks_of(lab, *lab.hosts):
        assert [check for check in checks if check["status"] == "failed"] == []
        assert {check["check"] for check in checks if check["status"] == "ok"} >= {"kvm", "arbiter", "peer"}


async def test_a_host_without_kvm_with_a_full_run_and_a_clock_years_off_is_named_on_both(lab: Lab) -> None:
    await lab.ready()
    beta = lab.beta.agent
    await beta.run("modprobe --remove kvm_amd kvm && test ! -e /dev/kvm")
    await beta.run(
        "dd if=/dev/zero of=/run/full bs=64k 2>/dev/null; test $(stat -fc %a /run) -lt 16", check=True
    )
    await beta.run("date --set='+3 years'")
    try:
        here, there = await findings(lab, *lab.hosts)
    finally:
        await beta.run("date --set='-3 years'; rm -f /run/full; modprobe kvm_amd")
    assert "kvm" in there
    assert "kvm on beta" in here
    assert there["runtime directory"]["status"] == here["runtime directory on beta"]["status"] == "failed"
    assert here["clocks"]["status"] == there["clocks"]["status"] == "failed"


async def test_a_peers_port_that_something_else_has_is_named_on_both_hosts(lab: Lab) -> None:
    await lab.ready()
    beta = lab.beta.agent
    await beta.run("systemctl stop curlingd.service")
    squatter = [
        "systemd-run",
        "--unit=squatter",
        "python3",
        "-m",
        "http.server",
        "--bind",
        "192.0.2.2",
        "9271",
    ]
    await beta.run(squatter)
    try:
        await beta.run("while ! ss -Hltn | grep -q :9271; do sleep 0.2; done")
        (here,) = await findings(lab, lab.alpha)
        assert here["peer"]["vm"] == VM
        assert "192.0.2.2:9271" in here["peer"]["message"]
        await beta.run("systemctl start --no-block curlingd.service")
        journal = "journalctl --boot --unit=curlingd --output=cat --follow --lines=all"
        journal += " --grep='cannot listen' | head -n1"
        told = (await beta.run(journal, within=60)).stdout
        assert "192.0.2.2:9271" in told
        assert "Address already in use" in told
    finally:
        await beta.run("systemctl stop squatter; systemctl reset-failed; systemctl restart curlingd.service")


async def test_what_happened_is_in_the_journal_with_fields_and_an_explanation(lab: Lab) -> None:
    await lab.protected()
    journal = f"journalctl --boot --output=json CURLING_VM={VM} CURLING_EVENT=committed"
    lines = (await lab.alpha.agent.run(journal)).stdout.splitlines()
    entry = json.loads(lines[-1])
    assert entry["CURLING_STATE"] == "protected"
    assert entry["SYSLOG_IDENTIFIER"] == "curlingd"
    assert entry["CURLING_GENERATION"] == str((await lab.show(lab.alpha))["generation"])
    explained = f"journalctl --boot -x --lines=all MESSAGE_ID={entry['MESSAGE_ID']}"
    told = (await lab.alpha.agent.run(explained)).stdout
    assert f"Subject: {VM} is protected" in told
    assert "Defined-By: curling" in told
