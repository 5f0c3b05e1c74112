"""Plugs in a real kernel: what is held, let out and thrown away, packet by packet."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import trio

from tests.lab import tap

from .lab import Lab, Say

_PROBE = Path(__file__).with_name("plug_probe.py")
_FOLDER = "/root/plug"
_SCENARIOS = re.findall(r"^@scenario\nasync def (\w+)", _PROBE.read_text(), re.M)


@pytest.fixture(scope="module")
def outcomes(standing_lab: Lab, say: Say) -> dict[str, str]:
    """What each scenario printed, all run by one process: an emulated CPU takes seconds to start one."""

    async def run() -> str:
        async with standing_lab.connected():
            host = standing_lab.beta
            if host.pid is None:
                await standing_lab.power_on(host)
            for path in (_PROBE, Path(tap.__file__)):
                await host.agent.write(f"{_FOLDER}/{path.name}", path.read_bytes())
            command = f"/opt/curling/bin/python {_PROBE.name} {' '.join(_SCENARIOS)} 2>&1"
            kills = {"CURLING_KILLS": os.environ.get("CURLING_KILLS", "20")}
            return (await host.agent.run(command, cwd=_FOLDER, env=kills, within=900)).stdout

    say(f"{len(_SCENARIOS)} scenarios of the plug")
    with standing_lab.scenario("test_plug"):
        printed = trio.run(run)
    found = re.findall(r"^(\w+) begins\n(.*?^\1 ended with -?\d+)$", printed, re.M | re.S)
    return dict(found)


@pytest.mark.parametrize("scenario", _SCENARIOS)
def test_plug(outcomes: dict[str, str], scenario: str) -> None:
    assert outcomes[scenario].splitlines()[-1] == f"{scenario} ended with 0", outcomes[scenario]
