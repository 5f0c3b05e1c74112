"""A VM's network in VLANs comes to another host: Debian's kernel filters them, this machine's may not."""

from __future__ import annotations

import json
from pathlib import Path

from .lab import Lab

PROGRAM = Path(__file__).with_name("vlans.py")
MAC = "52:54:00:12:34:56"


async def test_in_vlans_too_everybody_finds_the_guest_on_the_new_host_at_once(lab: Lab) -> None:
    command = ["/opt/curling/bin/python", "-c", PROGRAM.read_text()]
    done = await lab.alpha.agent.run(command, within=120)
    found = json.loads(done.stdout)
    lab.timeline.note("test", json.dumps(found, indent=1))
    # The injection was needed: the client was wrong about all four.
    assert found["wrong before"] == ["52:54:00:00:00:66"]
    assert found["problems"] == found["left over"] == found["changed"] == []
    assert found["ways when prepared"] == {"10": "vnet9", "20": "vnet9"}
    assert found["ways in the host"] == {"10": "vnet9", "20": "vnet9"}
    assert found["ways in the switch"] == {"10": "to-host", "20": "to-host"}
    addresses = {"198.51.100.9", "2001:db8:10::9", "203.0.113.9", "2001:db8:20::9"}
    assert found["neighbours"] == dict.fromkeys(addresses, MAC)
    assert found["port is as on the primary"], found["port"]
